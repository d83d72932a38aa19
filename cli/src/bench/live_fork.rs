//! From a running guest to two.

use std::io::Write;

use clap::Args;
use offshoot_pilot::protocol::{Mode, Request};
use offshoot_vmm::worker;

use super::{Bed, GuestArgs, Metric, times, workers};
use crate::failure::Failure;

/// Live fork: a running guest, which has written all of its memory, is forked again and again.
///
/// source_pause: for how long the guest is stopped. first_exit: the call, which freezes and forks the
/// disk, to the first exit that an instruction of the child's guest causes. vsock_reply: the call to the
/// child's answer to a request over vsock.
#[derive(Debug, Args)]
pub(crate) struct LiveFork {
    /// Have the source rewrite so many pages of 4 KiB a second meanwhile.
    #[arg(long, value_name = "PAGES", default_value_t = 0)]
    dirty: u32,
    #[command(flatten)]
    guest: GuestArgs,
}

impl LiveFork {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        self.guest
            .on_each_backend("live-fork", out, |bed| self.measure(bed))
    }

    fn measure(&self, bed: &Bed<'_>) -> Result<Vec<Metric>, Failure> {
        let (mut source_pause, mut first_exit) = (Vec::new(), Vec::new());
        // A guest that shows by an exit that it runs, and one that sleeps until it is asked.
        let source = self.source(bed, Mode::Beacon)?;
        for _ in 0..bed.samples() {
            let called = worker::monotonic();
            let (child, _) = workers::fork(bed, &source.worker, "child")?;
            first_exit.push(child.first_exit(called)?);
            child.discard()?;
        }
        source.discard()?;
        let mut vsock_reply = Vec::new();
        let source = self.source(bed, Mode::Halt)?;
        for _ in 0..bed.samples() {
            let called = worker::monotonic();
            let (child, pause) = workers::fork(bed, &source.worker, "child")?;
            child.client(bed)?.state()?;
            vsock_reply.push(worker::monotonic() - called);
            source_pause.push(pause);
            child.discard()?;
        }
        source.discard()?;
        Ok(vec![
            times("source_pause", &source_pause)?,
            times("first_exit", &first_exit)?,
            times("vsock_reply", &vsock_reply)?,
        ])
    }

    fn source(&self, bed: &Bed<'_>, mode: Mode) -> Result<workers::Subject, Failure> {
        let source = workers::boot(bed, &format!("source-{mode}"))?;
        bed.settle(source.client(bed)?, mode)?;
        if self.dirty > 0 {
            let dirty = Request::Dirty {
                offset: 0,
                len: u64::MAX,
                rate: self.dirty,
            };
            source.client(bed)?.order(&dirty)?;
        }
        Ok(source)
    }
}
