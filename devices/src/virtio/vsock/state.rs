//! What the device is given and what is saved of it.

use std::path::PathBuf;
use std::time::Duration;

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};

use crate::virtio::SetupError;

/// The CID of a guest: neither one of the reserved ones nor wider than 32 bits (virtio 1.2,
/// 5.10.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct GuestCid(u32);

impl GuestCid {
    /// # Errors
    /// When `cid` is 0, 1, 2, 0xffff_ffff or wider than 32 bits.
    pub fn new(cid: u64) -> Result<Self, SetupError> {
        match u32::try_from(cid) {
            Ok(small) if small > 2 && small != u32::MAX => Ok(Self(small)),
            _ => Err(SetupError::Cid { cid }),
        }
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        u64::from(self.0)
    }
}

impl TryFrom<u64> for GuestCid {
    type Error = SetupError;

    fn try_from(cid: u64) -> Result<Self, SetupError> {
        Self::new(cid)
    }
}

impl From<GuestCid> for u64 {
    fn from(cid: GuestCid) -> Self {
        cid.get()
    }
}

/// The host resources and limits of a vsock device. Nothing of it is ever saved.
#[derive(Debug, Clone)]
pub struct VsockBinding {
    /// Where host programs connect to: they send `CONNECT <port>\n` and read `OK <host port>\n`.
    /// The guest's connections to port `n` of the host go to `<path>_<n>`. At most
    /// [`MAX_PATH`](super::MAX_PATH) bytes.
    pub path: PathBuf,
    /// Whether a socket at `path` that nobody listens on any more is removed. Something that is
    /// in use, or is no socket, is never removed.
    pub replace_stale: bool,
    /// Connections at a time, of both directions; more are refused.
    pub max_connections: usize,
    /// How long a host program may take to send its `CONNECT` line.
    pub greeting_timeout: Duration,
    /// How long the guest may take to answer a connection request, from the `CONNECT` line on.
    pub connect_timeout: Duration,
    /// How long a closed connection may take to deliver its last bytes or to be acknowledged.
    pub linger_timeout: Duration,
    /// After a restore, how long to wait for the guest to handle the transport reset event
    /// before its traffic starts anyhow.
    pub reset_timeout: Duration,
}

impl VsockBinding {
    /// A binding to `path` with the default limits.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            replace_stale: false,
            max_connections: 4096,
            greeting_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(20),
            linger_timeout: Duration::from_secs(8),
            reset_timeout: Duration::from_secs(5),
        }
    }
}

/// What is saved of a vsock device. Connections are not: they end with a reset in the guest that
/// is built from it, and live on in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's CID.
    pub cid: u32,
    /// The last host port given to a connection from the host, 0 for none.
    pub last_host_port: u32,
    /// When a transport reset was sent to the guest and not yet handled by it: the index that the
    /// event queue's available ring has once it is.
    pub reset_goal: Option<u16>,
}

impl Payload for VsockState {
    const KIND: SectionKind = SectionKind(*b"VSCK");
    const VERSION: u16 = 1;
}
