//! The section table, and the one layout that a list of sections has.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::collections::HashSet;
use std::ops::Range;

use crate::error::Found;
use crate::header::{HEADER_LEN, bytes_at, put};
use crate::limits::MAX_SECTION_LEN;
use crate::{Error, ErrorKind, Header, Place, SectionKind};

/// Length of a table entry in bytes.
pub(crate) const ENTRY_LEN: usize = 32;
/// Length of the trailer in bytes: a BLAKE3-256 hash.
pub(crate) const TRAILER_LEN: usize = 32;
/// Payloads and the trailer start at multiples of this.
const ALIGN: u64 = 16;
/// The entry's flag of a section that must be consumed.
const REQUIRED: u16 = 1;

// Offsets in an entry.
const E_KIND: usize = 0;
const E_VERSION: usize = 4;
const E_FLAGS: usize = 6;
const E_INSTANCE: usize = 8;
const E_CHECKSUM: usize = 12;
const E_OFFSET: usize = 16;
const E_LENGTH: usize = 24;

const _: () = assert!(HEADER_LEN == 128 && ENTRY_LEN == 32 && TRAILER_LEN == 32);
const _: () = assert!(E_LENGTH + size_of::<u64>() == ENTRY_LEN);

/// One entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: SectionKind,
    pub(crate) version: u16,
    pub(crate) required: bool,
    pub(crate) instance: u32,
    pub(crate) checksum: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Entry {
    pub(crate) fn place(&self) -> Place {
        Place::Section {
            kind: self.kind,
            instance: self.instance,
        }
    }

    /// Where in the manifest the payload is.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        let flags = if self.required { REQUIRED } else { 0 };
        put(&mut bytes, E_KIND, &self.kind.0);
        put(&mut bytes, E_VERSION, &self.version.to_le_bytes());
        put(&mut bytes, E_FLAGS, &flags.to_le_bytes());
        put(&mut bytes, E_INSTANCE, &self.instance.to_le_bytes());
        put(&mut bytes, E_CHECKSUM, &self.checksum.to_le_bytes());
        put(&mut bytes, E_OFFSET, &self.offset.to_le_bytes());
        put(&mut bytes, E_LENGTH, &self.length.to_le_bytes());
        bytes
    }

    fn parse(index: u32, bytes: &[u8; ENTRY_LEN]) -> Result<Self, Error> {
        let bad = |field, detail| {
            let place = Place::TableEntry { index, field };
            Err(Error::new(ErrorKind::Malformed, place, detail))
        };
        let kind = SectionKind(bytes_at(bytes, E_KIND).unwrap_or_default());
        if !kind.0.iter().all(u8::is_ascii_graphic) {
            return bad("kind", "it is not four printable ASCII characters");
        }
        let flags = bytes_at(bytes, E_FLAGS).map_or(0, u16::from_le_bytes);
        if flags & !REQUIRED != 0 {
            return bad("flags", "unknown flags are set");
        }
        let length = bytes_at(bytes, E_LENGTH).map_or(0, u64::from_le_bytes);
        if length > MAX_SECTION_LEN {
            return bad("length", "the section is longer than any may be");
        }
        Ok(Self {
            kind,
            version: bytes_at(bytes, E_VERSION).map_or(0, u16::from_le_bytes),
            required: flags & REQUIRED != 0,
            instance: bytes_at(bytes, E_INSTANCE).map_or(0, u32::from_le_bytes),
            checksum: bytes_at(bytes, E_CHECKSUM).map_or(0, u32::from_le_bytes),
            offset: bytes_at(bytes, E_OFFSET).map_or(0, u64::from_le_bytes),
            length,
        })
    }
}

/// Where the payloads of a manifest with so many sections lie: the rule that reader and writer share.
#[derive(Debug)]
pub(crate) struct Layout {
    end: u64,
}

impl Layout {
    pub(crate) fn new(sections: u32) -> Self {
        let table = u64::from(sections).saturating_mul(ENTRY_LEN as u64);
        Self {
            end: table.saturating_add(HEADER_LEN as u64),
        }
    }

    /// The offset of the next payload, which has `length` bytes.
    pub(crate) fn place(&mut self, length: u64) -> u64 {
        let offset = self.next();
        self.end = offset.saturating_add(length);
        offset
    }

    /// The offset of the trailer, when all payloads have their place.
    pub(crate) fn trailer(&self) -> u64 {
        self.next()
    }

    /// The manifest's length, when all payloads have their place.
    pub(crate) fn total(&self) -> u64 {
        self.trailer().saturating_add(TRAILER_LEN as u64)
    }

    fn next(&self) -> u64 {
        // Saturation yields an offset that no file has: readers and writers refuse it.
        self.end.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX)
    }
}

/// Where the table of `header` is in the manifest.
pub(crate) fn table_range(header: &Header) -> Range<u64> {
    let length = u64::from(header.section_count).saturating_mul(ENTRY_LEN as u64);
    header.table_offset..header.table_offset.saturating_add(length)
}

/// Reads the table of a readable `header` and proves that sections lie where they must.
pub(crate) fn parse(header: &Header, table: &[u8]) -> Result<Vec<Entry>, Error> {
    if crc32c::crc32c(table) != header.table_checksum {
        let detail = "the table's bytes do not have the checksum that the header gives";
        return Err(Error::new(ErrorKind::Checksum, Place::Table, detail));
    }
    let mut layout = Layout::new(header.section_count);
    let mut seen = HashSet::new();
    let mut entries = Vec::new();
    for (index, bytes) in (0..).zip(table.as_chunks::<ENTRY_LEN>().0) {
        let entry = Entry::parse(index, bytes)?;
        let expected = layout.place(entry.length);
        if entry.offset != expected {
            let field = "offset";
            let source = Found {
                found: entry.offset,
                expected,
            };
            return Err(Error::because(
                ErrorKind::Malformed,
                Place::TableEntry { index, field },
                "the payload is not where it must be",
                source,
            ));
        }
        if !seen.insert((entry.kind, entry.instance)) {
            let field = "instance";
            return Err(Error::new(
                ErrorKind::Malformed,
                Place::TableEntry { index, field },
                "an earlier section has the same kind and instance",
            ));
        }
        entries.push(entry);
    }
    if layout.total() != header.total_length {
        let source = Found {
            found: header.total_length,
            expected: layout.total(),
        };
        return Err(Error::because(
            ErrorKind::Malformed,
            Place::Header("total length"),
            "it is not what the sections add up to",
            source,
        ));
    }
    Ok(entries)
}
