//! The memory map that the guest is given, the same for both protocols.

use offshoot_devices::GuestRam;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::layout;

/// E820 type of RAM.
pub(super) const RAM: u32 = 1;
/// E820 type of what the guest must leave alone.
pub(super) const RESERVED: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) kind: u32,
}

/// RAM as it is, but for the part of the first megabyte that a PC keeps for itself: there lie
/// the ACPI tables and the generation id.
pub(super) fn entries(memory: &GuestRam) -> Vec<Entry> {
    let low_end = layout::LOW_RAM_END.raw_value();
    let high = layout::HIGH_MEMORY.raw_value();
    let mut map = vec![
        Entry {
            start: 0,
            len: low_end,
            kind: RAM,
        },
        Entry {
            start: low_end,
            len: high - low_end,
            kind: RESERVED,
        },
    ];
    for region in memory.iter() {
        let (start, end) = (
            region.start_addr().raw_value(),
            region.last_addr().raw_value() + 1,
        );
        let start = start.max(high);
        if end > start {
            map.push(Entry {
                start,
                len: end - start,
                kind: RAM,
            });
        }
    }
    map
}
