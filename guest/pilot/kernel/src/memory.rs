//! RAM: what the pilot owns of it, and the page tables above 4 GiB.

use core::ptr;

use offshoot_protocol::{ErrorCode, Outcome, Refusal, pattern};

use crate::cpu;
use crate::info::BootInfo;

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// Page directories for RAM above 4 GiB: as many GiB as this are used, the rest is left alone.
const DIRECTORIES: usize = 64;

#[repr(C, align(4096))]
struct Table([u64; 512]);

unsafe extern "C" {
    static mut pdpt: Table;
    static image_end: u8;
}
static mut HIGH_DIRECTORIES: [Table; DIRECTORIES] = [const { Table([0; 512]) }; DIRECTORIES];

/// A range of guest physical memory, which is mapped to itself.
#[derive(Clone, Copy)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

impl Region {
    pub(crate) const EMPTY: Self = Self { start: 0, len: 0 };

    fn end(self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// Gives out memory for queues and buffers, from the image's end upwards. It is never given back.
pub(crate) struct Allocator {
    next: u64,
    end: u64,
}

impl Allocator {
    /// Memory for devices: what lies between the image and the end of its RAM range.
    pub(crate) fn new(info: &BootInfo) -> Self {
        // SAFETY: only the symbol's address is taken.
        let next = (&raw const image_end).addr() as u64;
        let home = info.ram.iter().find(|r| r.start <= next && next < r.end());
        Self {
            next,
            end: home.map_or(next, |r| r.end().min(4 * GIB)),
        }
    }

    /// Zeroed pages (RAM is zero at boot) holding at least `len` bytes; `None` when RAM is short.
    pub(crate) fn pages(&mut self, len: usize) -> Option<*mut u8> {
        let len = (len as u64).next_multiple_of(PAGE);
        let start = self.next;
        self.next = start.checked_add(len).filter(|end| *end <= self.end)?;
        Some(start as *mut u8)
    }
}

/// The memory that the pilot owns, in at most as many pieces as the loader lists.
pub(crate) struct Owned {
    regions: [Region; 32],
    len: u64,
}

impl Owned {
    /// All RAM above what `allocator` gave out, without the page at `kept`.
    pub(crate) fn new(info: &BootInfo, allocator: &Allocator, kept: Option<u64>) -> Self {
        let mut this = Self {
            regions: [Region::EMPTY; 32],
            len: 0,
        };
        let floor = allocator.next.next_multiple_of(LARGE);
        let mut used = 0;
        let mut add = |start: u64, end: u64| {
            if start < end && used < this.regions.len() {
                this.regions[used] = Region {
                    start,
                    len: end - start,
                };
                this.len += end - start;
                used += 1;
            }
        };
        for region in info.ram {
            let start = region.start.max(floor).next_multiple_of(PAGE);
            let end = map_high(start, region.end() / PAGE * PAGE);
            match kept
                .map(|page| page / PAGE * PAGE)
                .filter(|page| (start..end).contains(page))
            {
                Some(page) => {
                    add(start, page);
                    add(page + PAGE, end);
                }
                None => add(start, end),
            }
        }
        this
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// An area's end, checked.
    fn end(&self, offset: u64, len: u64) -> Result<u64, Refusal> {
        if !offset.is_multiple_of(8) || (len != u64::MAX && !len.is_multiple_of(8)) {
            return Err(Refusal::new(ErrorCode::Misaligned, 8));
        }
        let out_of_range = Refusal::new(ErrorCode::OutOfRange, self.len);
        match len {
            u64::MAX if offset <= self.len => Ok(self.len),
            _ => offset
                .checked_add(len)
                .filter(|end| *end <= self.len)
                .ok_or(out_of_range),
        }
    }

    /// Takes the last `len` bytes, a multiple of the page size, out.
    pub(crate) fn shrink(&mut self, len: u64) {
        self.len -= len.min(self.len);
    }

    /// Puts back what `shrink` took last.
    pub(crate) fn grow(&mut self, len: u64) {
        let all = self.regions.iter().map(|region| region.len).sum();
        self.len = (self.len + len).min(all);
    }

    /// The address of the byte at `offset`; 0 outside.
    pub(crate) fn address(&self, offset: u64) -> u64 {
        let mut base = 0;
        for region in &self.regions {
            if offset - base < region.len {
                return region.start + (offset - base);
            }
            base += region.len;
        }
        0
    }

    /// Calls `work` with the address, offset and length of each piece of an area.
    pub(crate) fn each(
        &self,
        offset: u64,
        len: u64,
        mut work: impl FnMut(u64, u64, u64),
    ) -> Result<u64, Refusal> {
        let end = self.end(offset, len)?;
        let mut base = 0;
        for region in self.regions.iter().take_while(|r| r.len > 0) {
            let from = offset.max(base);
            let to = end.min(base + region.len);
            if from < to {
                work(region.start + (from - base), from, to - from);
            }
            base += region.len;
        }
        Ok(end - offset)
    }

    /// Fills an area with the pattern of `seed`.
    pub(crate) fn fill(&self, offset: u64, len: u64, seed: u64) -> Result<Outcome, Refusal> {
        let begin = cpu::tsc();
        let bytes = self.each(offset, len, |address, place, len| {
            for at in (0..len).step_by(8) {
                // SAFETY: owned RAM that nothing in Rust refers to.
                unsafe { ((address + at) as *mut u64).write(pattern::word(seed, place + at)) };
            }
        })?;
        Ok(outcome(bytes, bytes.div_ceil(PAGE), 0, u64::MAX, begin))
    }

    /// Compares an area with the pattern of `seed`.
    pub(crate) fn verify(&self, offset: u64, len: u64, seed: u64) -> Result<Outcome, Refusal> {
        let begin = cpu::tsc();
        let (mut bad, mut first) = (0, u64::MAX);
        let bytes = self.each(offset, len, |address, place, len| {
            for at in (0..len).step_by(8) {
                // SAFETY: owned RAM that nothing in Rust refers to.
                let word = unsafe { ((address + at) as *const u64).read() };
                if word != pattern::word(seed, place + at) {
                    bad += 1;
                    first = first.min(place + at);
                }
            }
        })?;
        Ok(outcome(bytes, bytes.div_ceil(PAGE), bad, first, begin))
    }

    /// Rewrites a word of each page of an area with what it holds.
    pub(crate) fn touch(&self, offset: u64, len: u64) -> Result<Outcome, Refusal> {
        let begin = cpu::tsc();
        let mut pages = 0;
        let bytes = self.each(offset, len, |address, _, len| {
            for at in (0..len).step_by(PAGE as usize) {
                let word = (address + at) as *mut u64;
                // SAFETY: owned RAM; volatile, so that the write is not left out.
                unsafe { word.write_volatile(word.read_volatile()) };
                pages += 1;
            }
        })?;
        Ok(outcome(bytes, pages, 0, u64::MAX, begin))
    }
}

fn outcome(bytes: u64, units: u64, bad: u64, first_bad: u64, begin: u64) -> Outcome {
    let ticks = cpu::tsc().saturating_sub(begin);
    Outcome {
        bytes,
        units,
        received: 0,
        bad,
        first_bad,
        ticks,
    }
}

/// Maps what of `start..end` lies above 4 GiB, as far as the tables reach, and returns the end of
/// what is mapped. Entries only ever go from absent to present: no TLB holds the old ones.
fn map_high(start: u64, end: u64) -> u64 {
    let limit = (4 + DIRECTORIES as u64) * GIB;
    let end = end.min(limit);
    if end <= 4 * GIB || start >= end {
        return end;
    }
    for gib in start.max(4 * GIB) / GIB..end.div_ceil(GIB) {
        let index = gib as usize;
        // SAFETY: index - 4 < DIRECTORIES by the limit; only this function writes these tables,
        // from the one thread there is at boot.
        unsafe {
            let directory = &raw mut HIGH_DIRECTORIES[index - 4];
            for page in 0..512 {
                let entry = (gib * GIB + page * LARGE) | 0xe7;
                (&raw mut (*directory).0[page as usize]).write_volatile(entry);
            }
            let slot = &raw mut pdpt.0[index];
            slot.write_volatile(directory.addr() as u64 | 0x67);
        }
    }
    end
}

/// Rewrites pages of an area round and round at a rate.
pub(crate) struct Dirty {
    offset: u64,
    len: u64,
    at: u64,
    /// Pages a second; 0 when not running.
    rate: u64,
    /// Ticks times rate not yet spent on a page.
    credit: u64,
    tsc_khz: u64,
    clock: cpu::Clock,
    /// Pages rewritten since boot.
    pub(crate) pages: u64,
}

impl Dirty {
    pub(crate) fn new() -> Self {
        let clock = cpu::Clock::start();
        Self {
            offset: 0,
            len: 0,
            at: 0,
            rate: 0,
            credit: 0,
            tsc_khz: 0,
            clock,
            pages: 0,
        }
    }

    /// From now on.
    pub(crate) fn set(
        &mut self,
        owned: &Owned,
        (offset, len): (u64, u64),
        rate: u32,
        tsc_khz: u64,
    ) -> Result<(), Refusal> {
        let end = owned.end(offset, len)?;
        (self.offset, self.len, self.at, self.credit) = (offset, end - offset, 0, 0);
        self.rate = if self.len == 0 { 0 } else { u64::from(rate) };
        self.tsc_khz = tsc_khz;
        self.clock = cpu::Clock::start();
        Ok(())
    }

    pub(crate) fn running(&self) -> bool {
        self.rate > 0
    }

    /// Rewrites the pages that are due.
    pub(crate) fn step(&mut self, owned: &Owned) {
        if self.rate == 0 {
            return;
        }
        let cost = self.tsc_khz.max(1) * 1000;
        self.credit = self
            .credit
            .saturating_add(self.clock.step().saturating_mul(self.rate));
        while self.credit >= cost {
            self.credit -= cost;
            let piece = (self.len - self.at).min(PAGE);
            // The area was checked when it was set.
            let _ = owned.touch(self.offset + self.at, piece);
            self.pages += 1;
            self.at = if self.at + piece >= self.len {
                0
            } else {
                self.at + piece
            };
        }
    }
}

/// Copies out of memory that a device may write at any time.
///
/// # Safety
/// `from` is the start of `to.len()` bytes of RAM.
pub(crate) unsafe fn copy_in(to: &mut [u8], from: *const u8) {
    // SAFETY: the caller vouches for `from`; `to` is borrowed mutably and apart from it.
    unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
}

/// Copies into memory that a device reads.
///
/// # Safety
/// `to` is the start of `from.len()` bytes of RAM that nothing in Rust refers to.
pub(crate) unsafe fn copy_out(to: *mut u8, from: &[u8]) {
    // SAFETY: the caller vouches for `to`.
    unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
}
