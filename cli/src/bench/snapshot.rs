//! From a running guest to a snapshot.

use std::io::Write;
use std::time::Instant;

use clap::Args;
use offshoot_pilot::protocol::Mode;
use offshoot_storage::VolumeName;
use offshoot_vmm::SaveOptions;

use super::{Bed, GuestArgs, Metric, times};
use crate::bench::measure::Figures;
use crate::failure::Failure;
use crate::place::allocated;

/// Snapshot: how long the source is paused, how long it takes in all, how large it becomes.
///
/// The guest has written all of its memory. The time is that of a snapshot which survives a power cut.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    #[command(flatten)]
    guest: GuestArgs,
}

impl Snapshot {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        self.guest.on_each_backend("snapshot", out, measure)
    }
}

/// Samples of one guest, at most: on some backends each makes the chain of its disk's layers longer.
const OF_ONE_GUEST: u32 = 16;

fn measure(bed: &Bed<'_>) -> Result<Vec<Metric>, Failure> {
    let snapshots = bed.place.snapshots(bed.name)?;
    let (mut source_pause, mut total) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    let mut left = bed.samples();
    while left > 0 {
        let volume = format!("source-{left}");
        let mut guest = bed.boot(&volume)?;
        bed.settle(guest.client()?, Mode::Halt)?;
        let round = left.min(OF_ONE_GUEST);
        left -= round;
        for _ in 0..round {
            let called = Instant::now();
            let paused = guest.running.pause()?;
            let saved = paused.save(&snapshots, SaveOptions::new()?)?;
            total.push(called.elapsed());
            paused.resume()?;
            source_pause.push(called.elapsed());
            bytes = allocated(&saved.path)?;
            std::fs::remove_dir_all(&saved.path)?;
        }
        guest.end();
        bed.store.delete(&VolumeName::new(&volume)?)?;
    }
    let size = Figures::Value {
        n: source_pause.len(),
        value: f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)),
        unit: "KiB",
    };
    Ok(vec![
        times("source_pause", &source_pause)?,
        times("total", &total)?,
        ("size", size),
    ])
}
