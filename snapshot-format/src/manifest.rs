//! The manifest: from bytes to plain data, and back.
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
        reason = "tests damage manifests byte by byte"
    )
)]

use std::ops::Range;

use serde::Serialize;

use crate::disks::Disks;
use crate::error::{Broken, Found};
use crate::header::{FORMAT_VERSION, HEADER_LEN};
use crate::limits::MAX_OWN_SECTION_LEN;
use crate::memory_map::Wire;
use crate::sections::decode;
use crate::table::{self, Entry, Layout, TRAILER_LEN};
use crate::{
    Digest, Disk, Error, ErrorKind, Header, MemoryMap, Metadata, Payload, Place, Requirements,
    Section, SectionKind, Sections, SnapshotId, Timestamp,
};

/// The sections that are described in this crate; each occurs once in every manifest.
const OWN_KINDS: [SectionKind; 4] = [Requirements::KIND, Wire::KIND, Disks::KIND, Metadata::KIND];

/// What a manifest is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestParts {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// When it was made.
    pub created: Timestamp,
    /// What a host must offer.
    pub requirements: Requirements,
    /// Guest memory.
    pub memory: MemoryMap,
    /// The frozen disks.
    pub disks: Vec<Disk>,
    /// About the snapshot.
    pub metadata: Metadata,
    /// The machine's own sections.
    pub sections: Vec<Section>,
}

impl ManifestParts {
    /// The manifest's bytes. They were parsed again: what comes out is what a reader takes.
    ///
    /// # Errors
    /// When a reader would refuse the manifest, with the reader's error.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut sections = vec![
            Section::required(0, &self.requirements)?,
            Section::required(0, &self.memory.to_wire())?,
            Section::required(0, &Disks(self.disks.clone()))?,
            Section::required(0, &self.metadata)?,
        ];
        sections.extend_from_slice(&self.sections);

        let count = u32::try_from(sections.len()).unwrap_or(u32::MAX);
        let mut layout = Layout::new(count);
        let mut entries = Vec::with_capacity(sections.len());
        let mut table = Vec::new();
        for section in &sections {
            let length = section.payload.len() as u64;
            let entry = Entry {
                kind: section.kind,
                version: section.version,
                required: section.required,
                instance: section.instance,
                checksum: crc32c::crc32c(&section.payload),
                offset: layout.place(length),
                length,
            };
            table.extend_from_slice(&entry.encode());
            entries.push(entry);
        }
        let header = Header {
            format_version: FORMAT_VERSION,
            minimum_reader: FORMAT_VERSION,
            flags: 0,
            total_length: layout.total(),
            table_offset: HEADER_LEN as u64,
            section_count: count,
            table_checksum: crc32c::crc32c(&table),
            id: self.id,
            created: self.created,
        };
        let mut bytes = header.encode().to_vec();
        bytes.append(&mut table);
        for (section, entry) in sections.iter().zip(&entries) {
            pad_to(&mut bytes, entry.offset);
            bytes.extend_from_slice(&section.payload);
        }
        pad_to(&mut bytes, layout.trailer());
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(&digest.0);
        Manifest::parse(&bytes)?;
        Ok(bytes)
    }
}

/// Appends zeros up to `offset`, which is less than 16 bytes away.
fn pad_to(bytes: &mut Vec<u8>, offset: u64) {
    if let Ok(offset) = usize::try_from(offset) {
        bytes.resize(offset, 0);
    }
}

/// What the section table says of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SectionInfo {
    /// Whose state it is.
    pub kind: SectionKind,
    /// The payload's version.
    pub version: u16,
    /// Tells sections of one kind apart.
    pub instance: u32,
    /// A reader that does not consume the section must refuse the snapshot.
    pub required: bool,
    /// Where in the manifest the payload starts.
    pub offset: u64,
    /// Bytes of the payload.
    pub length: u64,
    /// CRC-32C of the payload.
    pub checksum: u32,
}

/// A manifest whose bounds, checksums and rules of form are proven. What its sections *mean* is still for
/// the machine to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    header: Header,
    entries: Vec<Entry>,
    digest: Digest,
    requirements: Requirements,
    memory: MemoryMap,
    disks: Vec<Disk>,
    metadata: Metadata,
    sections: Vec<Section>,
}

impl Manifest {
    /// Reads a manifest, all of `bytes`. Never panics; allocates in proportion to `bytes.len()` only.
    ///
    /// # Errors
    /// Every error names the place. A changed bit or a cut anywhere is an error.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let header = Header::parse(bytes)?;
        header.check_readable()?;
        check_length(&header, bytes)?;
        let table =
            bytes_in(bytes, table::table_range(&header)).ok_or_else(|| short(Place::Table))?;
        let entries = table::parse(&header, table)?;

        let mut gap_start = table::table_range(&header).end;
        for entry in &entries {
            check_zero(bytes, gap_start..entry.offset)?;
            checked_payload(bytes, entry)?;
            gap_start = entry.range().end;
        }
        let trailer = header.total_length.saturating_sub(TRAILER_LEN as u64);
        check_zero(bytes, gap_start..trailer)?;
        let covered = bytes_in(bytes, 0..trailer).ok_or_else(|| short(Place::Trailer))?;
        let digest = Digest::of(covered);
        if bytes_in(bytes, trailer..header.total_length) != Some(&digest.0) {
            let detail = "the manifest's bytes do not have the digest in its trailer";
            return Err(Error::new(ErrorKind::Checksum, Place::Trailer, detail));
        }

        let own = |kind| own_entry(&entries, kind);
        let requirements = decode_requirements(bytes, own(Requirements::KIND)?)?;
        let memory = decode_own::<Wire>(bytes, own(Wire::KIND)?)?;
        let place = own(Wire::KIND)?.place();
        let memory = MemoryMap::from_wire(memory).map_err(|source| breaks_rule(place, source))?;
        let disks: Disks = decode_own(bytes, own(Disks::KIND)?)?;
        disks
            .check()
            .map_err(|source| breaks_rule(own_place(Disks::KIND), source))?;
        let metadata: Metadata = decode_own(bytes, own(Metadata::KIND)?)?;
        metadata
            .check()
            .map_err(|source| breaks_rule(own_place(Metadata::KIND), source))?;

        let mut sections = Vec::new();
        for entry in entries.iter().filter(|e| !OWN_KINDS.contains(&e.kind)) {
            sections.push(Section {
                kind: entry.kind,
                version: entry.version,
                instance: entry.instance,
                required: entry.required,
                payload: checked_payload(bytes, entry)?.to_vec(),
            });
        }
        Ok(Self {
            header,
            entries,
            digest,
            requirements,
            memory,
            disks: disks.0,
            metadata,
            sections,
        })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The snapshot's id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.header.id
    }

    /// BLAKE3-256 of the manifest without its trailer: pins the whole snapshot but the disks.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What a host must offer.
    #[must_use]
    pub fn requirements(&self) -> &Requirements {
        &self.requirements
    }

    /// Guest memory.
    #[must_use]
    pub fn memory_map(&self) -> &MemoryMap {
        &self.memory
    }

    /// The frozen disks.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// About the snapshot.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The table's word on all sections, this crate's own included, in the manifest's order.
    pub fn section_infos(&self) -> impl ExactSizeIterator<Item = SectionInfo> {
        self.entries.iter().map(|entry| SectionInfo {
            kind: entry.kind,
            version: entry.version,
            instance: entry.instance,
            required: entry.required,
            offset: entry.offset,
            length: entry.length,
            checksum: entry.checksum,
        })
    }

    /// The machine's own sections, to be consumed.
    pub fn sections(&self) -> Sections<'_> {
        Sections::new(&self.sections)
    }

    /// The manifest as parts: what [`ManifestParts::encode`] takes.
    #[must_use]
    pub fn into_parts(self) -> ManifestParts {
        ManifestParts {
            id: self.header.id,
            created: self.header.created,
            requirements: self.requirements,
            memory: self.memory,
            disks: self.disks,
            metadata: self.metadata,
            sections: self.sections,
        }
    }
}

fn own_place(kind: SectionKind) -> Place {
    Place::Section { kind, instance: 0 }
}

fn breaks_rule(place: Place, source: Broken) -> Error {
    Error::because(
        ErrorKind::Malformed,
        place,
        "the content breaks a rule of the format",
        source,
    )
}

fn short(place: Place) -> Error {
    Error::new(ErrorKind::Length, place, "the manifest ends here")
}

fn bytes_in(bytes: &[u8], range: Range<u64>) -> Option<&[u8]> {
    let start = usize::try_from(range.start).ok()?;
    bytes.get(start..usize::try_from(range.end).ok()?)
}

/// Proves that `bytes` are as long as the header says, else finds where they end.
fn check_length(header: &Header, bytes: &[u8]) -> Result<(), Error> {
    let (found, expected) = (bytes.len() as u64, header.total_length);
    if found == expected {
        return Ok(());
    }
    let (place, detail) = if found > expected {
        (
            Place::Manifest,
            "the manifest is longer than its header says",
        )
    } else {
        (place_of(header, bytes), "the manifest ends here")
    };
    let source = Found { found, expected };
    Err(Error::because(ErrorKind::Length, place, detail, source))
}

/// What a manifest that ends too early ends in.
fn place_of(header: &Header, bytes: &[u8]) -> Place {
    let Some(table) = bytes_in(bytes, table::table_range(header)) else {
        return Place::Table;
    };
    let Ok(entries) = table::parse(header, table) else {
        return Place::Manifest;
    };
    let end = bytes.len() as u64;
    if end >= header.total_length.saturating_sub(TRAILER_LEN as u64) {
        return Place::Trailer;
    }
    let cut = entries.iter().find(|e| end < e.range().end);
    match cut {
        Some(entry) if end >= entry.offset => entry.place(),
        _ => Place::Padding { offset: end },
    }
}

/// The payload of `entry`, its checksum proven.
fn checked_payload<'a>(bytes: &'a [u8], entry: &Entry) -> Result<&'a [u8], Error> {
    let payload = bytes_in(bytes, entry.range()).ok_or_else(|| short(entry.place()))?;
    check_payload(entry, payload)?;
    Ok(payload)
}

/// Proves the checksum of a payload.
pub(crate) fn check_payload(entry: &Entry, payload: &[u8]) -> Result<(), Error> {
    if crc32c::crc32c(payload) == entry.checksum {
        return Ok(());
    }
    let detail = "the payload does not have the checksum that the table gives";
    Err(Error::new(ErrorKind::Checksum, entry.place(), detail))
}

fn check_zero(bytes: &[u8], gap: Range<u64>) -> Result<(), Error> {
    let place = Place::Padding { offset: gap.start };
    let gap = bytes_in(bytes, gap).ok_or_else(|| short(place))?;
    if gap.iter().all(|b| *b == 0) {
        return Ok(());
    }
    let detail = "the gap is not zero";
    Err(Error::new(ErrorKind::Malformed, place, detail))
}

/// The entry of one of this crate's own sections.
pub(crate) fn own_entry(entries: &[Entry], kind: SectionKind) -> Result<&Entry, Error> {
    let mut of_kind = (0..).zip(entries).filter(|(_, e)| e.kind == kind);
    let Some((index, entry)) = of_kind.next() else {
        let detail = "every manifest has it, this one does not";
        return Err(Error::new(ErrorKind::Missing, own_place(kind), detail));
    };
    let bad = |index, field, detail| {
        let place = Place::TableEntry { index, field };
        Err(Error::new(ErrorKind::Malformed, place, detail))
    };
    if let Some((index, _)) = of_kind.next() {
        return bad(index, "kind", "this kind occurs once only");
    }
    if entry.instance != 0 {
        return bad(index, "instance", "this kind has the instance 0");
    }
    if !entry.required {
        return bad(index, "flags", "this kind is always required");
    }
    if kind != Wire::KIND && entry.length > MAX_OWN_SECTION_LEN {
        return bad(index, "length", "this kind has at most 256 KiB");
    }
    Ok(entry)
}

fn decode_own<P: Payload>(bytes: &[u8], entry: &Entry) -> Result<P, Error> {
    decode(entry.place(), entry.version, checked_payload(bytes, entry)?)
}

fn decode_requirements(bytes: &[u8], entry: &Entry) -> Result<Requirements, Error> {
    requirements_in(entry, checked_payload(bytes, entry)?)
}

/// Decodes and checks the requirements in a payload whose checksum is proven.
pub(crate) fn requirements_in(entry: &Entry, payload: &[u8]) -> Result<Requirements, Error> {
    let requirements: Requirements = decode(entry.place(), entry.version, payload)?;
    requirements
        .check()
        .map_err(|source| breaks_rule(entry.place(), source))?;
    Ok(requirements)
}

#[cfg(test)]
mod tests;
