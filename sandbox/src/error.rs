//! The one error of this crate.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use offshoot_protocol::agent::{ErrorCode, Refusal};

/// What kind of thing went wrong; match on this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Nothing came, or could be sent, until the deadline.
    TimedOut,
    /// The connection ended before the answer. Whether the work was done is not known.
    Disconnected,
    /// The guest sent what no honest agent sends.
    Untrustworthy,
    /// The agent speaks no version that this host speaks.
    Incompatible,
    /// The guest has not taken the identity of the generation that is meant.
    NotReady,
    /// What the guest sends is more than was allowed.
    TooLarge,
    /// As much as may be at a time is going on in the guest already.
    Busy,
    /// There is no such file, command or user in the guest.
    NotFound,
    /// The name is taken.
    Exists,
    /// The guest's kernel does not permit it.
    Denied,
    /// The request makes no sense.
    Invalid,
    /// The command has ended already, or not yet.
    WrongState,
    /// The host's side failed: a stream that was to be read from or written to, say.
    Host,
    /// Anything else that the guest's kernel said; [`Error::os_error`] has the number.
    Guest,
}

/// An operation that failed: what was done, and why.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    os_error: Option<i32>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, operation: &'static str) -> Self {
        Self {
            kind,
            operation,
            os_error: None,
            source: None,
        }
    }

    pub(crate) fn because(
        kind: ErrorKind,
        operation: &'static str,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(kind, operation)
        }
    }

    /// A failure of the stream to the guest.
    pub(crate) fn stream(operation: &'static str, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => ErrorKind::TimedOut,
            _ => ErrorKind::Disconnected,
        };
        Self::because(kind, operation, source)
    }

    /// A refusal of the agent's.
    pub(crate) fn refused(operation: &'static str, refusal: Refusal) -> Self {
        let kind = match refusal.code {
            ErrorCode::Version => ErrorKind::Incompatible,
            ErrorCode::NotReady => ErrorKind::NotReady,
            ErrorCode::Busy => ErrorKind::Busy,
            ErrorCode::NoJob | ErrorCode::NoUser => ErrorKind::NotFound,
            ErrorCode::WrongState => ErrorKind::WrongState,
            ErrorCode::Os => match io::Error::from_raw_os_error(refusal.errno).kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::AlreadyExists => ErrorKind::Exists,
                io::ErrorKind::PermissionDenied => ErrorKind::Denied,
                io::ErrorKind::InvalidInput => ErrorKind::Invalid,
                _ => ErrorKind::Guest,
            },
            _ => ErrorKind::Invalid,
        };
        let os_error = (refusal.errno != 0).then_some(refusal.errno);
        Self {
            os_error,
            ..Self::because(kind, operation, refusal)
        }
    }

    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error number that the guest's kernel gave, if it was that which refused.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        self.os_error
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ErrorKind::TimedOut => "the deadline passed",
            ErrorKind::Disconnected => "the connection to the guest ended",
            ErrorKind::Untrustworthy => "the guest sent what no agent sends",
            ErrorKind::Incompatible => "the guest's agent is of another version; update it",
            ErrorKind::NotReady => "the guest has not taken its new identity yet",
            ErrorKind::TooLarge => "the guest sends more than was allowed",
            ErrorKind::Busy => "the guest has too much to do already; try later",
            ErrorKind::NotFound => "there is no such thing in the guest",
            ErrorKind::Exists => "the name is taken in the guest",
            ErrorKind::Denied => "the guest does not permit it",
            ErrorKind::Invalid => "the request is not valid",
            ErrorKind::WrongState => "the command has ended already, or not yet",
            ErrorKind::Host => "the host's side failed",
            ErrorKind::Guest => "the guest refused",
        };
        write!(f, "cannot {}: {what}", self.operation)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|error| error as _)
    }
}
