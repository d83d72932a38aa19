//! Reading and verifying the memory image.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::dir::{fingerprint, stat_of};
use crate::{Chunk, ChunkDigest, Digest, Error, ErrorKind, MemoryMap, Place};

/// Bytes that are read at once: bounds memory whatever the chunk size of an image is.
const READ_LEN: usize = 1 << 20;
/// Verifying threads at most: more do not help once the medium is the bottleneck.
const MAX_THREADS: usize = 8;
/// An image under this size is verified without extra threads.
const ONE_THREAD_LEN: u64 = 16 << 20;

/// Whether an image's bytes are proven before the image is mapped. For a reader that copies instead of
/// mapping there is the third policy, on use: [`MemoryImage::read_chunk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verify {
    /// Every chunk against its digest, and that the file did not change meanwhile. It proves the bytes at that
    /// time: whoever may write to the file afterwards has to be kept away by its permissions.
    Eager,
    /// Nothing but the size: for images on storage that this host wrote, or has verified already.
    None,
}

/// How far verification has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the image that are verified, holes included.
    pub done: u64,
    /// Bytes of the image.
    pub total: u64,
}

/// The memory image of an open snapshot.
#[derive(Debug, Clone, Copy)]
pub struct MemoryImage<'a> {
    file: &'a File,
    map: &'a MemoryMap,
}

impl<'a> MemoryImage<'a> {
    pub(crate) fn new(file: &'a File, map: &'a MemoryMap) -> Self {
        Self { file, map }
    }

    /// The layout and digests.
    #[must_use]
    pub fn map(&self) -> &'a MemoryMap {
        self.map
    }

    /// Applies a verification policy and then gives the file, for mapping. The file was opened for reading; a mapping of
    /// it must be private. `progress` is called on this thread and may ask to stop.
    ///
    /// # Errors
    /// [`ErrorKind::Checksum`] naming a chunk that does not hold what it must, [`ErrorKind::Changed`] when the
    /// file changed meanwhile, [`ErrorKind::Cancelled`], or what the operating system said.
    pub fn prove(
        self,
        policy: Verify,
        progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<&'a File, Error> {
        match policy {
            Verify::Eager => self.verify(progress)?,
            Verify::None => {}
        }
        Ok(self.file)
    }

    /// Reads a chunk into the front of `into` and proves it: the way of a loader that fills memory on use. Returns
    /// the chunk's length. Where it fails, `into` holds zeros.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when there is no such chunk or `into` is too short for it, else as [`Self::prove`].
    pub fn read_chunk(self, index: u64, into: &mut [u8]) -> Result<usize, Error> {
        let misuse = |detail| Error::new(ErrorKind::Misuse, Place::Memory, detail);
        let (Some(chunk), Some(expected)) =
            (self.map.layout().chunk(index), self.map.digest(index))
        else {
            return Err(misuse("there is no such chunk"));
        };
        let bytes = usize::try_from(chunk.length)
            .ok()
            .and_then(|length| into.get_mut(..length))
            .ok_or_else(|| misuse("the buffer is shorter than the chunk"))?;
        let proven = self.read(&chunk, bytes, chunk.file_offset).and_then(|()| {
            let held = match expected {
                ChunkDigest::Zero => is_zero(bytes),
                ChunkDigest::Blake3(digest) => Digest::of(bytes) == digest,
            };
            if held { Ok(()) } else { Err(wrong(&chunk)) }
        });
        if proven.is_err() {
            bytes.fill(0);
        }
        proven.map(|()| bytes.len())
    }

    fn verify(self, mut progress: impl FnMut(Progress) -> ControlFlow<()>) -> Result<(), Error> {
        let before = fingerprint(&stat_of(self.file, Place::Memory)?);
        let mut done = 0u64;
        let total = self.map.layout().image_len();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS));
        let report = |length: u64| {
            done = done.saturating_add(length);
            progress(Progress { done, total })
        };
        if threads == 1 || total < ONE_THREAD_LEN {
            self.verify_here(report)?;
        } else {
            self.verify_in(threads, report)?;
        }
        if fingerprint(&stat_of(self.file, Place::Memory)?) != before {
            let detail = "it changed while it was verified";
            return Err(Error::new(ErrorKind::Changed, Place::Memory, detail));
        }
        Ok(())
    }

    fn verify_here(self, mut report: impl FnMut(u64) -> ControlFlow<()>) -> Result<(), Error> {
        let mut buffer = self.buffer();
        for chunk in self.map.layout().chunks() {
            self.verify_chunk(&chunk, &mut buffer)?;
            if report(chunk.length).is_break() {
                return Err(cancelled());
            }
        }
        Ok(())
    }

    /// Verifies on `threads` threads that take chunk after chunk; this one reports.
    fn verify_in(
        self,
        threads: usize,
        mut report: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let next = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for _ in 0..threads {
                let sender = sender.clone();
                let (next, stop) = (&next, &stop);
                let worker = move || {
                    let mut buffer = self.buffer();
                    while !stop.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(chunk) = self.map.layout().chunk(index) else {
                            break;
                        };
                        let proven = self.verify_chunk(&chunk, &mut buffer);
                        let failed = proven.is_err();
                        // The receiver outlives the workers.
                        let _ = sender.send((index, proven.map(|()| chunk.length)));
                        if failed {
                            break;
                        }
                    }
                };
                std::thread::Builder::new()
                    .name("snapshot-verify".into())
                    .spawn_scoped(scope, worker)
                    .map_err(|e| {
                        stop.store(true, Ordering::Relaxed);
                        Error::io(Place::Memory, "cannot start a verifying thread", e)
                    })?;
            }
            drop(sender);
            // Of several wrong chunks the first one is named, however the threads ran: chunks are taken in
            // order, so all before a wrong one are under way when it is found.
            let mut first_wrong: Option<(u64, Error)> = None;
            let mut stopped = false;
            for (index, proven) in receiver {
                match proven {
                    Ok(length) => {
                        if !stopped && report(length).is_break() {
                            stopped = true;
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        if first_wrong.as_ref().is_none_or(|(first, _)| index < *first) {
                            first_wrong = Some((index, error));
                        }
                    }
                }
            }
            match first_wrong {
                Some((_, error)) => Err(error),
                None if stopped => Err(cancelled()),
                None => Ok(()),
            }
        })
    }

    fn buffer(self) -> Vec<u8> {
        let chunk = usize::try_from(self.map.layout().chunk_size()).unwrap_or(READ_LEN);
        vec![0; chunk.min(READ_LEN)]
    }

    fn verify_chunk(self, chunk: &Chunk, buffer: &mut [u8]) -> Result<(), Error> {
        let held = match self.map.digest(chunk.index) {
            None => false,
            Some(ChunkDigest::Zero) if self.is_hole(chunk) => true,
            Some(ChunkDigest::Zero) => {
                let mut zero = true;
                self.read_pieces(chunk, buffer, |piece| zero &= is_zero(piece))?;
                zero
            }
            Some(ChunkDigest::Blake3(digest)) => {
                let mut hasher = blake3::Hasher::new();
                self.read_pieces(chunk, buffer, |piece| {
                    hasher.update(piece);
                })?;
                hasher.finalize() == digest.0
            }
        };
        if held { Ok(()) } else { Err(wrong(chunk)) }
    }

    /// Whether no byte of the chunk is stored. A file system that cannot tell counts as "no".
    fn is_hole(self, chunk: &Chunk) -> bool {
        let end = chunk.file_offset.saturating_add(chunk.length);
        // The file's position moves, and nothing here depends on it: all reads are positioned.
        match rustix::fs::seek(self.file, SeekFrom::Data(chunk.file_offset)) {
            Ok(data) => data >= end,
            Err(Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    fn read_pieces(
        self,
        chunk: &Chunk,
        buffer: &mut [u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Error> {
        let mut offset = chunk.file_offset;
        let mut left = chunk.length;
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let (piece, _) = buffer.split_at_mut(most);
            self.read(chunk, piece, offset)?;
            each(piece);
            offset = offset.saturating_add(piece.len() as u64);
            left = left.saturating_sub(piece.len() as u64);
        }
        Ok(())
    }

    fn read(self, chunk: &Chunk, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|e| match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    let detail = "the image became shorter while it was read";
                    Error::new(ErrorKind::Changed, chunk.place(), detail)
                }
                _ => Error::io(chunk.place(), "cannot read it", e),
            })
    }
}

fn wrong(chunk: &Chunk) -> Error {
    let detail = "its bytes are not those that were written";
    Error::new(ErrorKind::Checksum, chunk.place(), detail)
}

fn cancelled() -> Error {
    let detail = "verification was stopped by the caller";
    Error::new(ErrorKind::Cancelled, Place::Memory, detail)
}

/// Whether `bytes` are all zero; as fast as memory is read, also without optimisation.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes
        .chunks(ZEROS.len())
        .all(|piece| ZEROS.starts_with(piece))
}
