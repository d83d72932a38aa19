//! A disk (virtio 1.2, 5.2).

use offshoot_protocol::{BlkOp, ErrorCode, Outcome, Refusal, pattern};

use crate::cpu;
use crate::interrupts::Interrupts;
use crate::memory::Allocator;
use crate::patience::Patience;
use crate::virtio::mmio::{Found, Transport};
use crate::virtio::queue::{Piece, Queue};

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const CONFIG_CAPACITY: u64 = 0;
const CONFIG_MAX_DISCARD: u64 = 36;
const CONFIG_MAX_WRITE_ZEROES: u64 = 48;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const SECTOR: u64 = 512;
/// Requests in flight at most: a queue of 64 holds this many even without indirect descriptors.
const DEPTH: u16 = 20;
/// Bytes of data in a request at most.
const CHUNK: u32 = 65536;
/// What a request has beside its data: header, range and status.
const EXTRA: usize = 64;
const RANGE: usize = 16;
const STATUS: usize = 32;
const NOT_ANSWERED: u8 = 0xff;

/// A disk.
pub(crate) struct Blk {
    pub(crate) transport: Transport,
    queue: Queue,
    extra: *mut u8,
    data: *mut u8,
    /// Place of each slot's data on the disk, and its length.
    slots: [(u64, u32); DEPTH as usize],
    broken: bool,
}

/// A piece of work on a range.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) op: BlkOp,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) seed: u64,
    pub(crate) chunk: u32,
    pub(crate) depth: u16,
}

impl Blk {
    /// Sets the device up; `None` when it refuses or memory is short.
    pub(crate) fn start(
        found: &Found,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) -> Option<Self> {
        let wanted = F_RO | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
        let mut transport = Transport::start(found, wanted)?;
        let queue = transport.queue(0, allocator)?;
        let extra = allocator.pages(EXTRA * usize::from(DEPTH))?;
        let data = allocator.pages(CHUNK as usize * usize::from(DEPTH))?;
        transport.begin(interrupts);
        Some(Self {
            transport,
            queue,
            extra,
            data,
            slots: [(0, 0); DEPTH as usize],
            broken: false,
        })
    }

    /// Bytes on the disk, as it says now.
    pub(crate) fn capacity(&self) -> u64 {
        self.transport
            .config_u64(CONFIG_CAPACITY)
            .saturating_mul(SECTOR)
    }

    /// Drops interrupts that nobody waits for.
    pub(crate) fn poll(&mut self) {
        self.transport.take_interrupt();
    }

    /// Checks a piece of work against the disk and fills in its defaults.
    fn check(&self, mut work: Work) -> Result<Work, Refusal> {
        let capacity = self.capacity();
        let (feature, limit) = match work.op {
            BlkOp::Flush => (F_FLUSH, CHUNK),
            BlkOp::Discard => (F_DISCARD, self.range_limit(F_DISCARD, CONFIG_MAX_DISCARD)),
            BlkOp::Zero => (
                F_WRITE_ZEROES,
                self.range_limit(F_WRITE_ZEROES, CONFIG_MAX_WRITE_ZEROES),
            ),
            _ => (0, CHUNK),
        };
        if !self.transport.has(feature) {
            return Err(Refusal::new(
                ErrorCode::NotOffered,
                u64::from(feature.trailing_zeros()),
            ));
        }
        if work.op == BlkOp::Flush {
            (work.offset, work.len) = (0, 0);
        } else if work.len == u64::MAX {
            work.len = capacity.saturating_sub(work.offset);
        }
        if [work.offset, work.len, u64::from(work.chunk)]
            .iter()
            .any(|n| n % SECTOR != 0)
        {
            return Err(Refusal::new(ErrorCode::Misaligned, SECTOR));
        }
        if work
            .offset
            .checked_add(work.len)
            .is_none_or(|end| end > capacity)
        {
            return Err(Refusal::new(ErrorCode::OutOfRange, capacity));
        }
        if work.chunk == 0 || work.chunk > limit {
            return Err(Refusal::new(ErrorCode::OutOfRange, u64::from(limit)));
        }
        if !(1..=DEPTH).contains(&work.depth) {
            return Err(Refusal::new(ErrorCode::OutOfRange, u64::from(DEPTH)));
        }
        Ok(work)
    }

    /// The longest range of a discard or write-zeroes request, in bytes.
    fn range_limit(&self, feature: u64, field: u64) -> u32 {
        if !self.transport.has(feature) {
            return 0;
        }
        let sectors = u64::from(self.transport.config_u32(field));
        u32::try_from((sectors * SECTOR).min(1 << 31)).unwrap_or(0)
    }

    /// Does a piece of work.
    pub(crate) fn run(
        &mut self,
        work: Work,
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Outcome, Refusal> {
        if self.broken {
            return Err(Refusal::new(ErrorCode::DeviceBroken, 0));
        }
        let work = self.check(work)?;
        let begin = cpu::tsc();
        let end = work.offset + work.len;
        let mut outcome = Outcome {
            first_bad: u64::MAX,
            ..Outcome::default()
        };
        let mut next = work.offset;
        let mut flush = work.op == BlkOp::Flush;
        let mut free = (1u32 << work.depth) - 1;
        let all_free = free;
        let mut failed = None;
        let mut patience = Patience::new(halt);
        loop {
            while free != 0 && failed.is_none() && (next < end || flush) {
                let slot = free.trailing_zeros() as u16;
                let len = (end - next).min(u64::from(work.chunk)) as u32;
                self.submit(&work, slot, next, len);
                free &= !(1 << slot);
                next += u64::from(len);
                flush = false;
                outcome.units += 1;
            }
            self.queue.kick(&self.transport);
            if free == all_free {
                break;
            }
            match self.queue.take() {
                Some(done) => {
                    free |= 1 << done.token;
                    patience.progress();
                    match self.finish(&work, done.token, &mut outcome) {
                        0 => {}
                        status => failed = failed.or(Some(status)),
                    }
                }
                None if self.queue.broken || self.transport.needs_reset => {
                    self.give_up();
                    patience.end(interrupts);
                    return Err(Refusal::new(ErrorCode::DeviceBroken, outcome.bytes));
                }
                None => {
                    self.transport.take_interrupt();
                    let queue = &mut self.queue;
                    if !patience.wait(interrupts, || queue.arm()) {
                        self.give_up();
                        patience.end(interrupts);
                        return Err(Refusal::new(ErrorCode::NoAnswer, outcome.bytes));
                    }
                }
            }
        }
        self.queue.disarm();
        patience.end(interrupts);
        outcome.ticks = cpu::tsc().saturating_sub(begin);
        match failed {
            Some(status) => Err(Refusal::new(ErrorCode::DeviceFailed, u64::from(status))),
            None => Ok(outcome),
        }
    }

    /// The device keeps buffers that it does not give back: it is not used again.
    fn give_up(&mut self) {
        self.transport.fail();
        self.broken = true;
    }

    fn data(&mut self, slot: u16, len: u32) -> &mut [u8] {
        let start = self.data.wrapping_add(CHUNK as usize * usize::from(slot));
        // SAFETY: the slot's own part of the allocation; called only while the device does not
        // have it, and the borrow of self keeps it the only reference.
        unsafe { core::slice::from_raw_parts_mut(start, len as usize) }
    }

    fn submit(&mut self, work: &Work, slot: u16, place: u64, len: u32) {
        let kind = match work.op {
            BlkOp::Write => T_OUT,
            BlkOp::Discard => T_DISCARD,
            BlkOp::Zero => T_WRITE_ZEROES,
            BlkOp::Flush => T_FLUSH,
            _ => T_IN,
        };
        if work.op == BlkOp::Write {
            pattern::fill(self.data(slot, len), work.seed, place);
        }
        self.slots[usize::from(slot)] = (place, len);
        let ranged = matches!(work.op, BlkOp::Discard | BlkOp::Zero);
        let extra = self.extra.wrapping_add(EXTRA * usize::from(slot));
        let sector = if ranged || work.op == BlkOp::Flush {
            0
        } else {
            place / SECTOR
        };
        // SAFETY: the slot's part of the allocation, aligned, which the device does not have now.
        unsafe {
            extra.cast::<[u32; 2]>().write([kind, 0]);
            extra.add(8).cast::<u64>().write(sector);
            extra.add(RANGE).cast::<u64>().write(place / SECTOR);
            extra
                .add(RANGE + 8)
                .cast::<u32>()
                .write(len / SECTOR as u32);
            let flags = if work.op == BlkOp::Zero { UNMAP } else { 0 };
            extra.add(RANGE + 12).cast::<u32>().write(flags);
            extra.add(STATUS).write_volatile(NOT_ANSWERED);
        }
        let header = Piece {
            address: extra,
            len: 16,
            writable: false,
        };
        let status = Piece {
            address: extra.wrapping_add(STATUS),
            len: 1,
            writable: true,
        };
        let range = Piece {
            address: extra.wrapping_add(RANGE),
            len: 16,
            writable: false,
        };
        let address = self.data.wrapping_add(CHUNK as usize * usize::from(slot));
        let data = Piece {
            address,
            len,
            writable: kind == T_IN,
        };
        let added = match work.op {
            BlkOp::Flush => self.queue.add(&[header, status], slot),
            _ if ranged => self.queue.add(&[header, range, status], slot),
            _ => self.queue.add(&[header, data, status], slot),
        };
        debug_assert!(added, "DEPTH requests fit into the queue");
    }

    /// Looks at what came back; the device's status.
    fn finish(&mut self, work: &Work, slot: u16, outcome: &mut Outcome) -> u8 {
        // SAFETY: inside the slot's part of the allocation.
        let status = unsafe {
            self.extra
                .add(EXTRA * usize::from(slot) + STATUS)
                .read_volatile()
        };
        let (place, len) = self.slots[usize::from(slot)];
        if status != 0 {
            return status;
        }
        outcome.bytes += u64::from(len);
        let (bad, first) = match work.op {
            BlkOp::Verify => pattern::compare(self.data(slot, len), work.seed, place),
            BlkOp::VerifyZero => nonzero(self.data(slot, len), place),
            _ => (0, None),
        };
        outcome.bad += bad;
        outcome.first_bad = outcome.first_bad.min(first.unwrap_or(u64::MAX));
        0
    }
}

/// How many words of `bytes` are not zero, and the place of the first.
fn nonzero(bytes: &[u8], place: u64) -> (u64, Option<u64>) {
    let places = (place..).step_by(8).zip(bytes.chunks(8));
    let mut bad = places
        .filter(|(_, word)| word.iter().any(|byte| *byte != 0))
        .map(|(at, _)| at);
    match bad.next() {
        Some(first) => (1 + bad.count() as u64, Some(first)),
        None => (0, None),
    }
}
