//! The snapshot format: bytes to plain data and back. Knows no KVM and no device.
//!
//! `docs/snapshot-format.md` is the reference; the names here are its names.
//!
//! - [`RawSnapshot::open`] reads a snapshot directory and proves bounds and checksums; what it hands out is
//!   plain data whose *meaning* the machine still has to check.
//! - [`read_requirements`] reads just what a host must offer; [`Requirements::unmet`] compares.
//! - [`SnapshotWriter`] writes one, published by one rename.
//! - [`Manifest::parse`] is the pure part: bytes to manifest.
//!
//! ```no_run
//! use offshoot_snapshot_format::{RawSnapshot, Verify};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let snapshot = RawSnapshot::open("store/snap-01jd4e8k3v0000000000000000".as_ref())?;
//! let memory = snapshot.memory().prove(Verify::Eager, |_| std::ops::ControlFlow::Continue(()))?;
//! let mut sections = snapshot.manifest().sections();
//! let clock = sections.take_raw(offshoot_snapshot_format::SectionKind(*b"CLCK"), 0)?;
//! // ... everything else that the machine knows ...
//! sections.finish()?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod digest;
mod dir;
mod disks;
mod error;
mod header;
mod id;
mod limits;
mod manifest;
mod memory_image;
mod memory_map;
mod metadata;
mod payload;
mod requirements;
mod sections;
mod snapshot;
mod table;
mod text;
mod time;
mod writer;

pub use digest::Digest;
pub use disks::Disk;
pub use error::{Error, ErrorKind, Place};
pub use header::{FORMAT_VERSION, HEADER_LEN, Header, OLDEST_READABLE_FORMAT};
pub use id::{InvalidSnapshotId, SnapshotId};
pub use limits::*;
pub use manifest::{Manifest, ManifestParts, SectionInfo};
pub use memory_image::{MemoryImage, Progress, Verify};
pub use memory_map::{Chunk, ChunkDigest, MemoryLayout, MemoryMap, Region};
pub use metadata::Metadata;
pub use payload::{Payload, PayloadError, SectionKind, decode_exact};
pub use requirements::{
    Arch, CpuidRegister, CpuidWord, DeviceModel, HostOffers, KvmCapability, Mismatch, Requirements,
    Tsc,
};
pub use sections::{Section, Sections};
pub use snapshot::{
    MANIFEST_FILE, MEMORY_FILE, RawSnapshot, read_header, read_manifest, read_requirements,
};
pub use text::InvalidText;
pub use time::Timestamp;
pub use writer::{
    CleanReport, MemoryWriter, SnapshotContent, SnapshotWriter, WrittenMemory, clean_partial,
};
