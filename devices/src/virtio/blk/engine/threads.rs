//! A small pool of threads that call the volume, for volumes that are not raw files.
//!
//! Guest memory is never lent to the volume as a slice, for the guest changes it at will: each
//! thread copies through a bounce buffer of its own, [`BOUNCE_BYTES`] at a time.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use offshoot_storage::Volume;
use vmm_sys_util::eventfd::EventFd;

use super::{Done, Engine};
use crate::GuestRam;
use crate::event::event;
use crate::virtio::blk::request::Op;
use crate::virtio::blk::spans::{Cursor, Spans};

/// The bounce buffer of one thread.
const BOUNCE_BYTES: usize = 256 << 10;

#[derive(Debug)]
struct Job {
    slot: usize,
    op: Arc<Op>,
    durable: bool,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that wait and that nobody has called.
    idle: usize,
    /// Threads that were called and have not woken up yet.
    called: usize,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    volume: Arc<dyn Volume>,
    memory: Arc<GuestRam>,
    state: Mutex<State>,
    /// There is a job, or it is time to stop.
    work: Condvar,
    /// A thread has become idle.
    idle: Condvar,
    done: Mutex<Vec<Done>>,
    done_event: EventFd,
}

/// Never poisoned: nothing panics while it holds one of our locks, and what they guard is whole
/// between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pool. Threads are started when jobs wait and none is idle.
#[derive(Debug)]
pub(in super::super) struct Pool {
    shared: Arc<Shared>,
    staged: Vec<Job>,
    threads: Vec<JoinHandle<()>>,
    most: usize,
}

impl Pool {
    /// A pool of at most `most` threads, none of them started yet.
    pub(in super::super) fn new(
        volume: Arc<dyn Volume>,
        memory: Arc<GuestRam>,
        most: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                volume,
                memory,
                state: Mutex::default(),
                work: Condvar::new(),
                idle: Condvar::new(),
                done: Mutex::default(),
                done_event: event()?,
            }),
            staged: Vec::new(),
            threads: Vec::new(),
            most,
        })
    }

    /// Starts threads for `wanted` jobs, as far as there may be more threads.
    fn grow(&mut self, wanted: usize) -> io::Result<()> {
        for _ in 0..wanted.min(self.most.saturating_sub(self.threads.len())) {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name("blk-worker".into())
                .spawn(move || shared.work())?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

impl Engine for Pool {
    fn start(&mut self, slot: usize, op: Arc<Op>, durable: bool) {
        self.staged.push(Job { slot, op, durable });
    }

    fn submit(&mut self) -> bool {
        let staged = self.staged.len();
        if staged == 0 {
            return false;
        }
        let (waiting, called) = {
            let mut state = lock(&self.shared.state);
            state.jobs.extend(self.staged.drain(..));
            let calls = staged.min(state.idle);
            state.idle -= calls;
            state.called += calls;
            for _ in 0..calls {
                self.shared.work.notify_one();
            }
            (state.jobs.len(), state.called)
        };
        if let Err(error) = self.grow(waiting.saturating_sub(called)) {
            tracing::warn!(%error, threads = self.threads.len(), "no more threads for block I/O");
            if self.threads.is_empty() {
                let jobs = std::mem::take(&mut lock(&self.shared.state).jobs);
                let kind = error.kind();
                lock(&self.shared.done).extend(jobs.into_iter().map(|job| Done {
                    slot: job.slot,
                    result: Err(kind.into()),
                }));
            }
        }
        false
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        done.append(&mut lock(&self.shared.done));
    }

    fn wait_fd(&self) -> [Option<RawFd>; 2] {
        [Some(self.shared.done_event.as_raw_fd()), None]
    }

    fn park(&mut self) {
        // A thread counts itself idle under the lock and then lets go of it by waiting; from then
        // on only a call wakes it, and whoever calls it says so in the count.
        let mut state = lock(&self.shared.state);
        while state.idle < self.threads.len() {
            state = self
                .shared
                .idle
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.shared.state);
            state.stop = true;
            state.jobs.clear();
        }
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A job's panic is caught, so that a thread ends in no other way.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut bounce = Vec::new();
        while let Some(job) = self.next_job() {
            let run = || execute(&*self.volume, &self.memory, &job, &mut bounce);
            let result = catch_unwind(AssertUnwindSafe(run))
                .unwrap_or_else(|_| Err(io::Error::other("the volume panicked")));
            let done = Done {
                slot: job.slot,
                result,
            };
            drop(job.op);
            let first = {
                let mut all = lock(&self.done);
                all.push(done);
                all.len() == 1
            };
            // The reader takes all that there is, so that only the first needs to call it. The
            // counter cannot overflow: it grows by one for each time that `done` was emptied.
            if first && let Err(error) = self.done_event.write(1) {
                tracing::error!(%error, "cannot report finished block I/O");
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state.idle += 1;
            self.idle.notify_one();
            while state.called == 0 && !state.stop {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.called = state.called.saturating_sub(1);
        }
    }
}

fn execute(
    volume: &dyn Volume,
    memory: &GuestRam,
    job: &Job,
    bounce: &mut Vec<u8>,
) -> io::Result<()> {
    match &*job.op {
        Op::Read { offset, data } => {
            let mut to = Cursor::new(data);
            for_chunks(*offset, data, bounce, |chunk, at| {
                volume.read_vectored_at(&mut [IoSliceMut::new(chunk)], at)?;
                to.write(memory, chunk).map_err(io::Error::other)
            })?;
        }
        Op::Write { offset, data } => {
            let mut from = Cursor::new(data);
            for_chunks(*offset, data, bounce, |chunk, at| {
                from.read(memory, chunk).map_err(io::Error::other)?;
                volume.write_vectored_at(&[IoSlice::new(chunk)], at)
            })?;
        }
        Op::Flush => volume.flush()?,
        Op::Discard { ranges } => {
            for range in ranges.iter().filter(|range| range.len > 0) {
                volume.discard(range.offset, range.len)?;
            }
        }
        Op::WriteZeroes { ranges } => {
            for zero in ranges.iter().filter(|zero| zero.range.len > 0) {
                volume.write_zeroes(zero.range.offset, zero.range.len, zero.unmap)?;
            }
        }
    }
    if job.durable && job.op.is_change() {
        volume.flush()?;
    }
    Ok(())
}

/// Goes through the bytes at `offset` in pieces that fit into `bounce`.
fn for_chunks(
    offset: u64,
    data: &Spans,
    bounce: &mut Vec<u8>,
    mut each: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = offset;
    let mut left = data.len();
    while left > 0 {
        let n = usize::try_from(left).map_or(BOUNCE_BYTES, |left| left.min(BOUNCE_BYTES));
        if bounce.len() < n {
            bounce.resize(n, 0);
        }
        each(&mut bounce[..n], at)?;
        at += n as u64;
        left -= n as u64;
    }
    Ok(())
}
