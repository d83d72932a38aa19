//! io_uring for volumes that are raw files: the kernel moves the bytes between the file and guest
//! memory, as many requests at a time as the queue holds.
//!
//! Discards and zeroes go through the volume on a worker thread: its backend knows how its file
//! system does them.

mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use offshoot_storage::Volume;

pub(in super::super) use ring::Ring;
use ring::{Direction, RingWithMemory};

use super::threads::Pool;
use super::{Done, Engine};
use crate::GuestRam;
use crate::virtio::blk::request::Op;

/// How often in a row an operation may get nowhere (`EAGAIN`, `EINTR`) before it fails.
const MAX_STALLS: u32 = 1000;

/// What comes after the part of an operation that is in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Nothing.
    Done,
    /// A data sync, for the write is to be durable.
    Sync,
}

#[derive(Debug)]
struct InRing {
    then: Then,
    stalls: u32,
}

/// The engine.
#[derive(Debug)]
pub(in super::super) struct Uring {
    ring: RingWithMemory,
    /// What is in the ring, by slot.
    in_ring: Vec<Option<InRing>>,
    /// For what is not read, write or flush.
    pool: Pool,
    done: Vec<Done>,
    /// Whether the volume was flushed through its backend. Until then a data sync of the file is
    /// not enough (see `Volume::raw_file`): a new volume's name must become durable too.
    flushed: bool,
    /// Slots whose flush the volume does, on the pool.
    flushing: Vec<usize>,
}

impl Uring {
    /// An engine for `slots` operations at a time.
    pub(in super::super) fn new(
        ring: Ring,
        volume: Arc<dyn Volume>,
        memory: Arc<GuestRam>,
        slots: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            ring: ring.with_memory(Arc::clone(&memory), slots),
            in_ring: std::iter::repeat_with(|| None).take(slots).collect(),
            // One thread: such operations are rare and long, and few file systems gain from more.
            pool: Pool::new(volume, memory, 1)?,
            done: Vec::new(),
            flushed: false,
            flushing: Vec::new(),
        })
    }

    /// Begins a flush: by the kernel, or the first time by the volume. Returns whether the slot is
    /// in the ring.
    fn flush(&mut self, slot: usize) -> bool {
        if self.flushed {
            self.ring.sync(slot);
        } else {
            self.flushing.push(slot);
            self.pool.start(slot, Arc::new(Op::Flush), false);
        }
        self.flushed
    }

    fn begin(&mut self, slot: usize, then: Then, begun: io::Result<()>) {
        match begun {
            Ok(()) => {
                if let Some(place) = self.in_ring.get_mut(slot) {
                    *place = Some(InRing { then, stalls: 0 });
                }
            }
            Err(error) => self.done.push(Done {
                slot,
                result: Err(error),
            }),
        }
    }

    /// Takes what the kernel said of the entry of `slot`: goes on with it, or ends it.
    fn take_result(&mut self, slot: usize, result: i32) {
        let Some(Some(state)) = self.in_ring.get_mut(slot) else {
            tracing::error!(slot, "io_uring completed what was not begun");
            return;
        };
        let next = match usize::try_from(result) {
            Ok(moved) => {
                state.stalls = 0;
                self.ring.advance(slot, moved)
            }
            Err(_) => match io::Error::from_raw_os_error(result.wrapping_neg()) {
                error if is_passing(&error) && state.stalls < MAX_STALLS => {
                    state.stalls += 1;
                    self.ring.advance_nothing(slot)
                }
                error => Err(error),
            },
        };
        let result = match next {
            Ok(true) => return,
            Ok(false) if state.then == Then::Sync => {
                state.then = Then::Done;
                if !self.flush(slot) {
                    self.in_ring[slot] = None;
                    self.ring.release(slot);
                }
                return;
            }
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        self.in_ring[slot] = None;
        self.ring.release(slot);
        self.done.push(Done { slot, result });
    }
}

/// Whether the same entry may succeed when it is submitted again.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

impl Engine for Uring {
    fn start(&mut self, slot: usize, op: Arc<Op>, durable: bool) {
        match &*op {
            Op::Read { data, .. } | Op::Write { data, .. } if data.len() == 0 => {
                self.done.push(Done {
                    slot,
                    result: Ok(()),
                });
            }
            Op::Read { offset, data } => {
                let begun = self.ring.transfer(slot, Direction::Read, data, *offset);
                self.begin(slot, Then::Done, begun);
            }
            Op::Write { offset, data } => {
                let begun = self.ring.transfer(slot, Direction::Write, data, *offset);
                let then = if durable { Then::Sync } else { Then::Done };
                self.begin(slot, then, begun);
            }
            Op::Flush => {
                if self.flush(slot) {
                    self.begin(slot, Then::Done, Ok(()));
                }
            }
            Op::Discard { .. } | Op::WriteZeroes { .. } => self.pool.start(slot, op, durable),
        }
    }

    fn submit(&mut self) -> bool {
        let pool = self.pool.submit();
        self.ring.submit() || pool
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        while let Some((slot, result)) = self.ring.next_result() {
            self.take_result(slot, result);
        }
        done.append(&mut self.done);
        let before = done.len();
        self.pool.reap(done);
        for Done { slot, result } in done.iter().skip(before) {
            if let Some(index) = self.flushing.iter().position(|s| s == slot) {
                self.flushing.swap_remove(index);
                self.flushed |= result.is_ok();
            }
        }
    }

    fn wait_fd(&self) -> [Option<RawFd>; 2] {
        [Some(self.ring.wait_fd()), self.pool.wait_fd()[0]]
    }

    fn park(&mut self) {
        self.pool.park();
    }
}
