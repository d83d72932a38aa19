//! Many sandboxes at once.

use std::io::Write;

use clap::Args;
use offshoot_pilot::protocol::Mode;
use offshoot_vmm::worker::{self, DriveFrom};

use super::measure::Figures;
use super::memory::Footprint;
use super::{Bed, GuestArgs, Metric, create, times, workers};
use crate::failure::Failure;
use crate::guest::PATIENCE;

/// How many children one call forks.
const BATCH: u32 = 50;

/// Density: --n sandboxes from one snapshot, all alive at once.
///
/// all_ready: the first call until all have answered over vsock. pss and total: memory a sandbox
/// afterwards, its own share and with the kernel's (page tables, stacks, slab).
#[derive(Debug, Args)]
pub(crate) struct Density {
    #[command(flatten)]
    guest: GuestArgs,
}

impl Density {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        // Two descriptors a sandbox.
        let raised = rustix::process::Rlimit {
            current: limit.maximum,
            ..limit
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)
            .map_err(std::io::Error::from)?;
        self.guest.on_each_backend("density", out, measure)
    }
}

fn measure(bed: &Bed<'_>) -> Result<Vec<Metric>, Failure> {
    let snapshots = bed.place.snapshots(bed.name)?;
    let saved = create::sample(bed, &snapshots, Mode::Halt)?;
    let template = create::template(&saved)?;
    let before = Footprint::now()?;
    let called = worker::monotonic();
    let mut children = Vec::new();
    let mut left = bed.samples();
    while left > 0 {
        let count = left.min(BATCH);
        let mut plans = Vec::new();
        let mut named = Vec::new();
        for number in (left - count)..left {
            let name = format!("child-{number}");
            let (plan, cable) = workers::bindings(bed, &name, DriveFrom::Fork(name.clone()))?;
            plans.push(plan);
            named.push((name, cable));
        }
        left -= count;
        let forked = template.fork(plans, PATIENCE)?;
        for (worker, (name, cable)) in forked.workers.into_iter().zip(named) {
            children.push(workers::Subject {
                worker,
                name,
                cable,
            });
        }
    }
    for child in &children {
        child.client(bed)?.state()?;
    }
    let all_ready = worker::monotonic() - called;
    let grown = Footprint::now()?.since(before);
    let mut pss = 0.0;
    for child in &children {
        pss += Footprint::of_process(child.worker.pid())?;
    }
    let n = children.len();
    let count = f64::from(bed.samples());
    let each = |kib: f64| Figures::Value {
        n,
        value: kib / count,
        unit: "KiB",
    };
    for child in children {
        child.discard()?;
    }
    Ok(vec![
        times("all_ready", &[all_ready])?,
        ("pss", each(pss)),
        ("total", each(pss + grown.kernel_kib)),
    ])
}
