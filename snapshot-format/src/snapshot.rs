//! Reading a snapshot's directory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::dir::{open_dir, open_regular, size_of_file, stat_of};
use crate::error::{Found, TooMany};
use crate::header::HEADER_LEN;
use crate::limits::MAX_MANIFEST_LEN;
use crate::manifest::{check_payload, own_entry, requirements_in};
use crate::table;
use crate::{Error, ErrorKind, Header, Manifest, MemoryImage, Payload, Place, Requirements};

/// The file in a snapshot's directory that describes it.
pub const MANIFEST_FILE: &str = "manifest";
/// The file in a snapshot's directory that holds guest memory.
pub const MEMORY_FILE: &str = "memory";

/// A snapshot whose manifest is proven in form (bounds, checksums, rules of the format) and whose memory image has the
/// size that it must have. Whether it fits this host, and what its sections mean, is not proven.
#[derive(Debug)]
pub struct RawSnapshot {
    manifest: Manifest,
    memory: File,
}

impl RawSnapshot {
    /// Opens the snapshot in the directory `dir`. Nothing in it is followed if it is a link.
    ///
    /// # Errors
    /// Every error names the place. Bytes of the memory image are not read here: see
    /// [`MemoryImage::prove`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let dir = open_dir(dir)?;
        let manifest = manifest_in(&dir)?;
        let memory = open_regular(&dir, MEMORY_FILE, Place::Memory)?;
        let found = size_of_file(&stat_of(&memory, Place::Memory)?);
        let expected = manifest.memory_map().layout().image_len();
        if found != expected {
            return Err(Error::because(
                ErrorKind::Length,
                Place::Memory,
                "its size is not what the memory map says",
                Found { found, expected },
            ));
        }
        Ok(Self { manifest, memory })
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The memory image, not verified yet.
    #[must_use]
    pub fn memory(&self) -> MemoryImage<'_> {
        MemoryImage::new(&self.memory, self.manifest.memory_map())
    }
}

/// Reads only the manifest of the snapshot in `dir`; its memory image may be damaged or missing.
///
/// # Errors
/// As [`Manifest::parse`], or what the operating system said.
pub fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    manifest_in(&open_dir(dir)?)
}

/// Reads only the header of the snapshot in `dir`, which may be of a version that this build does not read:
/// [`Header::check_readable`] tells.
///
/// # Errors
/// When it is not there or damaged.
pub fn read_header(dir: &Path) -> Result<Header, Error> {
    let (file, len) = open_manifest(&open_dir(dir)?)?;
    header_of(&file, len)
}

/// Reads only the header and the requirements of the snapshot in `dir`: what decides whether it can run on a host.
/// Their CRC-32C checksums are proven, the rest of the manifest is not looked at.
///
/// # Errors
/// When it is not there, damaged in these parts, or of a version that this build does not read.
pub fn read_requirements(dir: &Path) -> Result<(Header, Requirements), Error> {
    let (file, len) = open_manifest(&open_dir(dir)?)?;
    let header = header_of(&file, len)?;
    header.check_readable()?;
    if len != header.total_length {
        return Err(Error::because(
            ErrorKind::Length,
            Place::Manifest,
            "its size is not what its header says",
            Found {
                found: len,
                expected: header.total_length,
            },
        ));
    }
    let range = table::table_range(&header);
    // Both lengths are capped: the header's section count, and an own section's length.
    let table = read_range(&file, range.start, range.end.saturating_sub(range.start))?;
    let entries = table::parse(&header, &table)?;
    let entry = own_entry(&entries, Requirements::KIND)?;
    let payload = read_range(&file, entry.offset, entry.length)?;
    check_payload(entry, &payload)?;
    let requirements = requirements_in(entry, &payload)?;
    Ok((header, requirements))
}

fn manifest_in(dir: &File) -> Result<Manifest, Error> {
    let (file, len) = open_manifest(dir)?;
    Manifest::parse(&read_range(&file, 0, len)?)
}

fn open_manifest(dir: &File) -> Result<(File, u64), Error> {
    let file = open_regular(dir, MANIFEST_FILE, Place::Manifest)?;
    let len = size_of_file(&stat_of(&file, Place::Manifest)?);
    if len > MAX_MANIFEST_LEN {
        return Err(Error::because(
            ErrorKind::Malformed,
            Place::Manifest,
            "it is longer than any may be",
            TooMany {
                found: len,
                most: MAX_MANIFEST_LEN,
            },
        ));
    }
    Ok((file, len))
}

fn header_of(file: &File, len: u64) -> Result<Header, Error> {
    let bytes = read_range(file, 0, len.min(HEADER_LEN as u64))?;
    Header::parse(&bytes)
}

/// Reads `len` bytes, which the caller has bounded.
fn read_range(file: &File, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            let detail = "it became shorter while it was read";
            Err(Error::new(ErrorKind::Changed, Place::Manifest, detail))
        }
        Err(e) => Err(Error::io(Place::Manifest, "cannot read it", e)),
    }
}
