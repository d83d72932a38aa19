//! The one error of this crate.

use std::fmt;
use std::io;

use crate::SectionKind;

/// What kind of thing went wrong; match on this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is nothing there.
    NotFound,
    /// A snapshot of this id is already there.
    Exists,
    /// Not a snapshot of Offshoot at all.
    NotASnapshot,
    /// Made by a version that this build does not read.
    Version,
    /// Shorter or longer than it says.
    Length,
    /// The bytes are not those that were written.
    Checksum,
    /// The checksums match but the content breaks a rule of the format.
    Malformed,
    /// A required section is missing.
    Missing,
    /// A required section was left over: this build does not know it.
    LeftOver,
    /// Changed while it was read.
    Changed,
    /// No space is left.
    StorageFull,
    /// A caller used the writer in a way that cannot become a valid snapshot.
    Misuse,
    /// The caller asked to stop.
    Cancelled,
    /// Anything else that the operating system said.
    Io,
}

/// Where in a snapshot it went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The snapshot's directory, or the one it is to be published in.
    Directory,
    /// The file `manifest` as a whole.
    Manifest,
    /// A field of the header.
    Header(&'static str),
    /// The section table as a whole.
    Table,
    /// One entry of the section table.
    TableEntry {
        /// The entry's index.
        index: u32,
        /// The field of the entry.
        field: &'static str,
    },
    /// A section's payload.
    Section {
        /// The section's kind.
        kind: SectionKind,
        /// The section's instance.
        instance: u32,
    },
    /// A gap between payloads that must be zero.
    Padding {
        /// Where in the manifest the gap starts.
        offset: u64,
    },
    /// The trailer.
    Trailer,
    /// The file `memory` as a whole.
    Memory,
    /// One chunk of the memory image.
    Chunk {
        /// The chunk's number.
        index: u64,
        /// Where in the file the chunk starts.
        file_offset: u64,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory => f.write_str("snapshot directory"),
            Self::Manifest => f.write_str("manifest"),
            Self::Header(field) => write!(f, "manifest header, {field}"),
            Self::Table => f.write_str("section table"),
            Self::TableEntry { index, field } => {
                write!(f, "section table, entry {index}, {field}")
            }
            Self::Section { kind, instance } => write!(f, "section {kind}/{instance}"),
            Self::Padding { offset } => write!(f, "padding at byte {offset} of the manifest"),
            Self::Trailer => f.write_str("manifest trailer"),
            Self::Memory => f.write_str("memory image"),
            Self::Chunk { index, file_offset } => {
                write!(f, "memory image, chunk {index} at byte {file_offset}")
            }
        }
    }
}

/// A snapshot that could not be read or written: what is wrong, where, and why.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    place: Place,
    detail: &'static str,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, place: Place, detail: &'static str) -> Self {
        Self {
            kind,
            place,
            detail,
            source: None,
        }
    }

    pub(crate) fn because(
        kind: ErrorKind,
        place: Place,
        detail: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            place,
            detail,
            source: Some(source.into()),
        }
    }

    /// An operating system error; its kind decides ours. `detail` says what was tried.
    pub(crate) fn io(place: Place, detail: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::StorageFull,
            _ => ErrorKind::Io,
        };
        Self::because(kind, place, detail, source)
    }

    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Where in the snapshot it is.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.detail)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// A number that breaks a rule: what was found, and what the rule allows. The usual source of an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("found {found}, expected {expected}")]
pub(crate) struct Found {
    pub(crate) found: u64,
    pub(crate) expected: u64,
}

/// A number over its cap. The source of an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("found {found}, the most is {most}")]
pub(crate) struct TooMany {
    pub(crate) found: u64,
    pub(crate) most: u64,
}

/// A rule of the format that a section's content breaks. The source of an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error(transparent)]
    Text(#[from] crate::InvalidText),
    #[error("{found} {what}; the most is {most}")]
    TooMany {
        what: &'static str,
        found: u64,
        most: u64,
    },
    #[error("{0}")]
    Rule(&'static str),
}

impl Broken {
    pub(crate) fn if_more(what: &'static str, found: usize, most: usize) -> Result<(), Self> {
        if found <= most {
            return Ok(());
        }
        Err(Self::TooMany {
            what,
            found: found as u64,
            most: most as u64,
        })
    }
}
