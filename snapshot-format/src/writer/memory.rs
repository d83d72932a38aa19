//! Writing the memory image, chunk by chunk, in any order, from any thread.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use crate::memory_image::is_zero;
use crate::{
    Chunk, ChunkDigest, Digest, Error, ErrorKind, MemoryLayout, MemoryMap, Place, SnapshotId,
};

/// Zero runs shorter than this are stored: many small holes would cost more in extents, calls and
/// page-cache folios than they save in space.
const HOLE_GRAIN: usize = 64 << 10;

/// What is known of a chunk that is to be written.
#[derive(Debug, Clone, Copy)]
enum Slot {
    Empty,
    /// A thread is writing it, or failed to.
    Claimed,
    Written(ChunkDigest),
}

/// A memory image that is being written. Several threads may write chunks at once.
#[derive(Debug)]
pub struct MemoryWriter {
    owner: SnapshotId,
    layout: MemoryLayout,
    file: File,
    slots: Mutex<Vec<Slot>>,
}

/// A memory image of which every chunk was written.
#[derive(Debug)]
#[must_use = "hand it to `SnapshotWriter::publish`"]
pub struct WrittenMemory {
    owner: SnapshotId,
    map: MemoryMap,
    file: File,
}

impl WrittenMemory {
    /// The layout and digests.
    #[must_use]
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    pub(super) fn into_parts(self) -> (SnapshotId, MemoryMap, File) {
        (self.owner, self.map, self.file)
    }
}

impl MemoryWriter {
    pub(super) fn new(owner: SnapshotId, layout: MemoryLayout, file: File) -> Self {
        let count = usize::try_from(layout.chunk_count()).unwrap_or(usize::MAX);
        Self {
            owner,
            file,
            slots: Mutex::new(vec![Slot::Empty; count]),
            layout,
        }
    }

    /// The layout, whose chunks are to be written.
    #[must_use]
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Writes all `bytes` of the chunk with this number. Zeros become holes.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when there is no such chunk, it was written before, or `bytes` are not as many as the chunk's;
    /// [`ErrorKind::StorageFull`] or what else the operating system said.
    pub fn write_chunk(&self, index: u64, bytes: &[u8]) -> Result<(), Error> {
        let chunk = self.claim(index)?;
        if bytes.len() as u64 != chunk.length {
            let detail = "the bytes are not as many as the chunk's";
            return Err(Error::new(ErrorKind::Misuse, chunk.place(), detail));
        }
        let digest = if self.write_data(&chunk, bytes)? {
            ChunkDigest::Blake3(Digest::of(bytes))
        } else {
            ChunkDigest::Zero
        };
        self.settle(index, digest);
        Ok(())
    }

    /// Declares that all bytes of the chunk with this number are zero.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when there is no such chunk or it was written before.
    pub fn zero_chunk(&self, index: u64) -> Result<(), Error> {
        self.claim(index)?;
        self.settle(index, ChunkDigest::Zero);
        Ok(())
    }

    /// Ends writing.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] naming the first chunk that was not written.
    pub fn finish(self) -> Result<WrittenMemory, Error> {
        let slots = self
            .slots
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let mut digests = Vec::with_capacity(slots.len());
        for (chunk, slot) in self.layout.chunks().zip(slots) {
            let Slot::Written(digest) = slot else {
                let detail = "the chunk was not written";
                return Err(Error::new(ErrorKind::Misuse, chunk.place(), detail));
            };
            digests.push(digest);
        }
        Ok(WrittenMemory {
            owner: self.owner,
            map: MemoryMap::new(self.layout, digests)?,
            file: self.file,
        })
    }

    /// Makes a chunk the calling thread's own.
    fn claim(&self, index: u64) -> Result<Chunk, Error> {
        let Some(chunk) = self.layout.chunk(index) else {
            let detail = "there is no chunk of this number";
            return Err(Error::new(ErrorKind::Misuse, Place::Memory, detail));
        };
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = usize::try_from(index).ok().and_then(|i| slots.get_mut(i));
        match slot {
            Some(slot @ Slot::Empty) => {
                *slot = Slot::Claimed;
                Ok(chunk)
            }
            _ => {
                let detail = "the chunk was written before";
                Err(Error::new(ErrorKind::Misuse, chunk.place(), detail))
            }
        }
    }

    fn settle(&self, index: u64, digest: ChunkDigest) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = usize::try_from(index).ok().and_then(|i| slots.get_mut(i)) {
            *slot = Slot::Written(digest);
        }
    }

    /// Writes what is not zero; tells whether there was anything.
    fn write_data(&self, chunk: &Chunk, bytes: &[u8]) -> Result<bool, Error> {
        let mut offset = chunk.file_offset;
        let mut any = false;
        let grains: Vec<&[u8]> = bytes.chunks(HOLE_GRAIN).collect();
        // Neighbouring grains that are data go out in one call.
        let mut rest = bytes;
        for run in grains.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let length = run.iter().map(|grain| grain.len()).sum();
            let (data, behind) = rest.split_at(length);
            rest = behind;
            if !is_zero(data) {
                any = true;
                self.file
                    .write_all_at(data, offset)
                    .map_err(|e| Error::io(chunk.place(), "cannot write it", e))?;
            }
            offset = offset.saturating_add(length as u64);
        }
        Ok(any)
    }
}
