//! The file beneath an imago image, and the order in which its parts reach the disk.
//!
//! imago hands its writes to the kernel in a safe order but never waits for the disk between
//! them, so after a power cut any subset of the writes since the last sync may be there. Three things make
//! that safe:
//! 1. **Data before metadata.** A flush first waits for the data written so far, and only when imago then
//!    has metadata to write. So no table on the disk points past the end of the file or to a
//!    cluster whose data is not there.
//! 2. **Tables before the tables that point to them.** A write to the header, the L1 table or the
//!    refcount table (one for each 512 MiB of new guest space, at 64 KiB clusters) waits for all
//!    that was written before.
//! 3. **Refcounts are not believed** after a crash: opening an image for writing recounts them from the
//!    mapping tables ([`tables`](crate::qcow2::tables)), and no cluster is freed for another use
//!    while the image is open.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{FallocateFlags, fallocate};

use crate::qcow2::header::Header;

/// What the engine and imago's storage object share.
#[derive(Debug)]
pub(super) struct Shared {
    file: Arc<File>,
    writable: AtomicBool,
    /// Where the header, L1 table and refcount table lie.
    roots: [Range<u64>; 3],
    /// Set by a flush; the first write after it syncs. Held while syncing, so that no write
    /// overtakes the sync.
    barrier: Mutex<bool>,
}

impl Shared {
    pub(super) fn new(file: Arc<File>, header: &Header, writable: bool) -> Arc<Self> {
        let cluster = header.cluster_size();
        let refcount_table = header.refcount_table_offset;
        Arc::new(Self {
            file,
            writable: AtomicBool::new(writable),
            roots: [
                0..cluster,
                header.l1_offset..header.l1_offset + u64::from(header.l1_entries) * 8,
                refcount_table
                    ..refcount_table + u64::from(header.refcount_table_clusters) * cluster,
            ],
            barrier: Mutex::new(false),
        })
    }

    pub(super) fn arm_barrier(&self) {
        *self.barrier.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    pub(super) fn seal(&self) {
        self.writable.store(false, Ordering::Release);
    }

    /// Turns a range of the file into a hole that reads as zeroes.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.may_write()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&*self.file, flags, offset, len) {
            // The cluster is marked as zero already: a file system without holes loses nothing.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn may_write(&self) -> io::Result<()> {
        if self.writable.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }

    /// Waits for what has to be on the disk before a write to `offset`.
    fn before_write(&self, offset: u64) -> io::Result<()> {
        self.may_write()?;
        let mut armed = self.barrier.lock().unwrap_or_else(PoisonError::into_inner);
        if *armed || self.roots.iter().any(|r| r.contains(&offset)) {
            self.file.sync_data()?;
            *armed = false;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        self.before_write(offset)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROES.len() as u64);
            let part = usize::try_from(n).map_err(io::Error::other)?;
            self.file
                .write_all_at(ZEROES.get(..part).unwrap_or(&ZEROES), offset + done)?;
            done += n;
        }
        Ok(())
    }
}

/// imago's view of the file.
#[derive(Debug)]
pub(in crate::qcow2) struct ImageFile {
    shared: Arc<Shared>,
    helper: CommonStorageHelper,
}

impl ImageFile {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            helper: CommonStorageHelper::default(),
        }
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("image file")
    }
}

/// The methods that imago declares `unsafe` ask their caller for alignment and for exclusion of overlapping
/// requests. This file asks for no alignment, and overlapping requests are merely unordered.
impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.shared.file.metadata()?.len())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let mut bufs: Vec<IoSliceMut<'_>> = bufv.into_inner();
        let mut rest = &mut bufs[..];
        // Empty slices in front go: a call that is given nothing else does nothing.
        IoSliceMut::advance_slices(&mut rest, 0);
        while rest.iter().any(|b| !b.is_empty()) {
            let some = rest.len().min(MAX_IOV);
            let n = match rustix::io::preadv(&*self.shared.file, &mut rest[..some], offset) {
                Ok(0) => {
                    rest.iter_mut().for_each(|b| b.fill(0));
                    break;
                }
                Ok(n) => n,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            offset += n as u64;
            IoSliceMut::advance_slices(&mut rest, n);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        self.shared.before_write(offset)?;
        let mut bufs: Vec<IoSlice<'_>> = bufv.into_inner();
        let mut rest = &mut bufs[..];
        IoSlice::advance_slices(&mut rest, 0);
        while rest.iter().any(|b| !b.is_empty()) {
            let some = rest.len().min(MAX_IOV);
            let n = match rustix::io::pwritev(&*self.shared.file, &rest[..some], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => n,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            offset += n as u64;
            IoSlice::advance_slices(&mut rest, n);
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // A hole where the file system can make one inside the file; bytes elsewhere.
        if offset.saturating_add(length) <= self.size()? {
            self.shared.before_write(offset)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&*self.shared.file, flags, offset, length) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.shared.write_zeroes(offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.shared.write_zeroes(offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.shared.punch(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

/// The kernel's `UIO_MAXIOV`.
const MAX_IOV: usize = 1024;
