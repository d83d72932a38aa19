//! The thread of a command: moves its output, holds it to its time limit, sees its end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::{Exit, RawKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::Job;
use crate::children::Children;

/// Read at once; also what a pipe holds.
const PART: usize = 16 << 10;
/// What is taken at most after the end of a command: all that it can have left in a pipe, and not
/// what a background process adds for ever.
const LEFT_BEHIND: usize = 1 << 20;

/// One stream of a command's output.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) stream: RawKind,
    pub(super) fd: OwnedFd,
}

/// Runs until the command has ended and nobody holds its output open any more.
pub(super) fn run(
    job: &Arc<Job>,
    children: &Children,
    mut sources: Vec<Source>,
    limit: Option<Duration>,
) {
    let mut pump = Pump {
        job,
        children,
        deadline: limit.and_then(|limit| Instant::now().checked_add(limit)),
        timed_out: false,
        buffer: vec![0; PART],
    };
    for source in &sources {
        let _ = rustix::io::ioctl_fionbio(&source.fd, true);
    }
    let mut settled = false;
    while !settled || !sources.is_empty() {
        // A command that was forgotten has no use for what its background processes write.
        if settled && job.is_forgotten() {
            return;
        }
        let ready = pump.wait(&sources, settled);
        if !settled && let Some((state, value)) = job.child.end() {
            pump.drain(&mut sources);
            settled = true;
            job.close_input();
            job.output.settle(Exit {
                state,
                value,
                timed_out: pump.timed_out,
            });
            continue;
        }
        let mut ready = ready.into_iter();
        sources.retain(|source| !ready.next().unwrap_or(false) || pump.once(source) != Flow::End);
    }
}

#[derive(PartialEq, Eq)]
enum Flow {
    Some(usize),
    Nothing,
    End,
}

struct Pump<'a> {
    job: &'a Job,
    children: &'a Children,
    deadline: Option<Instant>,
    timed_out: bool,
    buffer: Vec<u8>,
}

impl Pump<'_> {
    /// Waits for output, the end or the time limit; says which sources are ready.
    fn wait(&mut self, sources: &[Source], settled: bool) -> Vec<bool> {
        let mut fds: Vec<_> = sources
            .iter()
            .map(|source| PollFd::new(&source.fd, PollFlags::IN))
            .collect();
        match settled {
            false => fds.push(PollFd::new(self.job.child.event(), PollFlags::IN)),
            // Woken when the command is forgotten.
            true => fds.push(PollFd::new(&self.job.forgotten, PollFlags::IN)),
        }
        let left = self
            .deadline
            .filter(|_| !settled)
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let _ = poll(&mut fds, left.as_ref());
        let ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if !settled {
            self.enforce();
        }
        ready
    }

    /// Kills the command's group when its time is up.
    fn enforce(&mut self) {
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            // An end that has not been seen yet came first.
            if self.job.child.end().is_none() {
                self.timed_out = true;
                let _ = self.children.signal(&self.job.child, libc::SIGKILL, true);
            }
            self.deadline = None;
        }
    }

    /// Reads once and stores what came.
    fn once(&mut self, source: &Source) -> Flow {
        match rustix::io::read(source.fd.as_fd(), &mut *self.buffer) {
            // EIO: the last process has closed the terminal.
            Ok(0) | Err(Errno::IO) => Flow::End,
            Ok(got) => {
                let bytes = self.buffer.get(..got).unwrap_or_default().to_vec();
                while !self.job.output.push(source.stream, &bytes, self.deadline) {
                    self.enforce();
                }
                Flow::Some(got)
            }
            Err(Errno::INTR | Errno::AGAIN) => Flow::Nothing,
            Err(_) => Flow::End,
        }
    }

    /// After the end of the command: takes what it has left behind.
    fn drain(&mut self, sources: &mut Vec<Source>) {
        self.deadline = None;
        sources.retain(|source| {
            let mut taken = 0;
            loop {
                // poll has a terminal's pending bytes delivered first.
                let mut fd = [PollFd::new(&source.fd, PollFlags::IN)];
                let now = Timespec::default();
                if !matches!(poll(&mut fd, Some(&now)), Ok(1)) || taken >= LEFT_BEHIND {
                    return true;
                }
                match self.once(source) {
                    Flow::Some(got) => taken += got,
                    Flow::Nothing => return true,
                    Flow::End => return false,
                }
            }
        });
    }
}
