//! Why a drive cannot be built.

use std::io;

use crate::{Error, ErrorKind};

use super::config::{MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE};

/// Why a drive cannot be built from its configuration or from its saved state: the source of the
/// [`Error`] that says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// The drive's id cannot be used.
    #[error("a drive's id is 1 to 64 of the characters a-z A-Z 0-9 . _ -")]
    Id,
    /// A drive cannot have these queues.
    #[error(
        "drive {drive} cannot have {queues} queues of {size}: it takes 1 to {MAX_QUEUES} queues of \
         {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE} entries, a power of two"
    )]
    Queues {
        /// The drive's id.
        drive: String,
        /// How many queues were asked for.
        queues: u16,
        /// Their size.
        size: u16,
    },
    /// The number of worker threads is out of range.
    #[error("drive {drive} cannot have {threads} worker threads: it takes 1 to 16")]
    Threads {
        /// The drive's id.
        drive: String,
        /// How many were asked for.
        threads: usize,
    },
    /// A volume's size is not a whole number of sectors.
    #[error("volume {volume} has {size} bytes, which is not a whole number of 512-byte sectors")]
    Unaligned {
        /// The volume's name.
        volume: String,
        /// Its size in bytes.
        size: u64,
    },
    /// The drive is writable and its volume is not.
    #[error("drive {drive} is writable but volume {volume} is open for reading only")]
    ReadOnlyVolume {
        /// The drive's id.
        drive: String,
        /// The volume's name.
        volume: String,
    },
    /// The volume is not of the size that the guest knows.
    #[error(
        "drive {drive} was saved with a disk of {saved} bytes, but volume {volume} has {found} bytes"
    )]
    SizeMismatch {
        /// The drive's id.
        drive: String,
        /// The saved size in bytes.
        saved: u64,
        /// The volume's name.
        volume: String,
        /// The volume's size in bytes.
        found: u64,
    },
    /// Saved state that no drive could have had.
    #[error("the saved state of a drive is not valid: {0}")]
    State(&'static str),
    /// The io_uring engine was asked for and the volume is not a raw file.
    #[error("volume {volume} is not a raw file, so io_uring cannot serve it")]
    NotRaw {
        /// The volume's name.
        volume: String,
    },
    /// The io_uring engine was asked for and this host does not let us have it.
    #[error("io_uring cannot be used for volume {volume}")]
    Uring {
        /// The volume's name.
        volume: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's side failed.
    #[error("{context}")]
    Host {
        /// What was being done.
        context: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl BlkError {
    /// A drive that cannot be built from its configuration.
    pub(super) fn in_config(self) -> Error {
        Error::because(
            self.kind(ErrorKind::InvalidConfig),
            "drive",
            "cannot be built",
            self,
        )
    }

    /// A drive that cannot be built from its saved state.
    pub(super) fn in_state(self) -> Error {
        let context = "cannot be built from its saved state";
        Error::because(self.kind(ErrorKind::InvalidState), "drive", context, self)
    }

    fn kind(&self, invalid: ErrorKind) -> ErrorKind {
        match self {
            Self::Uring { .. } | Self::Host { .. } => ErrorKind::Io,
            // These are the host's to choose, whatever the state.
            Self::Threads { .. } | Self::NotRaw { .. } | Self::Unaligned { .. } => {
                ErrorKind::InvalidConfig
            }
            _ => invalid,
        }
    }
}
