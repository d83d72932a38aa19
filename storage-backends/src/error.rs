//! The one error of this crate.

use std::fmt;
use std::io;

/// What kind of thing went wrong; match on this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no volume, layer or image of this name.
    NotFound,
    /// The name is taken.
    Exists,
    /// Somebody else has it open, or something depends on it.
    InUse,
    /// The image or the store's own files are not what they must be.
    Damaged,
    /// The request makes no sense: a size that no volume can have, an unknown backend.
    Invalid,
    /// The directory is a store of another backend, or no store at all.
    ForeignStore,
    /// The caller's progress function asked to stop.
    Cancelled,
    /// The file system or the image cannot do what was asked.
    Unsupported,
    /// A layer more would exceed the longest chain; flatten first.
    ChainTooLong,
    /// No space is left.
    StorageFull,
    /// Anything else that the operating system said.
    Io,
}

/// A storage operation that failed: what was done, to what, and why.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    object: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with nothing beneath it.
    pub fn new(kind: ErrorKind, operation: &'static str, object: impl fmt::Display) -> Self {
        Self {
            kind,
            operation,
            object: object.to_string(),
            source: None,
        }
    }

    /// An error caused by `source`.
    pub fn because(
        kind: ErrorKind,
        operation: &'static str,
        object: impl fmt::Display,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            operation,
            object: object.to_string(),
            source: Some(source.into()),
        }
    }

    /// An operating system error; its kind decides ours.
    pub fn io(operation: &'static str, object: impl fmt::Display, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::Exists,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::StorageFull,
            io::ErrorKind::Unsupported | io::ErrorKind::FileTooLarge => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self::because(kind, operation, object, source)
    }

    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ErrorKind::NotFound => "there is none",
            ErrorKind::Exists => "the name is taken",
            ErrorKind::InUse => "it is in use",
            ErrorKind::Damaged => "it is damaged or not of this kind",
            ErrorKind::Invalid => "the request is not valid",
            ErrorKind::ForeignStore => "the directory does not belong to this backend",
            ErrorKind::Cancelled => "it was cancelled",
            ErrorKind::Unsupported => "this is not supported here",
            ErrorKind::ChainTooLong => "the chain of layers is at its longest; flatten it first",
            ErrorKind::StorageFull => "no space is left",
            ErrorKind::Io => "the operating system refused",
        };
        write!(f, "cannot {} {}: {what}", self.operation, self.object)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
