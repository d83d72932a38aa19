//! One image in the library's hands.
//!
//! The library gets a header that we wrote: of version 3, without a backing file, whatever the
//! image's own says. So it parses nothing that came from elsewhere, opens no file, and takes none of its
//! own ways of copying on write: they write what happened to be in memory where a backing file is
//! shorter than its overlay, and do not look whether they could read it. It reads and writes within
//! one cluster at a time: its requests over several hide which of them failed.

use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::error::{Qcow2Error, Qcow2Result};
use qcow2_rs::meta::{MappingSource, Qcow2Header};

use super::file::{Broken, Handle, ImageFile, Phase};
use super::{L2_SLICE_BITS, Mapped, Unfit, covered};
use crate::qcow2::format::header_bytes;
use crate::qcow2::header::Header;

/// What the library's caches may hold of a written image. It is never reached: see
/// [`Disk`](super::disk::Disk), and [`MAX_SLICES`].
const CACHE_SLICES: usize = MAX_SLICES + 64;
/// Slices of L2 tables after which the cache is emptied: 16 MiB, for 128 GiB of guest data at 64 KiB a
/// cluster.
pub(super) const MAX_SLICES: usize = 4096;
/// The same for an image that is only read: these are dropped and read again at will.
const READER_SLICES: usize = 512;
/// Slices of refcount blocks: one is enough for 2048 clusters.
const REFCOUNT_SLICES: usize = 16 << 10;

/// An open image.
pub(super) struct Device {
    /// `None` only while it is dropped.
    library: Option<Box<Qcow2Dev<Handle>>>,
    pub(super) file: Arc<ImageFile>,
    /// Size of the disk in the image.
    pub(super) size: u64,
    /// Bytes of a cluster.
    pub(super) cluster: u64,
    /// No cluster from this one on has been handed out.
    high: u64,
    /// Clusters that the refcount table covers.
    limit: u64,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("file", &self.file)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Device {
    pub(super) fn open(
        file: Arc<std::fs::File>,
        header: &Header,
        writable: bool,
    ) -> io::Result<Self> {
        Unfit::check(header, writable).map_err(io::Error::other)?;
        let ours = Header {
            backing: None,
            ..header.clone()
        };
        let bytes = header_bytes(&ours)?;
        let clusters = header.clusters_of(file.metadata()?.len());
        let file = ImageFile::new(file, header, writable);
        // A slice's host range must be less than 4 GiB, or the library's 32-bit sum comes back to 0.
        let refcount_bits = u8::try_from(32_u32.saturating_sub(header.cluster_bits))
            .unwrap_or(0)
            .min(L2_SLICE_BITS);
        let slices = if writable {
            CACHE_SLICES
        } else {
            READER_SLICES
        };
        let make = || -> Qcow2Result<Qcow2Dev<Handle>> {
            let header = Qcow2Header::from_buf(&bytes)?;
            let params = Qcow2DevParams::new(
                SECTOR_BITS,
                Some((refcount_bits, REFCOUNT_SLICES << refcount_bits)),
                Some((L2_SLICE_BITS, slices << L2_SLICE_BITS)),
                !writable,
                false,
            );
            Qcow2Dev::new(
                Path::new("image"),
                header,
                &params,
                Handle(Arc::clone(&file)),
            )
        };
        let library = catch_unwind(AssertUnwindSafe(make))
            .map_err(|_| io::Error::other(Broken::Panicked))?
            .map_err(Qcow2Error::into_inner)?;
        let device = Self {
            library: Some(Box::new(library)),
            size: header.size,
            cluster: header.cluster_size(),
            high: clusters,
            limit: covered(header) / header.cluster_size(),
            file,
        };
        device.ask(Phase::LookUp, |library| library.qcow2_prep_io())?;
        Ok(device)
    }

    /// Runs a call of the library to its end. All that it waits for is our file, which never makes it
    /// wait.
    fn ask<'a, T, F>(
        &'a self,
        phase: Phase,
        call: impl FnOnce(&'a Qcow2Dev<Handle>) -> F,
    ) -> io::Result<T>
    where
        F: Future<Output = Qcow2Result<T>>,
    {
        self.file.enter(phase)?;
        let library = self.library.as_deref();
        let library = library.ok_or_else(|| io::Error::other(Broken::Panicked))?;
        let outcome = match catch_unwind(AssertUnwindSafe(|| to_the_end(call(library)))) {
            Ok(Some(outcome)) => outcome.map_err(Qcow2Error::into_inner),
            Ok(None) => {
                self.file.break_off(Broken::Stuck);
                Err(io::Error::other(Broken::Stuck))
            }
            Err(_) => {
                self.file.break_off(Broken::Panicked);
                Err(io::Error::other(Broken::Panicked))
            }
        };
        // What it says after that is not to be relied on.
        self.file.enter(Phase::LookUp)?;
        outcome
    }

    /// What the image itself says about the cluster at `offset`.
    pub(super) fn mapped(&self, offset: u64) -> io::Result<Mapped> {
        let mapping = self.ask(Phase::LookUp, |library| library.get_mapping(offset))?;
        Ok(match (mapping.source, mapping.cluster_offset) {
            (MappingSource::DataFile, Some(at)) => Mapped::Data {
                at,
                owned: mapping.copied,
            },
            (MappingSource::Compressed, _) => Mapped::Compressed,
            (MappingSource::Zero, _) => Mapped::Zero,
            _ => Mapped::Nothing,
        })
    }

    /// Reads whole sectors inside one cluster that has data.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let want = buf.len();
        let got = self.ask(Phase::Read, |library| library.read_at(buf, offset))?;
        if got < want {
            return Err(io::Error::other(
                "the engine read less than it was asked for",
            ));
        }
        Ok(())
    }

    /// Writes whole sectors inside one cluster.
    pub(super) fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.ask(Phase::Write, |library| library.write_at(buf, offset))
    }

    /// Refuses to hand out more clusters than the refcount table has room for: the library's way of
    /// moving to a larger table leaves the old entries behind.
    pub(super) fn has_room(&self) -> io::Result<()> {
        /// A data cluster, an L2 table, a refcount block, and one for good measure.
        const MOST: u64 = 4;
        if self.high.saturating_add(MOST) > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the image's refcount table covers no more; flatten the volume",
            ));
        }
        Ok(())
    }

    /// Takes note of a cluster that was handed out.
    pub(super) fn handed_out(&mut self, offset: u64) {
        // Its L2 table may lie behind it only by as much as `has_room` allows for.
        self.high = self.high.max(offset / self.cluster + 2);
    }

    /// Puts all dirty metadata into the file's queue.
    pub(super) fn collect_metadata(&self) -> io::Result<()> {
        self.file.enter(Phase::Flush)?;
        if self.is_dirty() {
            self.ask(Phase::Flush, Qcow2Dev::flush_meta)?;
        }
        self.file.enter(Phase::LookUp)
    }

    /// Empties the caches; there is nothing dirty.
    pub(super) fn shrink(&self) -> io::Result<()> {
        self.ask(Phase::Flush, Qcow2Dev::shrink_caches)
    }

    fn is_dirty(&self) -> bool {
        self.library.as_ref().is_some_and(|l| l.need_flush_meta())
    }
}

impl Drop for Device {
    /// The library's cache asserts in its destructors that nothing in it is dirty, and the second
    /// assertion that fails ends the process. So a device with something dirty is never dropped: its
    /// memory stays, its file is closed.
    fn drop(&mut self) {
        if self.is_dirty() || self.file.is_broken() {
            self.file.close();
            std::mem::forget(self.library.take());
        }
    }
}

/// Sectors are what offsets and lengths are multiples of.
const SECTOR_BITS: u8 = 9;

/// Polls `future` until it is done; `None` when it waits for what will never come.
fn to_the_end<F: Future>(future: F) -> Option<F::Output> {
    /// Set when there is a reason to poll again.
    struct Again(AtomicBool);
    impl Wake for Again {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let again = Arc::new(Again(AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&again));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(done) => return Some(done),
            Poll::Pending if again.0.swap(false, Ordering::Relaxed) => {}
            Poll::Pending => return None,
        }
    }
}
