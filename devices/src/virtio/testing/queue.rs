//! A split virtqueue as the driver keeps it (virtio 1.2, 2.7).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Address, Bytes, GuestAddress};

use super::TestRam;
use crate::GuestRam;

/// The descriptor goes on in another one (virtio 1.2, 2.7.5 `VIRTQ_DESC_F_NEXT`).
pub const NEXT: u16 = 1;
/// The device writes the buffer (`VIRTQ_DESC_F_WRITE`).
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors (`VIRTQ_DESC_F_INDIRECT`).
pub const INDIRECT: u16 = 4;

const DESCRIPTOR: u64 = 16;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Segment {
    /// A buffer for the device to read.
    #[must_use]
    pub fn readable(addr: GuestAddress, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: false,
        }
    }

    /// A buffer for the device to write.
    #[must_use]
    pub fn writable(addr: GuestAddress, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: true,
        }
    }

    fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// A chain that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// What [`DriverQueue::push`] returned for it.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub len: u32,
}

/// The driver's side of one virtqueue: free descriptors, the chains in flight, both indices.
///
/// Besides the well-behaved calls there are the raw ones ([`set_descriptor`](Self::set_descriptor),
/// [`publish`](Self::publish), [`set_avail_index`](Self::set_avail_index)) for hostile drivers.
#[derive(Debug)]
pub struct DriverQueue {
    memory: Arc<GuestRam>,
    size: u16,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    free: Vec<u16>,
    in_flight: HashMap<u16, Vec<u16>>,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
}

impl DriverQueue {
    /// An empty queue of `size` descriptors in `ram`.
    #[must_use]
    pub fn new(ram: &TestRam, size: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two(), "virtio 1.2, 2.7: a power of two");
        let n = u64::from(size);
        Self {
            memory: Arc::clone(ram.memory()),
            size,
            descriptors: ram.alloc(DESCRIPTOR * n, 16),
            available: ram.alloc(6 + 2 * n, 2),
            used: ram.alloc(6 + 8 * n, 4),
            free: (0..size).rev().collect(),
            in_flight: HashMap::new(),
            next_avail: 0,
            next_used: 0,
            event_idx,
        }
    }

    /// The queue's size in descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Addresses of the descriptor table, the available ring and the used ring.
    #[must_use]
    pub fn addresses(&self) -> [GuestAddress; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// How many descriptors are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain of `segments` available and returns its head.
    pub fn push(&mut self, segments: &[Segment]) -> u16 {
        assert!(!segments.is_empty(), "a chain has a descriptor");
        assert!(segments.len() <= self.free.len(), "the queue is full");
        let taken: Vec<u16> = segments
            .iter()
            .map(|_| self.free.pop().expect("counted above"))
            .collect();
        for (i, segment) in segments.iter().enumerate() {
            let (more, next) = taken.get(i + 1).map_or((0, 0), |next| (NEXT, *next));
            self.set_descriptor(
                taken[i],
                segment.addr,
                segment.len,
                segment.flags() | more,
                next,
            );
        }
        self.publish_chain(taken)
    }

    /// The same through a table of indirect descriptors in `ram` (virtio 1.2, 2.7.5.3).
    pub fn push_indirect(&mut self, ram: &TestRam, segments: &[Segment]) -> u16 {
        assert!(!segments.is_empty(), "a chain has a descriptor");
        let len = DESCRIPTOR * segments.len() as u64;
        let table = ram.alloc(len, 16);
        for (i, segment) in segments.iter().enumerate() {
            let last = i + 1 == segments.len();
            let next = if last {
                0
            } else {
                u16::try_from(i + 1).expect("a table")
            };
            let flags = segment.flags() | if last { 0 } else { NEXT };
            write_descriptor(
                &self.memory,
                table,
                i as u64,
                segment.addr,
                segment.len,
                flags,
                next,
            );
        }
        let head = self.free.pop().expect("the queue is full");
        self.set_descriptor(
            head,
            table,
            u32::try_from(len).expect("a table"),
            INDIRECT,
            0,
        );
        self.publish_chain(vec![head])
    }

    /// The next chain that the device has used, its descriptors free again.
    ///
    /// With `EVENT_IDX` the device is asked to interrupt for the very next one.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.used_index() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let element = self.used.unchecked_add(4 + 8 * slot);
        let id: u32 = self.memory.read_obj(element).expect("the used ring");
        let len: u32 = self
            .memory
            .read_obj(element.unchecked_add(4))
            .expect("the used ring");
        self.next_used = self.next_used.wrapping_add(1);
        self.set_used_event(self.next_used);
        let head = u16::try_from(id).expect("the device used an id that is no head");
        let taken = self
            .in_flight
            .remove(&head)
            .expect("the device used a chain that was not in flight");
        self.free.extend(taken.into_iter().rev());
        Some(Used { head, len })
    }

    /// The used ring's index as the device wrote it.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        let index = self
            .memory
            .load(self.used.unchecked_add(2), Ordering::Acquire)
            .expect("the used ring");
        u16::from_le(index)
    }

    /// Whether the device wants to be notified of what was made available since index `old`
    /// (virtio 1.2, 2.7.10).
    #[must_use]
    pub fn should_notify(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used.unchecked_add(4 + 8 * u64::from(self.size));
            let event: u16 = self.memory.read_obj(event).expect("the used ring");
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old)
        } else {
            let flags: u16 = self.memory.read_obj(self.used).expect("the used ring");
            flags & 1 == 0
        }
    }

    /// The available ring's index as the driver counts it.
    #[must_use]
    pub fn avail_index(&self) -> u16 {
        self.next_avail
    }

    /// Asks for an interrupt once used index `at` is passed; only with `EVENT_IDX`.
    pub fn set_used_event(&mut self, at: u16) {
        if self.event_idx {
            let event = self.available.unchecked_add(4 + 2 * u64::from(self.size));
            self.memory
                .write_obj(at, event)
                .expect("the available ring");
            fence(Ordering::SeqCst);
        }
    }

    /// Writes descriptor `index` as it is said.
    pub fn set_descriptor(&self, index: u16, addr: GuestAddress, len: u32, flags: u16, next: u16) {
        write_descriptor(
            &self.memory,
            self.descriptors,
            index.into(),
            addr,
            len,
            flags,
            next,
        );
    }

    /// Makes whatever starts at descriptor `head` available, without accounting: nothing like it may
    /// be popped.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.memory
            .write_obj(head, self.available.unchecked_add(4 + 2 * slot))
            .expect("the available ring");
        self.set_avail_index(self.next_avail.wrapping_add(1));
    }

    /// Sets the available ring's index, to whatever it is.
    pub fn set_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        self.memory
            .store(index, self.available.unchecked_add(2), Ordering::Release)
            .expect("the available ring");
    }

    fn publish_chain(&mut self, taken: Vec<u16>) -> u16 {
        let head = taken[0];
        self.in_flight.insert(head, taken);
        self.publish(head);
        head
    }
}

fn write_descriptor(
    memory: &GuestRam,
    table: GuestAddress,
    index: u64,
    addr: GuestAddress,
    len: u32,
    flags: u16,
    next: u16,
) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory
        .write_slice(&bytes, table.unchecked_add(DESCRIPTOR * index))
        .expect("a descriptor table");
}
