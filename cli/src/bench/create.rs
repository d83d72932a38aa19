//! From a template to a sandbox.

use std::io::Write;

use clap::Args;
use offshoot_pilot::protocol::Mode;
use offshoot_snapshot_format::Verify;
use offshoot_vmm::worker::{self, Program, Worker};
use offshoot_vmm::{SaveOptions, Saved};

use super::{Bed, GuestArgs, Metric, times, workers};
use crate::failure::Failure;
use crate::guest::PATIENCE;

/// Create: a sandbox from a snapshot, forked of a warm template.
///
/// template: a worker is started and has loaded the snapshot, without reading its digests. first_exit and
/// vsock_reply: as for a live fork, from a template that is there already.
#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    guest: GuestArgs,
}

impl Create {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        self.guest.on_each_backend("create", out, measure)
    }
}

fn measure(bed: &Bed<'_>) -> Result<Vec<Metric>, Failure> {
    let snapshots = bed.place.snapshots(bed.name)?;
    let busy = sample(bed, &snapshots, Mode::Beacon)?;
    let asleep = sample(bed, &snapshots, Mode::Halt)?;
    let mut start = Vec::new();
    for _ in 0..bed.samples().min(20) {
        let called = worker::monotonic();
        let template = template(&asleep)?;
        start.push(worker::monotonic() - called);
        template.stop(PATIENCE)?;
    }
    let (mut first_exit, mut vsock_reply) = (Vec::new(), Vec::new());
    let origin = template(&busy)?;
    for _ in 0..bed.samples() {
        let called = worker::monotonic();
        let (child, _) = workers::fork(bed, &origin, "child")?;
        first_exit.push(child.first_exit(called)?);
        child.discard()?;
    }
    let origin = template(&asleep)?;
    for _ in 0..bed.samples() {
        let called = worker::monotonic();
        let (child, _) = workers::fork(bed, &origin, "child")?;
        child.client(bed)?.state()?;
        vsock_reply.push(worker::monotonic() - called);
        child.discard()?;
    }
    Ok(vec![
        times("template", &start)?,
        times("first_exit", &first_exit)?,
        times("vsock_reply", &vsock_reply)?,
    ])
}

pub(super) fn template(saved: &Saved) -> Result<Worker, Failure> {
    let (worker, _) = Worker::template(&Program::this(), &saved.path, Verify::None, PATIENCE)?;
    Ok(worker)
}

/// A snapshot of a pilot that idles in `mode`.
pub(super) fn sample(
    bed: &Bed<'_>,
    snapshots: &std::path::Path,
    mode: Mode,
) -> Result<Saved, Failure> {
    let source = workers::boot(bed, &format!("source-{mode}"))?;
    bed.settle(source.client(bed)?, mode)?;
    let writer = source
        .worker
        .snapshot(snapshots, SaveOptions::new()?, PATIENCE)?;
    let saved = writer.wait(|_, _| (), PATIENCE)?;
    source.discard()?;
    Ok(saved)
}
