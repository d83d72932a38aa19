//! What `inspect` shows, in the shape that its JSON has.

use offshoot_snapshot_format::{
    ChunkDigest, Digest, Disk, Header, Manifest, MemoryMap, Metadata, Requirements, SectionInfo,
};
use serde::Serialize;

/// A snapshot.
#[derive(Debug, Serialize)]
pub(crate) struct View<'a> {
    pub(crate) header: &'a Header,
    /// BLAKE3 of the manifest: pins everything but the disks.
    pub(crate) manifest_digest: Digest,
    pub(crate) metadata: &'a Metadata,
    pub(crate) requirements: &'a Requirements,
    pub(crate) memory: Memory,
    pub(crate) disks: &'a [Disk],
    pub(crate) sections: Vec<SectionInfo>,
}

/// The memory image.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) bytes: u64,
    pub(crate) page_size: u32,
    pub(crate) chunk_size: u32,
    pub(crate) chunks: u64,
    pub(crate) zero_chunks: u64,
    pub(crate) regions: Vec<Region>,
    /// One a chunk; `null` where all its bytes are zero.
    pub(crate) digests: Vec<Option<Digest>>,
}

/// A region of guest memory.
#[derive(Debug, Serialize)]
pub(crate) struct Region {
    pub(crate) guest_start: u64,
    pub(crate) length: u64,
    pub(crate) file_offset: u64,
}

impl<'a> View<'a> {
    pub(crate) fn new(manifest: &'a Manifest) -> Self {
        Self {
            header: manifest.header(),
            manifest_digest: manifest.digest(),
            metadata: manifest.metadata(),
            requirements: manifest.requirements(),
            memory: Memory::new(manifest.memory_map()),
            disks: manifest.disks(),
            sections: manifest.section_infos().collect(),
        }
    }
}

impl Memory {
    fn new(map: &MemoryMap) -> Self {
        let layout = map.layout();
        let digest = |index| match map.digest(index) {
            Some(ChunkDigest::Blake3(digest)) => Some(digest),
            Some(ChunkDigest::Zero) | None => None,
        };
        Self {
            bytes: layout.image_len(),
            page_size: layout.page_size(),
            chunk_size: layout.chunk_size(),
            chunks: layout.chunk_count(),
            zero_chunks: layout.chunk_count() - map.data_chunks(),
            regions: layout
                .regions()
                .map(|(region, file_offset)| Region {
                    guest_start: region.guest_start,
                    length: region.length,
                    file_offset,
                })
                .collect(),
            digests: (0..layout.chunk_count()).map(digest).collect(),
        }
    }
}
