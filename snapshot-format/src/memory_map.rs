//! The section `MEMY`: where guest memory lies in the memory image, and the digests of its chunks.
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
        reason = "tests compute with small constants"
    )
)]

use serde::{Deserialize, Serialize};

use crate::error::Broken;
use crate::limits::{MAX_CHUNK_SIZE, MAX_CHUNKS, MAX_IMAGE_LEN, MAX_REGIONS};
use crate::{Digest, Error, ErrorKind, Payload, Place, SectionKind};

/// The chunk size that our machines use: large enough that digests are 0.003 % of memory, small enough
/// to hash within a millisecond.
const DEFAULT_CHUNK_SIZE: u32 = 1 << 20;
/// Guest physical addresses end here (x86-64: 52 bits).
const GUEST_END: u64 = 1 << 52;

/// A region of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest physical address of its first byte.
    pub guest_start: u64,
    /// Bytes.
    pub length: u64,
}

/// A chunk of the memory image: what one digest covers. It lies within one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Chunk {
    /// The chunk's number through all regions.
    pub index: u64,
    /// Guest physical address of its first byte.
    pub guest_start: u64,
    /// Where in the image it starts.
    pub file_offset: u64,
    /// Bytes; at most the chunk size.
    pub length: u64,
}

impl Chunk {
    pub(crate) fn place(&self) -> Place {
        Place::Chunk {
            index: self.index,
            file_offset: self.file_offset,
        }
    }
}

/// What a chunk must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkDigest {
    /// Zeros only.
    Zero,
    /// Bytes with this BLAKE3-256 hash, at least one of them not zero.
    Blake3(Digest),
}

/// A region and where the image holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    region: Region,
    file_offset: u64,
    first_chunk: u64,
}

/// The checked shape of guest memory and its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    page_size: u32,
    chunk_size: u32,
    regions: Vec<Placed>,
    image_len: u64,
    chunks: u64,
}

fn rule(detail: &'static str) -> Result<(), Broken> {
    Err(Broken::Rule(detail))
}

fn malformed(source: Broken) -> Error {
    let place = Place::Section {
        kind: Wire::KIND,
        instance: 0,
    };
    Error::because(
        ErrorKind::Malformed,
        place,
        "the memory map breaks a rule",
        source,
    )
}

impl MemoryLayout {
    /// The layout of `regions` with pages of 4 KiB and chunks of 1 MiB.
    ///
    /// # Errors
    /// As [`Self::with_sizes`].
    pub fn new(regions: &[Region]) -> Result<Self, Error> {
        Self::with_sizes(4096, DEFAULT_CHUNK_SIZE, regions)
    }

    /// The layout of `regions` with sizes of pages and chunks in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] when the regions are not ascending, overlap, are not on page boundaries, or
    /// anything exceeds a cap of the format.
    pub fn with_sizes(page_size: u32, chunk_size: u32, regions: &[Region]) -> Result<Self, Error> {
        Self::checked(page_size, chunk_size, regions).map_err(malformed)
    }

    fn checked(page_size: u32, chunk_size: u32, regions: &[Region]) -> Result<Self, Broken> {
        if !page_size.is_power_of_two() || !(4096..=65536).contains(&page_size) {
            rule("the page size is not a power of two from 4 KiB to 64 KiB")?;
        }
        if !chunk_size.is_power_of_two() || !(page_size..=MAX_CHUNK_SIZE).contains(&chunk_size) {
            rule("the chunk size is not a power of two from a page to 64 MiB")?;
        }
        if regions.is_empty() {
            rule("there is no region")?;
        }
        Broken::if_more("regions", regions.len(), MAX_REGIONS)?;
        let mut layout = Self {
            page_size,
            chunk_size,
            regions: Vec::with_capacity(regions.len()),
            image_len: 0,
            chunks: 0,
        };
        let page = u64::from(page_size);
        let mut guest_end = 0u64;
        for region in regions {
            let Region {
                guest_start,
                length,
            } = *region;
            if length == 0 || !length.is_multiple_of(page) || !guest_start.is_multiple_of(page) {
                rule("a region is empty or not on page boundaries")?;
            }
            if guest_start < guest_end {
                rule("regions overlap or do not ascend")?;
            }
            guest_end = guest_start.saturating_add(length);
            if guest_end > GUEST_END {
                rule("a region ends past the guest's address space")?;
            }
            layout.regions.push(Placed {
                region: *region,
                file_offset: layout.image_len,
                first_chunk: layout.chunks,
            });
            layout.image_len = layout.image_len.saturating_add(length);
            let chunks = length.div_ceil(u64::from(chunk_size));
            layout.chunks = layout.chunks.saturating_add(chunks);
        }
        if layout.image_len > MAX_IMAGE_LEN {
            rule("the image is larger than any may be")?;
        }
        if layout.chunks > MAX_CHUNKS {
            rule("there are more chunks than any image may have")?;
        }
        Ok(layout)
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Bytes of a chunk that is not cut short by its region's end.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// The regions, ascending, each with its offset in the image.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = (Region, u64)> {
        self.regions.iter().map(|p| (p.region, p.file_offset))
    }

    /// Bytes of the image: the sum of the regions.
    #[must_use]
    pub fn image_len(&self) -> u64 {
        self.image_len
    }

    /// How many chunks there are.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.chunks
    }

    /// The chunk of this number.
    #[must_use]
    pub fn chunk(&self, index: u64) -> Option<Chunk> {
        if index >= self.chunks {
            return None;
        }
        let after = self.regions.partition_point(|p| p.first_chunk <= index);
        let placed = self.regions.get(after.checked_sub(1)?)?;
        let size = u64::from(self.chunk_size);
        let within = index.checked_sub(placed.first_chunk)?.checked_mul(size)?;
        Some(Chunk {
            index,
            guest_start: placed.region.guest_start.checked_add(within)?,
            file_offset: placed.file_offset.checked_add(within)?,
            length: placed.region.length.checked_sub(within)?.min(size),
        })
    }

    /// All chunks in order.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> {
        (0..self.chunks).map_while(|index| self.chunk(index))
    }
}

/// The layout of guest memory, and what each chunk must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    layout: MemoryLayout,
    /// One bit a chunk, lowest first: the chunk is zero.
    zero: Vec<u8>,
    /// For each byte of `zero`: how many chunks before it are not zero.
    rank: Vec<u32>,
    /// Of the chunks that are not zero, in order.
    digests: Vec<Digest>,
}

impl MemoryMap {
    /// The map of `layout` whose chunks hold what `digests` say, in order.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] when there are not as many digests as chunks.
    pub fn new(
        layout: MemoryLayout,
        digests: impl IntoIterator<Item = ChunkDigest>,
    ) -> Result<Self, Error> {
        let mut zero = Vec::new();
        let mut known = Vec::new();
        let mut count = 0u64;
        for digest in digests {
            let bit = count & 7;
            if bit == 0 {
                zero.push(0);
            }
            count = count.saturating_add(1);
            match digest {
                ChunkDigest::Zero => {
                    if let Some(last) = zero.last_mut() {
                        *last |= 1u8 << bit;
                    }
                }
                ChunkDigest::Blake3(digest) => known.push(digest),
            }
        }
        if count != layout.chunk_count() {
            return Err(malformed(Broken::Rule(
                "there are not as many digests as chunks",
            )));
        }
        Self::checked(layout, zero, known).map_err(malformed)
    }

    fn checked(layout: MemoryLayout, zero: Vec<u8>, digests: Vec<Digest>) -> Result<Self, Broken> {
        if zero.len() as u64 != layout.chunk_count().div_ceil(8) {
            rule("the zero bits are not as many as the chunks")?;
        }
        let unused = (zero.len() as u64)
            .saturating_mul(8)
            .saturating_sub(layout.chunk_count());
        if zero
            .last()
            .is_some_and(|b| u64::from(b.leading_zeros()) < unused)
        {
            rule("unused zero bits are set")?;
        }
        let mut rank = Vec::with_capacity(zero.len());
        let mut data_chunks = 0u32;
        for byte in &zero {
            rank.push(data_chunks);
            data_chunks = data_chunks.saturating_add(byte.count_zeros());
        }
        let data_chunks = u64::from(data_chunks).saturating_sub(unused);
        if digests.len() as u64 != data_chunks {
            rule("the digests are not as many as the chunks that are not zero")?;
        }
        Ok(Self {
            layout,
            zero,
            rank,
            digests,
        })
    }

    /// The layout.
    #[must_use]
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// How many chunks are not zero.
    #[must_use]
    pub fn data_chunks(&self) -> u64 {
        self.digests.len() as u64
    }

    /// What the chunk of this number must hold.
    #[must_use]
    pub fn digest(&self, index: u64) -> Option<ChunkDigest> {
        if index >= self.layout.chunk_count() {
            return None;
        }
        let byte = usize::try_from(index >> 3).ok()?;
        let bits = *self.zero.get(byte)?;
        let mask = 1u8 << (index & 7);
        if bits & mask != 0 {
            return Some(ChunkDigest::Zero);
        }
        let before = (!bits & mask.wrapping_sub(1)).count_ones();
        let position = self.rank.get(byte)?.checked_add(before)?;
        let digest = self.digests.get(usize::try_from(position).ok()?)?;
        Some(ChunkDigest::Blake3(*digest))
    }

    pub(crate) fn to_wire(&self) -> Wire {
        Wire {
            page_size: self.layout.page_size,
            chunk_size: self.layout.chunk_size,
            regions: self.layout.regions.iter().map(|p| p.region).collect(),
            zero_chunks: Bytes(self.zero.clone()),
            digests: Bytes(self.digests.iter().flat_map(|d| d.0).collect()),
        }
    }

    pub(crate) fn from_wire(wire: Wire) -> Result<Self, Broken> {
        let layout = MemoryLayout::checked(wire.page_size, wire.chunk_size, &wire.regions)?;
        let (digests, rest) = wire.digests.0.as_chunks::<{ Digest::LEN }>();
        if !rest.is_empty() {
            rule("the digests are not whole")?;
        }
        Self::checked(
            layout,
            wire.zero_chunks.0,
            digests.iter().copied().map(Digest).collect(),
        )
    }
}

/// The section's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wire {
    page_size: u32,
    chunk_size: u32,
    regions: Vec<Region>,
    zero_chunks: Bytes,
    digests: Bytes,
}

impl Payload for Wire {
    const KIND: SectionKind = SectionKind(*b"MEMY");
    const VERSION: u16 = 1;
}

/// A byte string: serde would take a `Vec<u8>` byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bytes(Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a byte string")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

#[cfg(test)]
mod tests;
