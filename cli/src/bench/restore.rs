//! From a snapshot to a guest that runs.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use offshoot_pilot::protocol::Mode;
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{LayerName, VolumeName};
use offshoot_vmm::{DriveBinding, SaveOptions, Saved, Template};

use super::memory::Footprint;
use super::{Bed, GuestArgs, Metric, times};
use crate::bench::measure::Figures;
use crate::failure::Failure;
use crate::guest::{Cable, DISK, Guest};

/// Restore: from a snapshot's files to a copy that runs, and what an idle copy costs.
///
/// load: the snapshot's files are opened and checked, digests apart. first_exit: the call, which
/// forks the disk, makes the bindings and builds the machine over the mapped memory, to the first exit
/// that an instruction of the guest causes. vsock_reply: the same call to the guest's answer to a
/// request over vsock; the guest sleeps until then. disk_fork is the part of the disk in it. idle_pss and
/// idle_total: memory of a copy that has answered once, and with the kernel's share (page tables, stacks,
/// slab).
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// How many copies to have at once when their memory is measured.
    #[arg(long, value_name = "N", default_value_t = 50)]
    idle: u32,
    #[command(flatten)]
    guest: GuestArgs,
}

impl Restore {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        self.guest
            .on_each_backend("restore", out, |bed| self.measure(bed))
    }

    fn measure(&self, bed: &Bed<'_>) -> Result<Vec<Metric>, Failure> {
        let snapshots = bed.place.snapshots(bed.name)?;
        // Of a guest that shows by an exit that it runs, and of one that sleeps.
        let busy = sample(bed, &snapshots, Mode::Beacon)?;
        let asleep = sample(bed, &snapshots, Mode::Halt)?;

        let mut load = Vec::new();
        for _ in 0..bed.samples() {
            let called = Instant::now();
            drop(template(bed, &asleep)?);
            load.push(called.elapsed());
        }
        let (mut disk_fork, mut first_exit, mut vsock_reply) = (Vec::new(), Vec::new(), Vec::new());
        let origin = Origin::new(bed, &busy)?;
        for _ in 0..bed.samples() {
            let called = Instant::now();
            let copy = origin.copy(0, &mut disk_fork)?;
            first_exit.push(copy.first_exit()? - called);
            origin.end(0, copy)?;
        }
        let origin = Origin::new(bed, &asleep)?;
        for _ in 0..bed.samples() {
            let called = Instant::now();
            let copy = origin.copy(0, &mut disk_fork)?;
            copy.client()?.state()?;
            vsock_reply.push(called.elapsed());
            origin.end(0, copy)?;
        }
        let mut metrics = vec![
            times("load", &load)?,
            times("disk_fork", &disk_fork)?,
            times("first_exit", &first_exit)?,
            times("vsock_reply", &vsock_reply)?,
        ];
        if self.idle > 0 {
            metrics.extend(self.idle_memory(&origin)?);
        }
        Ok(metrics)
    }

    fn idle_memory(&self, origin: &Origin<'_, '_>) -> Result<[Metric; 2], Failure> {
        let before = Footprint::now()?;
        let mut copies = Vec::new();
        for number in 0..self.idle {
            let copy = origin.copy(number, &mut Vec::new())?;
            copy.client()?.state()?;
            copies.push(copy);
        }
        let grown = Footprint::now()?.since(before);
        for (number, copy) in (0..).zip(copies) {
            origin.end(number, copy)?;
        }
        let count = self.idle;
        let each = |kib: f64| Figures::Value {
            n: usize::try_from(count).unwrap_or(usize::MAX),
            value: kib / f64::from(count),
            unit: "KiB",
        };
        Ok([
            ("idle_pss", each(grown.pss_kib)),
            ("idle_total", each(grown.pss_kib + grown.kernel_kib)),
        ])
    }
}

/// A snapshot of a guest that idles in `mode`.
fn sample(bed: &Bed<'_>, snapshots: &Path, mode: Mode) -> Result<Saved, Failure> {
    let name = format!("source-{mode}");
    let mut guest = bed.boot(&name)?;
    bed.settle(guest.client()?, mode)?;
    let paused = guest.running.pause()?;
    let saved = paused.save(snapshots, SaveOptions::new()?)?;
    drop(paused);
    guest.end();
    Ok(saved)
}

fn template(bed: &Bed<'_>, saved: &Saved) -> Result<Template, Failure> {
    let snapshot = RawSnapshot::open(&saved.path)?;
    Ok(Template::load(bed.host, &snapshot, Verify::None)?)
}

/// What copies are made of.
struct Origin<'a, 'b> {
    bed: &'a Bed<'b>,
    template: Template,
    layer: LayerName,
}

impl<'a, 'b> Origin<'a, 'b> {
    fn new(bed: &'a Bed<'b>, saved: &Saved) -> Result<Self, Failure> {
        let layer = saved.layers.iter().find(|(id, _)| id == DISK);
        let (_, layer) =
            layer.ok_or_else(|| Failure::new("the snapshot does not name its disk"))?;
        Ok(Self {
            bed,
            template: template(bed, saved)?,
            layer: layer.clone(),
        })
    }

    fn name(number: u32) -> String {
        format!("copy-{number}")
    }

    fn copy(&self, number: u32, disk_fork: &mut Vec<Duration>) -> Result<Guest, Failure> {
        let name = Self::name(number);
        let called = Instant::now();
        let volume = self.bed.store.fork(&self.layer, &VolumeName::new(&name)?)?;
        disk_fork.push(called.elapsed());
        let disk = DriveBinding::volume(Arc::clone(&self.bed.store), volume);
        Guest::copy(&self.template, disk, self.bed.socket(&name), Cable::Silent)
    }

    /// Ends a copy and removes its disk.
    fn end(&self, number: u32, copy: Guest) -> Result<(), Failure> {
        copy.end();
        let name = Self::name(number);
        Ok(self.bed.store.delete(&VolumeName::new(&name)?)?)
    }
}
