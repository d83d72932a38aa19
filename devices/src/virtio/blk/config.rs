//! What a drive is configured with, and what its configuration space shows to the driver
//! (virtio 1.2, 5.2.3 and 5.2.4).
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::Arc;

use offshoot_storage::Volume;
use serde::{Deserialize, Serialize};

use super::engine::EngineChoice;

/// Bytes in a sector, the unit of capacity and requests (virtio 1.2, 5.2).
pub(super) const SECTOR: u64 = 512;
/// The most queues a drive may have.
pub(super) const MAX_QUEUES: u16 = 16;
/// The smallest queue: room for a header, a status and some data.
pub(super) const MIN_QUEUE_SIZE: u16 = 8;
/// The largest queue.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;
/// The most data in one IN or OUT request. A driver that keeps to `size_max` and `seg_max` of a
/// queue of 256 stays below it.
pub(super) const MAX_REQUEST_BYTES: u64 = 32 << 20;

/// Feature bits of block devices (virtio 1.2, 5.2.3).
pub mod feature {
    /// `size_max` is valid.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The device has a cache that FLUSH empties.
    pub const FLUSH: u64 = 1 << 9;
    /// `topology` is valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << 12;
    /// DISCARD works.
    pub const DISCARD: u64 = 1 << 13;
    /// WRITE_ZEROES works.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// The bits that belong to device types; the others are the transport's (virtio 1.2, 2.2).
    pub(in super::super) const OF_DEVICE_TYPE: u64 = 0x00ff_ffff | !0 << 50;
    /// Notifications are suppressed by index (virtio 1.2, 6); offered by the transport.
    pub(in super::super) const RING_EVENT_IDX: u64 = 1 << 29;
}

/// The features that this code can offer for such a drive.
pub(super) fn supported_features(read_only: bool, queues: usize) -> u64 {
    let mut features = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY;
    features |= if read_only {
        feature::RO
    } else {
        feature::DISCARD | feature::WRITE_ZEROES
    };
    if queues > 1 {
        features |= feature::MQ;
    }
    features
}

/// How a drive looks to its guest. It is the same in every copy of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkConfig {
    /// The drive's id within its machine: 1 to 64 of the characters a-z A-Z 0-9 . _ -
    pub id: String,
    /// What GET_ID answers: at most 20 bytes, padded with zero bytes.
    pub serial: [u8; 20],
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How many request queues there are, 1 to 16.
    pub queues: u16,
    /// Entries in each queue: a power of two from 8 to 1024.
    pub queue_size: u16,
}

impl BlkConfig {
    /// A writable drive with one queue of 256 entries, whose serial is its id (as much of it as
    /// fits).
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        let id = id.into();
        let mut serial = [0; 20];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            id,
            serial,
            read_only: false,
            queues: 1,
            queue_size: 256,
        }
    }
}

/// What a drive takes from its host. None of it is in saved state.
#[derive(Debug, Clone)]
pub struct BlkHost {
    /// The volume behind the drive.
    pub volume: Arc<dyn Volume>,
    /// How its I/O is done.
    pub engine: EngineChoice,
    /// The most worker threads, 1 to 16; they are started as they are needed.
    pub threads: usize,
}

impl BlkHost {
    /// `volume` with an engine chosen for it and up to four threads.
    #[must_use]
    pub fn new(volume: Arc<dyn Volume>) -> Self {
        Self {
            volume,
            engine: EngineChoice::Auto,
            threads: 4,
        }
    }
}

/// The limits that a driver reads once when it starts, so that they stay with a machine
/// (virtio 1.2, 5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkLimits {
    /// The most bytes in one segment.
    pub size_max: u32,
    /// The most segments in one request.
    pub seg_max: u32,
    /// The most sectors in one discard segment.
    pub max_discard_sectors: u32,
    /// The most discard segments in one request.
    pub max_discard_seg: u32,
    /// Discards should start and end on multiples of so many sectors.
    pub discard_sector_alignment: u32,
    /// The most sectors in one write-zeroes segment.
    pub max_write_zeroes_sectors: u32,
    /// The most write-zeroes segments in one request.
    pub max_write_zeroes_seg: u32,
}

impl BlkLimits {
    /// The limits of a new drive. Two entries of a queue are for a request's header and status.
    pub(super) fn for_queue_size(queue_size: u16) -> Self {
        Self {
            size_max: 128 << 10,
            seg_max: u32::from(queue_size).saturating_sub(2).min(254),
            max_discard_sectors: 1 << 21,
            max_discard_seg: 16,
            discard_sector_alignment: 8,
            max_write_zeroes_sectors: 1 << 17,
            max_write_zeroes_seg: 4,
        }
    }

    /// Whether this code can keep these limits: each is bounded, none is zero.
    pub(super) fn are_acceptable(&self, queue_size: u16) -> bool {
        let within = |value: u32, most: u32| (1..=most).contains(&value);
        within(self.size_max, 1 << 25)
            && within(self.seg_max, u32::from(queue_size))
            && within(self.max_discard_sectors, 1 << 23)
            && within(self.max_discard_seg, 256)
            && within(self.discard_sector_alignment, 1 << 16)
            && within(self.max_write_zeroes_sectors, 1 << 21)
            && within(self.max_write_zeroes_seg, 256)
    }
}

/// Size of `struct virtio_blk_config` up to what our features make valid (virtio 1.2, 5.2.4).
const CONFIG_SIZE: usize = 60;

/// The configuration space, made once; nothing in it is writable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConfigSpace([u8; CONFIG_SIZE]);

impl ConfigSpace {
    pub(super) fn new(capacity_sectors: u64, queues: u16, limits: &BlkLimits) -> Self {
        let fields: [&[u8]; 17] = [
            &capacity_sectors.to_le_bytes(),                // 0: capacity
            &limits.size_max.to_le_bytes(),                 // 8: size_max
            &limits.seg_max.to_le_bytes(),                  // 12: seg_max
            &[0; 4],                                        // 16: geometry, not offered
            &512_u32.to_le_bytes(),                         // 20: blk_size
            &[3],                                           // 24: physical_block_exp: 4 KiB
            &[0],                                           // 25: alignment_offset
            &8_u16.to_le_bytes(),                           // 26: min_io_size in blocks
            &0_u32.to_le_bytes(),                           // 28: opt_io_size, none
            &[0, 0],               // 32: writeback, not offered; 33: unused
            &queues.to_le_bytes(), // 34: num_queues
            &limits.max_discard_sectors.to_le_bytes(), // 36
            &limits.max_discard_seg.to_le_bytes(), // 40
            &limits.discard_sector_alignment.to_le_bytes(), // 44
            &limits.max_write_zeroes_sectors.to_le_bytes(), // 48
            &limits.max_write_zeroes_seg.to_le_bytes(), // 52
            &[1, 0, 0, 0],         // 56: write_zeroes_may_unmap; 57: unused
        ];
        let mut bytes = [0; CONFIG_SIZE];
        for (to, from) in bytes.iter_mut().zip(fields.concat()) {
            *to = from;
        }
        Self(bytes)
    }

    /// Copies from `offset` on; bytes outside read as zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|o| self.0.get(o..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }
}

/// Whether `id` may name a drive.
pub(super) fn is_valid_id(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Whether a drive may have such queues.
pub(super) fn are_valid_queues(queues: u16, queue_size: u16) -> bool {
    (1..=MAX_QUEUES).contains(&queues)
        && (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size)
        && queue_size.is_power_of_two()
}
