//! A backend of one's own: disks in memory, in blocks that forks share until one side writes.
//! `cargo run -p offshoot-storage --example own_backend` runs the conformance suite on it.
#![allow(clippy::print_stdout, reason = "a command that reports")]

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::{path::Path, process::ExitCode};

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::{
    Access, Capabilities, Durability, Error, ErrorKind, ForkCost, LayerName, MAX_SIZE, SECTOR,
    StorageBackend, Usage, Volume, VolumeName,
};

type Result<T> = std::result::Result<T, Error>;
type Opened = Result<Arc<dyn Volume>>;
const BLOCK: u64 = 4096;
type Blocks = BTreeMap<u64, Arc<[u8; 4096]>>;

/// A volume or layer: its blocks, and who has it open: which view to write, how many to read.
#[derive(Debug, Default)]
struct Disk {
    size: u64,
    blocks: RwLock<Blocks>,
    users: Mutex<(Option<u64>, u32)>,
}

/// An open disk. Closing it gives its lock back.
#[derive(Debug)]
struct Handle(VolumeName, Arc<Disk>, Option<u64>);

impl Handle {
    fn open(name: VolumeName, disk: &Arc<Disk>, writer: Option<u64>) -> Result<Arc<Self>> {
        let mut users = disk.users.lock().unwrap();
        match (writer, *users) {
            (None, (None, readers)) => users.1 = readers + 1,
            (Some(_), (None, 0)) => users.0 = writer,
            _ => return Err(Error::new(ErrorKind::InUse, "open", name)),
        }
        Ok(Arc::new(Self(name, disk.clone(), writer)))
    }

    /// Calls `f` with each block that the range touches and the part of it.
    fn each(
        &self,
        at: u64,
        len: u64,
        mut f: impl FnMut(u64, std::ops::Range<usize>),
    ) -> io::Result<()> {
        let end = at.checked_add(len).filter(|end| *end <= self.1.size);
        let (mut at, end) = (at, end.ok_or(io::ErrorKind::InvalidInput)?);
        while at < end {
            let next = end.min((at / BLOCK + 1) * BLOCK);
            let part = |at: u64| usize::try_from(at - at / BLOCK * BLOCK).unwrap();
            f(at / BLOCK, part(at)..part(next - 1) + 1);
            at = next;
        }
        Ok(())
    }

    fn writable(&self) -> io::Result<std::sync::RwLockWriteGuard<'_, Blocks>> {
        self.2.ok_or(io::ErrorKind::PermissionDenied)?;
        Ok(self.1.blocks.write().unwrap())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut users = self.1.users.lock().unwrap();
        *users = (None, users.1.saturating_sub(1));
    }
}

impl Volume for Handle {
    fn name(&self) -> &VolumeName {
        &self.0
    }
    fn size(&self) -> u64 {
        self.1.size
    }
    fn is_read_only(&self) -> bool {
        self.2.is_none()
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let (blocks, mut bytes) = (self.1.blocks.read().unwrap(), Vec::new());
        let len = bufs.iter().map(|b| b.len() as u64).sum();
        self.each(offset, len, |index, part| match blocks.get(&index) {
            Some(block) => bytes.extend_from_slice(&block[part]),
            None => bytes.resize(bytes.len() + part.len(), 0),
        })?;
        let mut rest = &bytes[..];
        for buf in bufs {
            let len = buf.len();
            buf.copy_from_slice(rest.split_off(..len).unwrap());
        }
        Ok(())
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let (mut blocks, bytes) = (self.writable()?, bufs.iter().flat_map(|b| b.to_vec()));
        let bytes: Vec<u8> = bytes.collect();
        let mut rest = &bytes[..];
        self.each(offset, bytes.len() as u64, |index, part| {
            let block = blocks.entry(index).or_insert_with(|| Arc::new([0; 4096]));
            let new = rest.split_off(..part.len()).unwrap();
            Arc::make_mut(block)[part].copy_from_slice(new);
        })
    }
    fn flush(&self) -> io::Result<()> {
        Ok(()) // Memory is as durable as it gets here.
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut blocks = self.writable()?;
        self.each(offset, len, |index, part| match blocks.get_mut(&index) {
            Some(block) if part.len() < 4096 => Arc::make_mut(block)[part].fill(0),
            _ => drop(blocks.remove(&index)),
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.discard(offset, len)
    }
    fn raw_file(&self) -> Option<&std::fs::File> {
        None
    }
}

/// Volumes (true) and layers (false) by name.
type Store = BTreeMap<(bool, String), Arc<Disk>>;

/// One view of a store: what one process would have open.
#[derive(Debug)]
struct Memory(u64, Arc<Mutex<Store>>);

impl Memory {
    fn disk(&self, operation: &'static str, is_volume: bool, name: &str) -> Result<Arc<Disk>> {
        let found = self
            .1
            .lock()
            .unwrap()
            .get(&(is_volume, name.into()))
            .cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, operation, name))
    }
    /// A volume that nobody has open.
    fn closed(&self, operation: &'static str, name: &VolumeName) -> Result<()> {
        match *self
            .disk(operation, true, name.as_str())?
            .users
            .lock()
            .unwrap()
        {
            (None, 0) => Ok(()),
            _ => Err(Error::new(ErrorKind::InUse, operation, name)),
        }
    }
    fn insert(&self, is_volume: bool, name: &str, disk: &Arc<Disk>) -> Result<()> {
        let mut store = self.1.lock().unwrap();
        if store.contains_key(&(is_volume, name.into())) {
            return Err(Error::new(ErrorKind::Exists, "make", name));
        }
        store.insert((is_volume, name.into()), disk.clone());
        Ok(())
    }
    fn remove(&self, is_volume: bool, name: &str) -> Result<()> {
        let gone = self.1.lock().unwrap().remove(&(is_volume, name.into()));
        gone.map(drop)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "delete", name))
    }
    fn names<N: From<LayerName>>(&self, volumes: bool) -> Vec<N> {
        let store = self.1.lock().unwrap();
        let names = store.keys().filter(|(is_volume, _)| *is_volume == volumes);
        names
            .map(|(_, name)| LayerName::new(name).unwrap().into())
            .collect()
    }
}

/// A disk that shares every block with this one.
fn fork_of(disk: &Disk) -> Arc<Disk> {
    let blocks = RwLock::new(disk.blocks.read().unwrap().clone());
    Arc::new(Disk {
        size: disk.size,
        blocks,
        ..Disk::default()
    })
}

impl StorageBackend for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::plain();
        capabilities.shares_blocks = true;
        capabilities.fork_cost = ForkCost::Extents;
        capabilities.reclaims_discard = true;
        capabilities
    }
    fn create(&self, name: &VolumeName, size: u64) -> Opened {
        self.create_filled(name, size, &mut |_| Ok(()))
    }
    fn create_filled(
        &self,
        name: &VolumeName,
        size: u64,
        fill: &mut dyn FnMut(&dyn Volume) -> Result<()>,
    ) -> Opened {
        if !(SECTOR..=MAX_SIZE).contains(&size) || !size.is_multiple_of(SECTOR) {
            return Err(Error::new(ErrorKind::Invalid, "create", name));
        }
        let disk = Arc::new(Disk {
            size,
            ..Disk::default()
        });
        let volume = Handle::open(name.clone(), &disk, Some(self.0))?;
        fill(&*volume)?;
        self.insert(true, name.as_str(), &disk)?;
        Ok(volume)
    }
    fn open(&self, name: &VolumeName, access: Access) -> Opened {
        let writer = (access == Access::ReadWrite).then_some(self.0);
        Ok(Handle::open(
            name.clone(),
            &self.disk("open", true, name.as_str())?,
            writer,
        )?)
    }
    fn freeze(&self, volume: &VolumeName, layer: &LayerName, _: Durability) -> Result<()> {
        let disk = self.disk("freeze", true, volume.as_str())?;
        if disk
            .users
            .lock()
            .unwrap()
            .0
            .is_some_and(|view| view != self.0)
        {
            return Err(Error::new(ErrorKind::InUse, "freeze", volume));
        }
        self.insert(false, layer.as_str(), &fork_of(&disk))
    }
    fn sync_layer(&self, layer: &LayerName) -> Result<()> {
        self.disk("sync", false, layer.as_str()).map(drop)
    }
    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Opened {
        let disk = fork_of(&*self.disk("fork", false, layer.as_str())?);
        let opened = Handle::open(volume.clone(), &disk, Some(self.0))?;
        self.insert(true, volume.as_str(), &disk)?;
        Ok(opened)
    }
    fn open_layer(&self, layer: &LayerName) -> Opened {
        let disk = self.disk("open", false, layer.as_str())?;
        Ok(Handle::open(layer.clone().into(), &disk, None)?)
    }
    fn flatten(&self, volume: &VolumeName) -> Result<()> {
        self.closed("flatten", volume)
    }
    fn delete(&self, volume: &VolumeName) -> Result<()> {
        self.closed("delete", volume)?;
        self.remove(true, volume.as_str())
    }
    fn delete_layer(&self, layer: &LayerName) -> Result<()> {
        self.remove(false, layer.as_str())
    }
    fn volumes(&self) -> Result<Vec<VolumeName>> {
        Ok(self.names(true))
    }
    fn layers(&self) -> Result<Vec<LayerName>> {
        Ok(self.names(false))
    }
    fn usage(&self, volume: &VolumeName) -> Result<Usage> {
        let disk = self.disk("measure", true, volume.as_str())?;
        let blocks = disk.blocks.read().unwrap();
        let own = blocks
            .values()
            .filter(|block| Arc::strong_count(block) == 1);
        let (own, all) = (own.count() as u64 * BLOCK, blocks.len() as u64 * BLOCK);
        Ok(Usage {
            size: disk.size,
            own,
            shared: Some(all - own),
        })
    }
    fn check(&self, volume: &VolumeName) -> Result<()> {
        self.disk("check", true, volume.as_str()).map(drop)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    // What a forked process inherits is a copy of every disk, with nobody in it.
    fn forget_open(&self) {
        for disk in self.1.lock().unwrap().values() {
            *disk.users.lock().unwrap() = (None, 0);
        }
    }
}

fn main() -> ExitCode {
    let stores = Mutex::new(HashMap::<_, Arc<Mutex<Store>>>::new());
    let views = AtomicU64::new(0);
    let open = |dir: &Path| -> Result<Arc<dyn StorageBackend>> {
        let (mut stores, view) = (
            stores.lock().unwrap(),
            views.fetch_add(1, Ordering::Relaxed),
        );
        let store = stores.entry(dir.to_owned()).or_default();
        Ok(Arc::new(Memory(view, store.clone())))
    };
    let report = conformance::run(&open, Path::new("memory"), &Options::default());
    print!("{report}");
    if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
