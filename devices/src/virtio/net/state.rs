//! What the device is given and what is saved of it.

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};

use crate::virtio::SetupError;

/// An Ethernet address of a station: not a group address, not all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mac([u8; 6]);

impl Mac {
    /// # Errors
    /// When it is a group address (lowest bit of the first byte) or all zeros.
    pub fn new(bytes: [u8; 6]) -> Result<Self, SetupError> {
        let mac = Self(bytes);
        if mac.is_valid() {
            Ok(mac)
        } else {
            Err(SetupError::Mac { bytes })
        }
    }

    /// The address.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    pub(super) fn is_valid(self) -> bool {
        let [first, ..] = self.0;
        first & 1 == 0 && self.0 != [0; 6]
    }
}

/// A network device's own configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// The guest's Ethernet address.
    pub mac: Mac,
    /// The largest packet behind the Ethernet header that the network takes, told to the guest
    /// when given: 68 to 65535 bytes (virtio 1.2, 5.1.4.1).
    pub mtu: Option<u16>,
}

/// The smallest MTU that can be announced (virtio 1.2, 5.1.4.1).
const MIN_MTU: u16 = 68;

impl NetConfig {
    pub(super) fn check(&self) -> Result<(), SetupError> {
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => Err(SetupError::Mtu { mtu }),
            _ => Ok(()),
        }
    }
}

/// What is saved of a network device. Frames in the host's buffers are not, as a network may
/// lose them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The Ethernet address.
    pub mac: Mac,
    /// The announced MTU.
    pub mtu: Option<u16>,
    /// The offloads that were offered.
    pub offered_offloads: u64,
    /// The features that the driver took, when it had.
    pub negotiated: Option<u64>,
    /// Whether the link was up.
    pub link_up: bool,
}

impl Payload for NetState {
    const KIND: SectionKind = SectionKind(*b"VNET");
    const VERSION: u16 = 1;
}
