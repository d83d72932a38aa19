//! The one error of this crate.

use std::fmt;

/// What kind of thing went wrong; match on this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Saved state contradicts itself, the device it is for, or the guest's memory.
    InvalidState,
    /// A device's configuration makes no sense.
    InvalidConfig,
    /// It was asked for in the wrong moment (a save without a quiesce).
    WrongMoment,
    /// The device model gave up.
    Device,
    /// Guest memory is not where it should be.
    Memory,
    /// The operating system refused.
    Io,
}

/// A failure of a device or its transport: of what, in doing what, and why.
///
/// Nothing that a guest does at run time ends in this error: it is for the machine that builds,
/// quiesces, saves and restores devices.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    object: &'static str,
    context: &'static str,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with nothing beneath it. It reads "`object`: `context`".
    #[must_use]
    pub fn new(kind: ErrorKind, object: &'static str, context: &'static str) -> Self {
        Self {
            kind,
            object,
            context,
            source: None,
        }
    }

    /// An error caused by `source`.
    pub fn because(
        kind: ErrorKind,
        object: &'static str,
        context: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(kind, object, context)
        }
    }

    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
