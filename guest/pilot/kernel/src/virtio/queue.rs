//! A split virtqueue from the driver's side (virtio 1.2, 2.7), with event indexes and indirect
//! descriptors where the device takes them.

use core::sync::atomic::{Ordering, fence};

use crate::memory::Allocator;
use crate::virtio::mmio::{EVENT_IDX, INDIRECT, Transport};

/// Descriptors in a queue.
pub(crate) const SIZE: u16 = 64;
/// The most pieces of one buffer.
const MAX_PIECES: usize = 4;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

// Where the parts lie in the queue's first page. The indirect tables, one for each descriptor,
// fill the second.
const AVAILABLE: usize = 16 * SIZE as usize;
const USED: usize = 2048;
const PAGES: usize = 8192;
const TABLES: usize = 4096;
const TABLE: usize = 16 * MAX_PIECES;
const NONE: u16 = u16::MAX;

/// A piece of a buffer.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) address: *mut u8,
    pub(crate) len: u32,
    /// Whether the device writes it.
    pub(crate) writable: bool,
}

/// What the device gave back.
#[derive(Clone, Copy)]
pub(crate) struct Done {
    /// What `add` was called with.
    pub(crate) token: u16,
    /// Bytes that the device wrote.
    pub(crate) len: u32,
}

/// A queue.
pub(crate) struct Queue {
    index: u16,
    memory: *mut u8,
    event_idx: bool,
    indirect: bool,
    /// First free descriptor; the rest are linked by `next`.
    free: u16,
    free_count: u16,
    next: [u16; SIZE as usize],
    tokens: [u16; SIZE as usize],
    available: u16,
    notified: u16,
    seen: u16,
    /// The device gave back what it did not have.
    pub(crate) broken: bool,
}

impl Queue {
    pub(crate) fn new(index: u16, features: u64, allocator: &mut Allocator) -> Option<Self> {
        let mut next = [NONE; SIZE as usize];
        for (slot, following) in next.iter_mut().zip(1..SIZE) {
            *slot = following;
        }
        Some(Self {
            index,
            memory: allocator.pages(PAGES)?,
            event_idx: features & EVENT_IDX != 0,
            indirect: features & INDIRECT != 0,
            free: 0,
            free_count: SIZE,
            next,
            tokens: [NONE; SIZE as usize],
            available: 0,
            notified: 0,
            seen: 0,
            broken: false,
        })
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.memory.addr() as u64
    }

    pub(crate) fn available(&self) -> u64 {
        self.descriptors() + AVAILABLE as u64
    }

    pub(crate) fn used(&self) -> u64 {
        self.descriptors() + USED as u64
    }

    fn put<T>(&self, offset: usize, value: T) {
        // SAFETY: every offset in this file lies inside the queue's two pages and is aligned for
        // its type; Rust holds no reference into them.
        unsafe { self.memory.add(offset).cast::<T>().write_volatile(value) }
    }

    fn get<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: as for `put`.
        unsafe { self.memory.add(offset).cast::<T>().read_volatile() }
    }

    fn descriptor(&self, at: usize, piece: Piece, flags: u16, next: u16) {
        let flags = flags | if piece.writable { F_WRITE } else { 0 };
        self.put(at, piece.address.addr() as u64);
        self.put(at + 8, piece.len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// How many buffers of `pieces` pieces can be added now.
    pub(crate) fn room(&self, pieces: usize) -> usize {
        let each = if self.indirect { 1 } else { pieces.max(1) };
        usize::from(self.free_count) / each
    }

    /// Adds a buffer, 1 to 4 pieces, device-readable ones first; false when there is no room. The
    /// device learns of it by [`Queue::kick`].
    pub(crate) fn add(&mut self, pieces: &[Piece], token: u16) -> bool {
        debug_assert!((1..=MAX_PIECES).contains(&pieces.len()));
        if self.broken || self.room(pieces.len()) == 0 {
            return false;
        }
        let head = self.free;
        if let ([first, _, ..], true) = (pieces, self.indirect) {
            let table = TABLES + usize::from(head) * TABLE;
            for (i, piece) in pieces.iter().enumerate() {
                let last = i + 1 == pieces.len();
                let flags = if last { 0 } else { F_NEXT };
                self.descriptor(table + 16 * i, *piece, flags, i as u16 + 1);
            }
            let whole = Piece {
                address: self.memory.wrapping_add(table),
                len: 16 * pieces.len() as u32,
                writable: false,
            };
            let _ = first;
            self.descriptor(16 * usize::from(head), whole, F_INDIRECT, 0);
            self.free = self.next[usize::from(head)];
            self.next[usize::from(head)] = NONE;
            self.free_count -= 1;
        } else {
            let mut at = head;
            for (i, piece) in pieces.iter().enumerate() {
                let following = self.next[usize::from(at)];
                let last = i + 1 == pieces.len();
                let flags = if last { 0 } else { F_NEXT };
                self.descriptor(
                    16 * usize::from(at),
                    *piece,
                    flags,
                    if last { 0 } else { following },
                );
                if last {
                    self.next[usize::from(at)] = NONE;
                    self.free = following;
                }
                at = following;
            }
            self.free_count -= pieces.len() as u16;
        }
        self.tokens[usize::from(head)] = token;
        let slot = usize::from(self.available % SIZE);
        self.put(AVAILABLE + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        // The entry before the index that shows it (2.7.13.2).
        fence(Ordering::Release);
        self.put(AVAILABLE + 2, self.available);
        true
    }

    /// Notifies the device of what was added since the last time, unless it does not want that
    /// (2.7.13.4).
    pub(crate) fn kick(&mut self, transport: &Transport) {
        if self.notified == self.available {
            return;
        }
        // The index before the question whether the device looks by itself.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.get(USED + 4 + 8 * usize::from(SIZE));
            let added = self.available.wrapping_sub(self.notified);
            self.available.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.get::<u16>(USED) & NO_NOTIFY == 0
        };
        self.notified = self.available;
        if wanted {
            transport.notify(self.index);
        }
    }

    /// Whether the device has given something back.
    pub(crate) fn ready(&self) -> bool {
        !self.broken && self.get::<u16>(USED + 2) != self.seen
    }

    /// Takes back a buffer.
    pub(crate) fn take(&mut self) -> Option<Done> {
        if !self.ready() {
            return None;
        }
        // The index before the entry that it shows.
        fence(Ordering::Acquire);
        let slot = usize::from(self.seen % SIZE);
        let head: u32 = self.get(USED + 4 + 8 * slot);
        let len: u32 = self.get(USED + 8 + 8 * slot);
        self.seen = self.seen.wrapping_add(1);
        let token = match self.tokens.get_mut(head as usize) {
            Some(token) if *token != NONE => core::mem::replace(token, NONE),
            _ => {
                self.broken = true;
                return None;
            }
        };
        // Back to the free list, the whole chain.
        let mut last = head as u16;
        let mut count = 1;
        while self.get::<u16>(16 * usize::from(last) + 12) & F_NEXT != 0
            && count < MAX_PIECES as u16
        {
            last = self.get::<u16>(16 * usize::from(last) + 14) % SIZE;
            count += 1;
        }
        let mut at = head as u16;
        for _ in 1..count {
            let following = self.get::<u16>(16 * usize::from(at) + 14) % SIZE;
            self.next[usize::from(at)] = following;
            at = following;
        }
        self.next[usize::from(last)] = self.free;
        self.free = head as u16;
        self.free_count += count;
        Some(Done { token, len })
    }

    /// Asks for an interrupt with the next buffer that comes back; true when one has already.
    pub(crate) fn arm(&mut self) -> bool {
        if self.event_idx {
            self.put(AVAILABLE + 4 + 2 * usize::from(SIZE), self.seen);
        } else {
            self.put(AVAILABLE, 0u16);
        }
        fence(Ordering::SeqCst);
        self.ready()
    }

    /// Asks for no interrupts.
    pub(crate) fn disarm(&mut self) {
        if self.event_idx {
            // The index just passed: the device comes to it again after 65535 more buffers.
            self.put(
                AVAILABLE + 4 + 2 * usize::from(SIZE),
                self.seen.wrapping_sub(1),
            );
        } else {
            self.put(AVAILABLE, NO_INTERRUPT);
        }
    }
}
