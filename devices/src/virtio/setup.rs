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
