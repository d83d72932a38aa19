//! From what the driver lists to few ranges of guest RAM.

use std::fmt::Debug;
use std::io;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::GuestRam;

/// The balloon's page: 4096 bytes, whatever the guest's or the host's is (virtio 1.2, 5.5.6).
pub const PAGE_SIZE: u64 = 4096;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// Its first address.
    pub start: GuestAddress,
    /// Its length in bytes.
    pub len: u64,
}

/// Gives memory that the guest does not use back to the host. The machine brings it, for it knows
/// how guest RAM is mapped.
pub trait PageReclaim: Send + Debug {
    /// Gives `range` back. It is not empty, its ends are multiples of [`PAGE_SIZE`] and it lies in
    /// one region of guest RAM. The guest counts on nothing that was in it, and may use it again
    /// without a word: it then finds zeros or what the memory was mapped from. Called by the device
    /// loop with the device's lock held.
    ///
    /// # Errors
    /// When the host cannot; the device goes on, for the guest is none the worse.
    fn reclaim(&self, range: GuestRange) -> io::Result<()>;
}

/// The ranges of RAM that the pages of these numbers make: sorted, merged, without what is not RAM.
pub(super) fn of_frames(
    memory: &GuestRam,
    frames: &mut Vec<u32>,
    mut sink: impl FnMut(GuestRange),
) {
    frames.sort_unstable();
    frames.dedup();
    let consecutive = |a: &u32, b: &u32| a.checked_add(1) == Some(*b);
    for run in frames.chunk_by(consecutive) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            // A frame number has 32 bits: neither product nor sum overflows.
            let start = u64::from(*first).saturating_mul(PAGE_SIZE);
            let end = u64::from(*last).saturating_add(1).saturating_mul(PAGE_SIZE);
            of_bytes(memory, start, end, &mut sink);
        }
    }
}

/// The whole pages of RAM in `start..end`, one range for each region.
pub(super) fn of_bytes(memory: &GuestRam, start: u64, end: u64, mut sink: impl FnMut(GuestRange)) {
    for region in memory.iter() {
        let from = region.start_addr().raw_value();
        let to = from.saturating_add(region.len());
        let Some(start) = start.max(from).checked_next_multiple_of(PAGE_SIZE) else {
            continue;
        };
        let end = end.min(to) & !(PAGE_SIZE - 1);
        if let Some(len) = end.checked_sub(start).filter(|len| *len > 0) {
            let start = GuestAddress(start);
            sink(GuestRange { start, len });
        }
    }
}
