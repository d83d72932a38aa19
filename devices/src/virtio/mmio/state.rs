//! The transport's saved state.

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

/// One queue's registers and indices, as `virtio_queue::QueueState` has them (which cannot be
/// serialised).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// The largest size that the device offers, in descriptors.
    pub max_size: u16,
    /// The size that the driver chose; 0 when it chose an impossible one.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Whether `VIRTIO_F_RING_EVENT_IDX` was agreed on.
    pub event_idx: bool,
    /// The next index of the available ring that the device will look at.
    pub next_avail: u16,
    /// The next index of the used ring that the device will fill.
    pub next_used: u16,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest physical address of the available ring.
    pub available_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}

impl From<&QueueState> for SavedQueue {
    fn from(q: &QueueState) -> Self {
        Self {
            max_size: q.max_size,
            size: q.size,
            ready: q.ready,
            event_idx: q.event_idx_enabled,
            next_avail: q.next_avail,
            next_used: q.next_used,
            descriptor_table: q.desc_table,
            available_ring: q.avail_ring,
            used_ring: q.used_ring,
        }
    }
}

impl From<&SavedQueue> for QueueState {
    fn from(q: &SavedQueue) -> Self {
        Self {
            max_size: q.max_size,
            next_avail: q.next_avail,
            next_used: q.next_used,
            event_idx_enabled: q.event_idx,
            size: q.size,
            ready: q.ready,
            desc_table: q.descriptor_table,
            avail_ring: q.available_ring,
            used_ring: q.used_ring,
        }
    }
}

/// A virtio-mmio transport's registers, taken while its device was quiesced. Untrusted plain data:
/// [`MmioTransport::restore`](super::MmioTransport::restore) is the only way back in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The virtio device id of the device behind the transport.
    pub device_type: u32,
    /// The device status.
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// The features that the driver has written.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<SavedQueue>,
}

impl Payload for TransportState {
    const KIND: SectionKind = SectionKind(*b"vmio");
    const VERSION: u16 = 1;
}
