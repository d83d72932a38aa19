//! From a running guest to two.

use std::io::Write;

use clap::Args;
use offshoot_pilot::protocol::{Mode, Request};
use offshoot_vmm::worker;

use super::{Bed, GuestArgs, Metric, times, workers};
use crate::failure::Failure;

/// Forks of one source, at most: on some backends each makes the chain of its disk's layers longer.
const OF_ONE_SOURCE: u32 = 16;

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
        let (mut source_pause, mut first_exit, mut vsock_reply) =
            (Vec::new(), Vec::new(), Vec::new());
        let mut left = bed.samples();
        while left > 0 {
            let source = self.source(bed, &format!("source-{left}"))?;
            let round = left.min(OF_ONE_SOURCE);
            left -= round;
            for _ in 0..round {
                let called = worker::monotonic();
                let (child, pause) = workers::fork(bed, &source.worker, "child")?;
                child.client(bed)?.state()?;
                vsock_reply.push(worker::monotonic() - called);
                first_exit.push(child.first_exit(called)?);
                source_pause.push(pause);
                child.discard()?;
            }
            source.discard()?;
        }
        Ok(vec![
            times("source_pause", &source_pause)?,
            times("first_exit", &first_exit)?,
            times("vsock_reply", &vsock_reply)?,
        ])
    }

    fn source(&self, bed: &Bed<'_>, name: &str) -> Result<workers::Subject, Failure> {
        let source = workers::boot(bed, name)?;
        bed.settle(source.client(bed)?, Mode::Halt)?;
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
