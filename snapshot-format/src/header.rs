//! The header: the first 128 bytes of a manifest, readable by every later version.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "tests damage headers byte by byte"
    )
)]

use serde::Serialize;

use crate::error::Found;
use crate::limits::{MAX_MANIFEST_LEN, MAX_SECTIONS};
use crate::{Error, ErrorKind, Place, SnapshotId, Timestamp};

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 128;
/// The format version that this build writes.
pub const FORMAT_VERSION: u16 = 1;
/// The oldest format version that this build reads.
pub const OLDEST_READABLE_FORMAT: u16 = if FORMAT_VERSION > 2 {
    FORMAT_VERSION - 2
} else {
    1
};

/// The first bytes of every manifest. The high bit of the first tells it from text and is lost by
/// transfers that are not 8-bit clean.
pub(crate) const MAGIC: [u8; 8] = *b"\x89OFFSNAP";
/// Flag bits that a reader must know or refuse.
const MUST_KNOW_FLAGS: u32 = 0xffff;
/// Own sections: every manifest has these many at least.
const MIN_SECTIONS: u32 = 4;

/// One field of the header: its name in messages, its offset and size in bytes.
struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
}

const fn field(name: &'static str, offset: usize, size: usize) -> Field {
    Field { name, offset, size }
}

const F_MAGIC: Field = field("magic", 0, 8);
const F_FORMAT: Field = field("format version", 8, 2);
const F_MINIMUM: Field = field("minimum reader", 10, 2);
const F_FLAGS: Field = field("flags", 12, 4);
const F_TOTAL: Field = field("total length", 16, 8);
const F_TABLE: Field = field("table offset", 24, 8);
const F_COUNT: Field = field("section count", 32, 4);
const F_TABLE_SUM: Field = field("table checksum", 36, 4);
const F_ID: Field = field("snapshot id", 40, 16);
const F_CREATED: Field = field("created", 56, 8);
const F_RESERVED: Field = field("reserved", 64, 60);
const F_CHECKSUM: Field = field("header checksum", 124, 4);

const FIELDS: [Field; 12] = [
    F_MAGIC,
    F_FORMAT,
    F_MINIMUM,
    F_FLAGS,
    F_TOTAL,
    F_TABLE,
    F_COUNT,
    F_TABLE_SUM,
    F_ID,
    F_CREATED,
    F_RESERVED,
    F_CHECKSUM,
];

// Tripwire: the fields tile the header without gap or overlap.
const _: () = {
    let mut end = 0;
    let mut rest: &[Field] = &FIELDS;
    while let [first, tail @ ..] = rest {
        assert!(first.offset == end, "a header field has moved");
        end = first.offset.checked_add(first.size).expect("small numbers");
        rest = tail;
    }
    assert!(end == HEADER_LEN, "the header's length has changed");
};

/// The header of a manifest. Its bytes keep their place and meaning in every later version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Header {
    /// The format version that the manifest was written in.
    pub format_version: u16,
    /// The oldest format version whose readers may read it.
    pub minimum_reader: u16,
    /// Bits 0-15 must be known or refused, bits 16-31 may be ignored.
    pub flags: u32,
    /// Bytes of the manifest.
    pub total_length: u64,
    /// Where in the manifest the section table starts.
    pub table_offset: u64,
    /// Entries of the section table.
    pub section_count: u32,
    /// CRC-32C of the section table.
    pub table_checksum: u32,
    /// The snapshot's id.
    pub id: SnapshotId,
    /// When the snapshot was made.
    pub created: Timestamp,
}

/// `N` bytes of `bytes` at `offset`.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// Writes `value` into `bytes` at `offset`; both are constants of this crate's layout.
pub(crate) fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(offset).zip(value) {
        *to = *from;
    }
}

fn at(field: &Field) -> Place {
    Place::Header(field.name)
}

impl Header {
    /// Reads the header of a manifest of *any* version: what [`Self::check_readable`] does not like can still
    /// be shown. `bytes` may be longer.
    ///
    /// # Errors
    /// When `bytes` are too few, are not a manifest, or do not have the header's checksum.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let magic_met = MAGIC.iter().zip(bytes).all(|(a, b)| a == b);
        if !magic_met || bytes.is_empty() {
            let detail = "this is not a snapshot manifest";
            return Err(Error::new(ErrorKind::NotASnapshot, at(&F_MAGIC), detail));
        }
        let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
            let cut = FIELDS
                .iter()
                .find(|f| bytes.len() < f.offset.saturating_add(f.size))
                .unwrap_or(&F_MAGIC);
            let detail = "the manifest ends here";
            return Err(Error::new(ErrorKind::Length, at(cut), detail));
        };
        let u16_at = |f: Field| bytes_at(bytes, f.offset).map_or(0, u16::from_le_bytes);
        let u32_at = |f: Field| bytes_at(bytes, f.offset).map_or(0, u32::from_le_bytes);
        let u64_at = |f: Field| bytes_at(bytes, f.offset).map_or(0, u64::from_le_bytes);

        let stored = u32_at(F_CHECKSUM);
        let covered = bytes.get(..F_CHECKSUM.offset).unwrap_or_default();
        if crc32c::crc32c(covered) != stored {
            let detail = "the header's bytes do not have the header's checksum";
            return Err(Error::new(ErrorKind::Checksum, at(&F_CHECKSUM), detail));
        }
        let format_version = u16_at(F_FORMAT);
        let mut reserved = covered.iter().skip(F_RESERVED.offset);
        if format_version <= FORMAT_VERSION && !reserved.all(|b| *b == 0) {
            let detail = "reserved bytes are not zero";
            return Err(Error::new(ErrorKind::Malformed, at(&F_RESERVED), detail));
        }
        let created = Timestamp::from_unix_ms(u64_at(F_CREATED)).ok_or_else(|| {
            let detail = "the time is past the year 9999";
            Error::new(ErrorKind::Malformed, at(&F_CREATED), detail)
        })?;
        Ok(Self {
            format_version,
            minimum_reader: u16_at(F_MINIMUM),
            flags: u32_at(F_FLAGS),
            total_length: u64_at(F_TOTAL),
            table_offset: u64_at(F_TABLE),
            section_count: u32_at(F_COUNT),
            table_checksum: u32_at(F_TABLE_SUM),
            id: SnapshotId::from_bytes(bytes_at(bytes, F_ID.offset).unwrap_or_default()),
            created,
        })
    }

    /// Whether this build may read what follows the header.
    ///
    /// # Errors
    /// [`ErrorKind::Version`] when it may not, [`ErrorKind::Malformed`] when a field breaks a rule.
    pub fn check_readable(&self) -> Result<(), Error> {
        let malformed = |field: &Field, detail, found: u64, expected: u64| {
            let source = Found { found, expected };
            Err(Error::because(
                ErrorKind::Malformed,
                at(field),
                detail,
                source,
            ))
        };
        let (format, minimum) = (self.format_version, self.minimum_reader);
        if minimum == 0 || minimum > format {
            let detail = "the oldest reader is not one of the versions up to this one";
            return malformed(&F_MINIMUM, detail, minimum.into(), format.into());
        }
        if format < OLDEST_READABLE_FORMAT || minimum > FORMAT_VERSION {
            let source = UnreadableVersion { format, minimum };
            let detail = "this build does not read this version";
            return Err(Error::because(
                ErrorKind::Version,
                at(&F_FORMAT),
                detail,
                source,
            ));
        }
        if self.flags & MUST_KNOW_FLAGS != 0 {
            let detail = "a flag is set that this build does not know and must not ignore";
            return Err(Error::new(ErrorKind::Version, at(&F_FLAGS), detail));
        }
        if self.total_length > MAX_MANIFEST_LEN {
            let detail = "the manifest is longer than any may be";
            return malformed(&F_TOTAL, detail, self.total_length, MAX_MANIFEST_LEN);
        }
        if self.table_offset != HEADER_LEN as u64 {
            let detail = "the section table does not follow the header";
            return malformed(&F_TABLE, detail, self.table_offset, HEADER_LEN as u64);
        }
        if self.section_count < MIN_SECTIONS {
            let detail = "there are fewer sections than every manifest has";
            return malformed(
                &F_COUNT,
                detail,
                self.section_count.into(),
                MIN_SECTIONS.into(),
            );
        }
        if self.section_count > MAX_SECTIONS {
            let detail = "there are more sections than any manifest may have";
            return malformed(
                &F_COUNT,
                detail,
                self.section_count.into(),
                MAX_SECTIONS.into(),
            );
        }
        Ok(())
    }

    /// The header's bytes.
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        put(&mut bytes, F_MAGIC.offset, &MAGIC);
        put(
            &mut bytes,
            F_FORMAT.offset,
            &self.format_version.to_le_bytes(),
        );
        put(
            &mut bytes,
            F_MINIMUM.offset,
            &self.minimum_reader.to_le_bytes(),
        );
        put(&mut bytes, F_FLAGS.offset, &self.flags.to_le_bytes());
        put(&mut bytes, F_TOTAL.offset, &self.total_length.to_le_bytes());
        put(&mut bytes, F_TABLE.offset, &self.table_offset.to_le_bytes());
        put(
            &mut bytes,
            F_COUNT.offset,
            &self.section_count.to_le_bytes(),
        );
        put(
            &mut bytes,
            F_TABLE_SUM.offset,
            &self.table_checksum.to_le_bytes(),
        );
        put(&mut bytes, F_ID.offset, &self.id.to_bytes());
        put(
            &mut bytes,
            F_CREATED.offset,
            &self.created.unix_ms().to_le_bytes(),
        );
        let checksum = crc32c::crc32c(bytes.get(..F_CHECKSUM.offset).unwrap_or_default());
        put(&mut bytes, F_CHECKSUM.offset, &checksum.to_le_bytes());
        bytes
    }
}

/// Why a version is not read.
#[derive(Debug, thiserror::Error)]
#[error(
    "it has format {format} for readers of format {minimum} and newer; this build reads formats \
     {OLDEST_READABLE_FORMAT} to {FORMAT_VERSION}"
)]
struct UnreadableVersion {
    format: u16,
    minimum: u16,
}

#[cfg(test)]
mod tests;
