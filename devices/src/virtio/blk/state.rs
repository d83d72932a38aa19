//! A drive's saved state.

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};

use super::BlkError;
use super::config::{BlkLimits, SECTOR, are_valid_queues, is_valid_id, supported_features};

/// A drive's saved state: plain data, untrusted until a drive was restored from it. The queues'
/// state is the transport's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// The drive's id within its machine.
    pub id: String,
    /// The size that the guest knows, in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// What GET_ID answers.
    pub serial: [u8; 20],
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The features offered, without the transport's: what a driver accepted is among them.
    pub features: u64,
    /// How many queues there are.
    pub queues: u16,
    /// The largest size of each queue.
    pub queue_size: u16,
    /// The limits in the configuration space.
    pub limits: BlkLimits,
    /// Whether the driver broke the specification and has not reset the drive since.
    pub needs_reset: bool,
}

impl Payload for BlkState {
    const KIND: SectionKind = SectionKind(*b"vblk");
    const VERSION: u16 = 1;
}

impl BlkState {
    /// Refuses what no drive of this code could have been.
    pub(super) fn check(&self) -> Result<(), BlkError> {
        if !is_valid_id(&self.id) {
            return Err(BlkError::Id);
        }
        if !are_valid_queues(self.queues, self.queue_size) {
            return Err(BlkError::Queues {
                drive: self.id.clone(),
                queues: self.queues,
                size: self.queue_size,
            });
        }
        if self.capacity_sectors.checked_mul(SECTOR).is_none() {
            return Err(BlkError::State("its capacity exceeds 2^64 bytes"));
        }
        let supported = supported_features(self.read_only, usize::from(self.queues));
        if self.features & !supported != 0 {
            return Err(BlkError::State("it offers features that do not exist here"));
        }
        if (self.features ^ supported) & super::feature::RO != 0 {
            return Err(BlkError::State("a read-only drive that does not say so"));
        }
        if !self.limits.are_acceptable(self.queue_size) {
            return Err(BlkError::State("its limits are out of range"));
        }
        Ok(())
    }
}
