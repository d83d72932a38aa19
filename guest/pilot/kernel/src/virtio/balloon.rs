//! The balloon (virtio 1.2, 5.5): gives memory back to the host and takes it again.

use offshoot_protocol::{ErrorCode, Outcome, Refusal};

use crate::cpu;
use crate::interrupts::Interrupts;
use crate::memory::{Allocator, Owned};
use crate::patience::Patience;
use crate::virtio::mmio::{Found, Transport};
use crate::virtio::queue::{Piece, Queue};

const F_STATS: u64 = 1 << 1;
const F_REPORTING: u64 = 1 << 5;

const CONFIG_NUM_PAGES: u64 = 0;
const CONFIG_ACTUAL: u64 = 4;

const PAGE: u64 = 4096;
/// Page numbers in one request.
const BATCH: u64 = 256;
/// Ranges in one report: as many as one buffer may have pieces.
const RANGES: usize = 4;
/// Bytes in one range of a report.
const RANGE: u64 = 2 << 20;
/// Where the statistics lie in the buffer, behind the page numbers.
const STATS: usize = 2048;
/// `VIRTIO_BALLOON_S_MEMTOT`.
const STAT_TOTAL: u16 = 5;
const STAT_LEN: u32 = 10;

/// A balloon.
pub(crate) struct Balloon {
    pub(crate) transport: Transport,
    inflate: Queue,
    deflate: Queue,
    stats: Option<Queue>,
    reports: Option<Queue>,
    buffer: *mut u8,
    /// Pages that the host has: the last ones that were owned.
    given: u64,
    broken: bool,
}

/// Which queue a request goes to.
#[derive(Clone, Copy)]
enum To {
    Inflate,
    Deflate,
    Reports,
}

impl Balloon {
    /// Sets the device up; `None` when it refuses or memory is short.
    pub(crate) fn start(
        found: &Found,
        ram: u64,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) -> Option<Self> {
        let mut transport = Transport::start(found, F_STATS | F_REPORTING)?;
        let inflate = transport.queue(0, allocator)?;
        let deflate = transport.queue(1, allocator)?;
        // Numbered without gaps, as Linux does.
        let has_stats = transport.has(F_STATS);
        let mut stats = match has_stats {
            true => Some(transport.queue(2, allocator)?),
            false => None,
        };
        let reports = match transport.has(F_REPORTING) {
            true => Some(transport.queue(2 + u16::from(has_stats), allocator)?),
            false => None,
        };
        let buffer = allocator.pages(PAGE as usize)?;
        let stat = buffer.wrapping_add(STATS);
        // SAFETY: inside the page, which the device does not have yet.
        unsafe {
            stat.cast::<u16>().write(STAT_TOTAL);
            stat.add(2).cast::<u64>().write_unaligned(ram);
        }
        transport.begin(interrupts);
        if let Some(stats) = &mut stats {
            // The device has one buffer of statistics from the beginning (5.5.6.3).
            stats.add(
                &[Piece {
                    address: stat,
                    len: STAT_LEN,
                    writable: false,
                }],
                0,
            );
            stats.kick(&transport);
        }
        Some(Self {
            transport,
            inflate,
            deflate,
            stats,
            reports,
            buffer,
            given: 0,
            broken: false,
        })
    }

    /// Gives the statistics again when the host has asked for them; whether it has.
    pub(crate) fn poll(&mut self) -> bool {
        self.transport.take_interrupt();
        self.broken |= self.transport.needs_reset;
        let Some(stats) = self.stats.as_mut().filter(|_| !self.broken) else {
            return false;
        };
        if stats.take().is_none() {
            return false;
        }
        let stat = self.buffer.wrapping_add(STATS);
        stats.add(
            &[Piece {
                address: stat,
                len: STAT_LEN,
                writable: false,
            }],
            0,
        );
        stats.kick(&self.transport);
        true
    }

    /// Asks for an interrupt when the host asks for statistics; whether it has already.
    pub(crate) fn arm(&mut self) -> bool {
        self.stats
            .as_mut()
            .is_some_and(|stats| !self.broken && stats.arm())
    }

    /// Asks for no interrupts.
    pub(crate) fn disarm(&mut self) {
        if let Some(stats) = &mut self.stats {
            stats.disarm();
        }
    }

    /// Gives pages or takes them back until the host has as many as it asks for.
    pub(crate) fn follow(
        &mut self,
        owned: &mut Owned,
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Outcome, Refusal> {
        let begin = cpu::tsc();
        let mut units = 0;
        // What the pilot needs to live lies outside of what it owns: it can give all of that.
        let wanted = u64::from(self.transport.config_u32(CONFIG_NUM_PAGES));
        let wanted = wanted.min(self.given + owned.len() / PAGE);
        while self.given != wanted {
            let count = self.given.abs_diff(wanted).min(BATCH);
            let growing = wanted > self.given;
            if !growing {
                owned.grow(count * PAGE);
            }
            let first = owned.len() - count * PAGE;
            for page in 0..count {
                let frame = (owned.address(first + page * PAGE) / PAGE) as u32;
                // SAFETY: BATCH numbers fit before the statistics; the device has given the
                // buffer back.
                unsafe { self.buffer.cast::<u32>().add(page as usize).write(frame) };
            }
            let numbers = Piece {
                address: self.buffer,
                len: 4 * count as u32,
                writable: false,
            };
            let to = if growing { To::Inflate } else { To::Deflate };
            if growing {
                // Not ours from before the host learns of it (5.5.6.1).
                owned.shrink(count * PAGE);
                self.given += count;
            } else {
                self.given -= count;
            }
            self.transport
                .set_config_u32(CONFIG_ACTUAL, self.given as u32);
            self.submit(to, &[numbers], halt, interrupts)?;
            units += 1;
        }
        let ticks = cpu::tsc().saturating_sub(begin);
        let bytes = self.given * PAGE;
        Ok(Outcome {
            bytes,
            units,
            received: 0,
            bad: 0,
            first_bad: u64::MAX,
            ticks,
        })
    }

    /// Tells the host that it may forget what an area holds (5.5.6.7).
    pub(crate) fn report(
        &mut self,
        owned: &Owned,
        (offset, len): (u64, u64),
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Outcome, Refusal> {
        if self.reports.is_none() {
            let bit = u64::from(F_REPORTING.trailing_zeros());
            return Err(Refusal::new(ErrorCode::NotOffered, bit));
        }
        if !offset.is_multiple_of(PAGE) || (len != u64::MAX && !len.is_multiple_of(PAGE)) {
            return Err(Refusal::new(ErrorCode::Misaligned, PAGE));
        }
        let begin = cpu::tsc();
        let none = Piece {
            address: core::ptr::null_mut(),
            len: 0,
            writable: true,
        };
        let (mut pieces, mut count, mut units) = ([none; RANGES], 0, 0);
        let mut result = Ok(());
        let bytes = owned.each(offset, len, |address, _, len| {
            for at in (0..len).step_by(RANGE as usize) {
                let piece = (len - at).min(RANGE) as u32;
                pieces[count] = Piece {
                    address: (address + at) as *mut u8,
                    len: piece,
                    writable: true,
                };
                count += 1;
                if count == RANGES && result.is_ok() {
                    result = self.submit(To::Reports, &pieces, halt, interrupts);
                    units += 1;
                }
                count %= RANGES;
            }
        })?;
        result?;
        if count > 0 {
            self.submit(To::Reports, &pieces[..count], halt, interrupts)?;
            units += 1;
        }
        let ticks = cpu::tsc().saturating_sub(begin);
        Ok(Outcome {
            bytes,
            units,
            received: 0,
            bad: 0,
            first_bad: u64::MAX,
            ticks,
        })
    }

    /// Sends a request and waits until the host has done it.
    fn submit(
        &mut self,
        to: To,
        pieces: &[Piece],
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<(), Refusal> {
        if self.broken {
            return Err(Refusal::new(ErrorCode::DeviceBroken, self.given));
        }
        let queue = match to {
            To::Inflate => &mut self.inflate,
            To::Deflate => &mut self.deflate,
            To::Reports => match &mut self.reports {
                Some(queue) => queue,
                None => return Err(Refusal::new(ErrorCode::NotOffered, 5)),
            },
        };
        queue.add(pieces, 0);
        queue.kick(&self.transport);
        let mut patience = Patience::new(halt);
        while queue.take().is_none() {
            self.transport.take_interrupt();
            let broken = queue.broken || self.transport.needs_reset;
            if broken || !patience.wait(interrupts, || queue.arm()) {
                self.transport.fail();
                self.broken = true;
                patience.end(interrupts);
                return Err(Refusal::new(ErrorCode::NoAnswer, self.given));
            }
        }
        queue.disarm();
        patience.end(interrupts);
        Ok(())
    }
}
