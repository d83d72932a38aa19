//! The section `DISK`: which frozen layers belong to the snapshot.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::error::Broken;
use crate::limits::MAX_DISKS;
use crate::{Payload, SectionKind, text};

/// A frozen disk: named, not embedded, and never by a host path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The drive's name in the machine; unique.
    pub id: String,
    /// The storage backend that holds the layer.
    pub backend: String,
    /// The layer that was frozen at the same point as the memory.
    pub layer: String,
    /// Bytes that the guest sees; a multiple of 512, not zero.
    pub size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// The section's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disks(pub(crate) Vec<Disk>);

impl Payload for Disks {
    const KIND: SectionKind = SectionKind(*b"DISK");
    const VERSION: u16 = 1;
}

impl Disks {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        Broken::if_more("disks", self.0.len(), MAX_DISKS)?;
        let mut ids = HashSet::new();
        for disk in &self.0 {
            text::label("a disk's id", &disk.id)?;
            text::label("a disk's backend", &disk.backend)?;
            text::label("a disk's layer", &disk.layer)?;
            if disk.size == 0 || !disk.size.is_multiple_of(512) {
                return Err(Broken::Rule(
                    "a disk's size is not a positive multiple of 512",
                ));
            }
            if !ids.insert(&disk.id) {
                return Err(Broken::Rule("two disks have the same id"));
            }
        }
        Ok(())
    }
}
