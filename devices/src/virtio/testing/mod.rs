//! The guest's side, for tests and fuzz targets: guest memory, virtqueues as a driver keeps them,
//! and a driver that brings a device up through its MMIO transport.
//!
//! `virtio_queue::mock` is not used: its rings neither wrap nor have room for the `EVENT_IDX` fields.
//! Everything here panics when it is used wrongly, as tests do.

mod driver;
mod queue;

pub use driver::Driver;
pub use queue::{DriverQueue, INDIRECT, NEXT, Segment, Used, WRITE};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestRam;

/// An eventfd, where an interrupt line or the like is wanted.
///
/// # Panics
/// When there are no file descriptors left.
#[must_use]
pub fn event() -> Arc<EventFd> {
    Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"))
}

/// Guest memory with an allocator that only goes up, as simple as a test's driver needs it.
#[derive(Debug)]
pub struct TestRam {
    memory: Arc<GuestRam>,
    next: AtomicU64,
    end: u64,
}

impl TestRam {
    /// `size` bytes of zeroed RAM from address 0. The first page is never handed out.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), size)]).expect("guest memory");
        Self::over(Arc::new(memory), 0x1000, size as u64)
    }

    /// An allocator over `start..end` of `memory`, which may be used already.
    #[must_use]
    pub fn over(memory: Arc<GuestRam>, start: u64, end: u64) -> Self {
        Self {
            memory,
            next: AtomicU64::new(start),
            end,
        }
    }

    /// The memory itself.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// `len` bytes at a multiple of `align`, a power of two.
    pub fn alloc(&self, len: u64, align: u64) -> GuestAddress {
        let start = self.next.load(Ordering::Relaxed).next_multiple_of(align);
        let end = start + len;
        assert!(end <= self.end, "the test needs more guest memory");
        self.next.store(end, Ordering::Relaxed);
        GuestAddress(start)
    }

    /// A copy of `bytes` in guest memory, for the device to read.
    pub fn readable(&self, bytes: &[u8]) -> Segment {
        let addr = self.alloc(bytes.len() as u64, 16);
        self.memory.write_slice(bytes, addr).expect("guest memory");
        Segment::readable(addr, u32::try_from(bytes.len()).expect("a segment"))
    }

    /// `len` zeroed bytes for the device to write.
    pub fn writable(&self, len: u32) -> Segment {
        Segment::writable(self.alloc(len.into(), 16), len)
    }

    /// What a segment holds.
    #[must_use]
    pub fn read(&self, segment: &Segment) -> Vec<u8> {
        let mut bytes = vec![0; segment.len as usize];
        self.memory
            .read_slice(&mut bytes, segment.addr)
            .expect("guest memory");
        bytes
    }
}
