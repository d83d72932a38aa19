//! Random operations on volumes and layers, compared with byte vectors.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::pattern::{is_whole, layer, same, volume, write};
use super::{Bench, Failure, Rng, refused};
use crate::{Access, Durability, ErrorKind, LayerName, StorageBackend, Volume, VolumeName};

/// No multiple of any block or cluster size.
const SIZE: usize = 700 * 1024 + 512;
/// Keeps the model small enough to be compared often.
const MOST: usize = 6;

/// A volume as it should be.
#[derive(Debug)]
struct Expected {
    content: Vec<u8>,
    open: Option<Arc<dyn Volume>>,
}

/// The store and what it should hold.
struct Model<'a> {
    bench: &'a Bench<'a>,
    store: Arc<dyn StorageBackend>,
    rng: Rng,
    volumes: BTreeMap<VolumeName, Expected>,
    layers: BTreeMap<LayerName, Vec<u8>>,
    named: u32,
}

/// Thousands of random operations.
pub(super) fn model(bench: &Bench<'_>) -> Result<(), Failure> {
    let mut model = Model {
        bench,
        store: bench.open()?,
        rng: bench.rng(),
        volumes: BTreeMap::new(),
        layers: BTreeMap::new(),
        named: 0,
    };
    model.create()?;
    for step in 0..bench.options.operations {
        let what = model.rng.below(100);
        model
            .step(what)
            .map_err(|f| f.during(format_args!("step {step}")))?;
    }
    model.reopen()
}

impl Model<'_> {
    fn step(&mut self, what: u64) -> Result<(), Failure> {
        match what {
            0..=34 => self.write(),
            35..=64 => self.read(),
            65..=72 => self.zero(),
            73..=76 => self.flush(),
            77..=82 => self.freeze(),
            83..=88 => self.fork(),
            89 => self.create(),
            90..=92 => self.close_or_open(),
            93..=94 => self.delete_volume(),
            95..=96 => self.delete_layer(),
            97 => self.flatten(),
            98 => self.compare_layer(),
            _ => self.reopen(),
        }
    }

    fn next_name(&mut self) -> String {
        self.named += 1;
        format!("n{}", self.named)
    }

    /// A volume that is open for writing, and a range in it.
    fn target(&mut self) -> Result<(VolumeName, usize, usize), Failure> {
        let name = self.some_volume()?;
        let at = self.rng.index(SIZE);
        let most = match self.rng.below(10) {
            0 => SIZE,
            1..=4 => 5000,
            _ => 100_000,
        };
        let len = 1 + self.rng.index((SIZE - at).min(most));
        Ok((name, at, len))
    }

    /// Any volume, open for writing from now on.
    fn some_volume(&mut self) -> Result<VolumeName, Failure> {
        if self.volumes.is_empty() {
            self.create()?;
        }
        let index = self.rng.index(self.volumes.len());
        let name = self.volumes.keys().nth(index).cloned();
        let name = name.ok_or_else(|| Failure::new("the model lost a volume"))?;
        self.handle(&name)?;
        Ok(name)
    }

    /// The volume's handle, opened if need be.
    fn handle(&mut self, name: &VolumeName) -> Result<Arc<dyn Volume>, Failure> {
        let expected = self.expected(name)?;
        if let Some(open) = &expected.open {
            return Ok(open.clone());
        }
        let open = self.store.open(name, Access::ReadWrite)?;
        self.expected(name)?.open = Some(open.clone());
        Ok(open)
    }

    fn expected(&mut self, name: &VolumeName) -> Result<&mut Expected, Failure> {
        self.volumes
            .get_mut(name)
            .ok_or_else(|| Failure::new("the model lost a volume"))
    }

    fn write(&mut self) -> Result<(), Failure> {
        let (name, at, len) = self.target()?;
        let bytes = self.rng.bytes(len);
        write(&*self.handle(&name)?, at as u64, &bytes)?;
        self.expected(&name)?.content[at..at + len].copy_from_slice(&bytes);
        Ok(())
    }

    fn read(&mut self) -> Result<(), Failure> {
        let (name, at, len) = self.target()?;
        let open = self.handle(&name)?;
        same(
            &*open,
            at as u64,
            &self.expected(&name)?.content[at..at + len],
        )
    }

    fn zero(&mut self) -> Result<(), Failure> {
        let (name, at, len) = self.target()?;
        let open = self.handle(&name)?;
        match self.rng.below(3) {
            0 => open.discard(at as u64, len as u64)?,
            1 => open.write_zeroes(at as u64, len as u64, false)?,
            _ => open.write_zeroes(at as u64, len as u64, true)?,
        }
        self.expected(&name)?.content[at..at + len].fill(0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        let name = self.some_volume()?;
        Ok(self.handle(&name)?.flush()?)
    }

    fn create(&mut self) -> Result<(), Failure> {
        if self.volumes.len() >= MOST {
            return Ok(());
        }
        let name = volume(&self.next_name())?;
        let open = self.store.create(&name, SIZE as u64)?;
        let expected = Expected {
            content: vec![0; SIZE],
            open: Some(open),
        };
        self.volumes.insert(name, expected);
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        let name = self.some_volume()?;
        if self.rng.below(4) == 0 {
            self.expected(&name)?.open = None;
        }
        if self.layers.len() >= MOST {
            return self.delete_layer();
        }
        let frozen = layer(&self.next_name())?;
        match self.store.freeze(&name, &frozen, Durability::Deferred) {
            Ok(()) => {
                let content = self.expected(&name)?.content.clone();
                self.layers.insert(frozen, content);
                Ok(())
            }
            Err(e) if self.is_chain_end(&e) => self.flatten_this(&name),
            Err(e) => Err(e.into()),
        }
    }

    fn is_chain_end(&self, e: &crate::Error) -> bool {
        e.kind() == ErrorKind::ChainTooLong && self.store.capabilities().max_chain.is_some()
    }

    fn some_layer(&mut self) -> Option<LayerName> {
        let count = self.layers.len();
        let index = (count > 0).then(|| self.rng.index(count))?;
        self.layers.keys().nth(index).cloned()
    }

    fn fork(&mut self) -> Result<(), Failure> {
        let Some(frozen) = self.some_layer() else {
            return self.freeze();
        };
        if self.volumes.len() >= MOST {
            self.delete_volume()?;
        }
        let name = volume(&self.next_name())?;
        match self.store.fork(&frozen, &name) {
            Ok(open) => {
                let content = self.layers.get(&frozen).cloned().unwrap_or_default();
                let open = Some(open);
                self.volumes.insert(name, Expected { content, open });
                Ok(())
            }
            Err(e) if self.is_chain_end(&e) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn close_or_open(&mut self) -> Result<(), Failure> {
        let name = self.some_volume()?;
        self.expected(&name)?.open = None;
        if self.rng.below(2) == 0 {
            let reader = self.store.open(&name, Access::ReadOnly)?;
            is_whole(&*reader, &self.expected(&name)?.content)?;
        }
        Ok(())
    }

    fn delete_volume(&mut self) -> Result<(), Failure> {
        let name = self.some_volume()?;
        refused(
            self.store.delete(&name),
            ErrorKind::InUse,
            "deleting an open volume",
        )?;
        self.expected(&name)?.open = None;
        self.store.delete(&name)?;
        self.volumes.remove(&name);
        Ok(())
    }

    fn delete_layer(&mut self) -> Result<(), Failure> {
        let Some(frozen) = self.some_layer() else {
            return Ok(());
        };
        match self.store.delete_layer(&frozen) {
            Ok(()) => {
                self.layers.remove(&frozen);
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::InUse => self.compare_layer(),
            Err(e) => Err(e.into()),
        }
    }

    fn flatten(&mut self) -> Result<(), Failure> {
        let name = self.some_volume()?;
        self.flatten_this(&name)
    }

    fn flatten_this(&mut self, name: &VolumeName) -> Result<(), Failure> {
        self.expected(name)?.open = None;
        Ok(self.store.flatten(name)?)
    }

    fn compare_layer(&mut self) -> Result<(), Failure> {
        let Some(frozen) = self.some_layer() else {
            return Ok(());
        };
        let open = self.store.open_layer(&frozen)?;
        is_whole(&*open, self.layers.get(&frozen).map_or(&[], |c| c))
    }

    /// Closes everything, opens the store anew, and compares it all.
    fn reopen(&mut self) -> Result<(), Failure> {
        for expected in self.volumes.values_mut() {
            expected.open = None;
        }
        self.store = self.bench.open()?;
        let volumes: Vec<_> = self.volumes.keys().cloned().collect();
        super::ensure(
            self.store.volumes()? == volumes,
            "other volumes than expected",
        )?;
        let layers: Vec<_> = self.layers.keys().cloned().collect();
        super::ensure(self.store.layers()? == layers, "other layers than expected")?;
        for (name, expected) in &self.volumes {
            self.store.check(name)?;
            let open = self.store.open(name, Access::ReadOnly)?;
            is_whole(&*open, &expected.content)?;
        }
        for (name, content) in &self.layers {
            is_whole(&*self.store.open_layer(name)?, content)?;
        }
        Ok(())
    }
}
