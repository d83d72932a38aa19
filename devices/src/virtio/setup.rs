//! Why a virtio device cannot be built.

use std::io;
use std::path::PathBuf;

/// Why a virtio device cannot be built from what it was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// A socket's path does not fit into a socket address.
    #[error(
        "the socket path {path:?} is too long: at most {max} bytes are possible here; \
         use a shorter directory"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The most bytes that it may have.
        max: usize,
    },
    /// Somebody listens on the socket's path.
    #[error("the socket path {path:?} is in use by a running process; choose another one")]
    PathInUse {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens on the socket's path any more, and removing it was not asked for.
    #[error(
        "the socket path {path:?} was left behind by a process that is gone; \
         remove it or allow stale sockets to be replaced"
    )]
    PathStale {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket is at the path.
    #[error("{path:?} exists and is not a socket; choose another path")]
    PathNotSocket {
        /// The path.
        path: PathBuf,
    },
    /// The context identifier is reserved or too large (virtio 1.2, 5.10.4).
    #[error("{cid} cannot be a guest's CID: choose one from 3 to 4294967294")]
    Cid {
        /// The CID.
        cid: u64,
    },
    /// Saved state holds a value that no device has written.
    #[error("the saved {device} state is not valid: {what}")]
    State {
        /// The device.
        device: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// There is no network interface of this name.
    #[error("there is no tap interface {name:?}; create it first (ip tuntap add mode tap {name})")]
    NoSuchTap {
        /// The name.
        name: String,
    },
    /// The interface has a user already.
    #[error("the tap interface {name:?} is in use by another process")]
    TapBusy {
        /// The name.
        name: String,
    },
    /// It is no tap interface, or one of another kind.
    #[error("{name} is not a tap interface with a single queue")]
    NotATap {
        /// The name.
        name: String,
    },
    /// The name cannot be one of an interface.
    #[error("{name:?} cannot be the name of an interface: 1 to 15 bytes without '%'")]
    TapName {
        /// The name.
        name: String,
    },
    /// The Ethernet address is not one of a station.
    #[error("{bytes:02x?} cannot be a card's Ethernet address: it is a group address or zero")]
    Mac {
        /// The address.
        bytes: [u8; 6],
    },
    /// The MTU cannot be announced.
    #[error("an MTU of {mtu} is too small: 68 is the least")]
    Mtu {
        /// The MTU.
        mtu: u16,
    },
    /// The guest uses an offload that the new peer does not have.
    #[error(
        "the saved guest uses {feature}, which its new network peer does not have; \
         connect it to a tap interface"
    )]
    MissingOffload {
        /// The virtio feature.
        feature: &'static str,
    },
    /// The host refused something.
    #[error("{context}")]
    Host {
        /// What was being done.
        context: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl SetupError {
    pub(crate) fn host(context: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { context, source }
    }
}
