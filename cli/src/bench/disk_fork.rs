//! From a disk to another one with the same content.

use std::io::{IoSlice, Write};
use std::time::Instant;

use clap::Args;
use offshoot_pilot::protocol::pattern;
use offshoot_storage::{Durability, ForkCost, LayerName, StorageBackend, Volume, VolumeName};

use super::measure::Line;
use super::{LOOP_BYTES, Metric, ReportArgs, times};
use crate::failure::{Context, Failure};
use crate::place::PlaceArgs;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Samples of a fork that copies every byte, at most.
const FEW: u32 = 3;

/// Disk fork: a volume frozen into a layer, and a new volume made of the layer.
///
/// The data lies in pieces of one size all over the volume. A backend whose fork copies every byte is
/// sampled at most 3 times.
#[derive(Debug, Args)]
pub(crate) struct DiskFork {
    /// How many samples to take.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: u32,
    /// The volume's size in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1024))]
    size: u64,
    /// How much of it holds data, in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 1)]
    data: u64,
    /// The size of a piece in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1024))]
    piece: u64,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

impl DiskFork {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        if self.data > self.size {
            return Err(Failure::new("a volume cannot hold more data than its size"));
        }
        let place = self.place.prepare(LOOP_BYTES)?;
        for name in place.backends() {
            let store = place.store(name)?;
            let measured = self.measure(store.as_ref());
            for (metric, figures) in measured.context(|| format!("the bench failed on {name}"))? {
                let line = Line {
                    bench: "disk-fork",
                    metric,
                    backend: Some(name.clone()),
                    ram_mib: None,
                    figures,
                };
                self.report.print(out, &line)?;
            }
        }
        Ok(())
    }

    fn measure(&self, store: &dyn StorageBackend) -> Result<[Metric; 2], Failure> {
        let copies_all = store.capabilities().fork_cost == ForkCost::Bytes;
        let n = if copies_all { self.n.min(FEW) } else { self.n };
        let (source, base) = (VolumeName::new("source")?, LayerName::new("base")?);
        let (copy, layer) = (VolumeName::new("copy")?, LayerName::new("layer")?);
        fill(
            store.create(&source, self.size * GIB)?.as_ref(),
            self.data * GIB,
            self.piece * MIB,
        )?;
        store.freeze(&source, &base, Durability::Now)?;
        let (mut freeze, mut fork) = (Vec::new(), Vec::new());
        for _ in 0..n {
            let called = Instant::now();
            let volume = store.fork(&base, &copy)?;
            fork.push(called.elapsed());
            // A freeze of what nobody has written to would be none.
            volume.write_vectored_at(&[IoSlice::new(&[1; 4096])], 0)?;
            let called = Instant::now();
            store.freeze(&copy, &layer, Durability::Deferred)?;
            freeze.push(called.elapsed());
            drop(volume);
            store.delete(&copy)?;
            store.delete_layer(&layer)?;
        }
        Ok([times("freeze", &freeze)?, times("fork", &fork)?])
    }
}

/// Writes `data` bytes in pieces all over the volume.
fn fill(volume: &dyn Volume, data: u64, piece: u64) -> Result<(), Failure> {
    let mut bytes = vec![0; usize::try_from(MIB)?];
    let pieces = (data / piece).max(1);
    let apart = volume.size() / pieces / piece * piece;
    for start in (0..pieces).map(|number| number * apart) {
        for place in (start..start + piece).step_by(bytes.len()) {
            pattern::fill(&mut bytes, 1, place);
            volume.write_vectored_at(&[IoSlice::new(&bytes)], place)?;
        }
    }
    Ok(volume.flush()?)
}
