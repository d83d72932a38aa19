//! The file beneath a qcow2-rs image: what the library may do with it, and when.
//!
//! The library forgets that metadata is dirty before it has written it, and leaves a table that it
//! could not read in its cache as if it were empty. So it never hears of a failure that it would
//! not survive:
//! - **Metadata goes through a queue of ours.** While the library flushes, its writes are only
//!   noted down, in its order; [`ImageFile::replay`] then makes them, after the data that they point
//!   to, and keeps what could not be written for the next try. Tables that point to other tables
//!   are written after a sync, as for imago.
//! - **A failed read of metadata ends the image's use**: nothing is asked of the library again.
//! - **Writes outside a flush are guest data**; one to the header's cluster, or past what the refcount table
//!   covers, means that the library is doing something that it cannot do right, and ends the image's
//!   use, too.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qcow2_rs::error::Qcow2Result;
use qcow2_rs::ops::Qcow2IoOps;
use rustix::fs::{FallocateFlags, fallocate};

use crate::qcow2::header::Header;
use crate::qcow2::tables::ReadAt;

/// What the library is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Looking something up: it reads metadata.
    LookUp,
    /// Reading guest data.
    Read,
    /// Writing guest data; it reads metadata to find a place for it.
    Write,
    /// Writing metadata.
    Flush,
}

/// Why the library is not asked any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("metadata of the image could not be read; close it and open it again")]
    MetadataRead,
    #[error("the engine was about to write where it must not; close the image and open it again")]
    StrayWrite,
    #[error("the engine failed inside; close the image and open it again")]
    Panicked,
    #[error("the engine waits for itself; close the image and open it again")]
    Stuck,
}

/// A change of metadata that is yet to be made.
#[derive(Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
}

#[derive(Debug)]
struct Inner {
    /// `None` once the image was given up.
    file: Option<Arc<File>>,
    writable: bool,
    phase: Phase,
    queue: VecDeque<Change>,
    broken: Option<Broken>,
    /// Something was written since the last sync.
    unsynced: bool,
    /// In tests: whether writes of metadata and reads fail.
    #[cfg(test)]
    fail: (bool, bool),
}

/// An image's file. The lock inside is never contended: one thread at a time works on an image.
#[derive(Debug)]
pub(super) struct ImageFile {
    inner: Mutex<Inner>,
    /// Where guest data may be written.
    data: Range<u64>,
    /// Where the tables that point to tables lie: L1 and refcount table.
    roots: [Range<u64>; 2],
}

/// The library's handle on the file.
#[derive(Debug)]
pub(super) struct Handle(pub(super) Arc<ImageFile>);

impl ImageFile {
    pub(super) fn new(file: Arc<File>, header: &Header, writable: bool) -> Arc<Self> {
        let cluster = header.cluster_size();
        let (l1, refcounts) = (header.l1_offset, header.refcount_table_offset);
        let l1_bytes = u64::from(header.l1_entries).saturating_mul(8);
        let table_bytes = u64::from(header.refcount_table_clusters).saturating_mul(cluster);
        Arc::new(Self {
            inner: Mutex::new(Inner {
                file: Some(file),
                writable,
                phase: Phase::LookUp,
                queue: VecDeque::new(),
                broken: None,
                unsynced: writable,
                #[cfg(test)]
                fail: (false, false),
            }),
            data: cluster..super::covered(header),
            roots: [
                l1..l1.saturating_add(l1_bytes),
                refcounts..refcounts.saturating_add(table_bytes),
            ],
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what comes next; refused when the library is not to be asked any more.
    pub(super) fn enter(&self, phase: Phase) -> io::Result<()> {
        let mut inner = self.lock();
        inner.phase = phase;
        inner.usable()
    }

    pub(super) fn break_off(&self, why: Broken) {
        self.lock().broken.get_or_insert(why);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    /// From now on every write is refused.
    pub(super) fn seal(&self) {
        self.lock().writable = false;
    }

    /// Whether writes are refused.
    pub(super) fn is_sealed(&self) -> bool {
        !self.lock().writable
    }

    /// Lets go of the descriptor, and with it of the lock on the file.
    pub(super) fn close(&self) {
        self.lock().file = None;
    }

    #[cfg(test)]
    pub(super) fn fail_writes(&self, fail: bool) {
        self.lock().fail.0 = fail;
    }

    #[cfg(test)]
    pub(super) fn fail_reads(&self, fail: bool) {
        self.lock().fail.1 = fail;
    }

    /// Makes a range of guest data a hole that reads as zeroes.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        inner.may_write()?;
        inner.unsynced = true;
        zero(inner.file()?, offset, len)
    }

    /// Makes the changes that wait, in their order. With `barrier`, what was written before is on
    /// the disk before the first of them. What fails stays, with all behind it.
    pub(super) fn replay(&self, barrier: bool) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.queue.is_empty() {
            return Ok(());
        }
        inner.may_write()?;
        if barrier {
            inner.sync()?;
        }
        while let Some(change) = inner.queue.pop_front() {
            let done = inner.make(&change, &self.roots);
            if let Err(e) = done {
                inner.queue.push_front(change);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Returns once everything written before would survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.lock().sync()
    }

    fn may_write_data(&self, inner: &mut Inner, offset: u64, len: u64) -> io::Result<()> {
        inner.may_write()?;
        let end = offset.checked_add(len);
        let inside = offset >= self.data.start && end.is_some_and(|end| end <= self.data.end);
        if inside && inner.phase == Phase::Write {
            return Ok(());
        }
        inner.broken.get_or_insert(Broken::StrayWrite);
        Err(io::Error::other(Broken::StrayWrite))
    }
}

impl Inner {
    fn usable(&self) -> io::Result<()> {
        self.broken.map_or(Ok(()), |why| Err(io::Error::other(why)))
    }

    fn may_write(&self) -> io::Result<()> {
        self.usable()?;
        if self.writable {
            Ok(())
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }

    fn file(&self) -> io::Result<&File> {
        let file = self.file.as_deref();
        file.ok_or_else(|| io::Error::other("the image is closed"))
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.unsynced {
            self.file()?.sync_data()?;
            self.unsynced = false;
        }
        Ok(())
    }

    fn make(&mut self, change: &Change, roots: &[Range<u64>]) -> io::Result<()> {
        let offset = match change {
            Change::Write(offset, _) | Change::Zero(offset, _) => *offset,
        };
        if roots.iter().any(|root| root.contains(&offset)) {
            self.sync()?;
        }
        self.unsynced = true;
        #[cfg(test)]
        if self.fail.0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match change {
            Change::Write(offset, bytes) => self.file()?.write_all_at(bytes, *offset),
            Change::Zero(offset, len) => zero(self.file()?, *offset, *len),
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        if self.fail.1 {
            return Err(io::Error::other("made to fail"));
        }
        self.file()?.fill_at(buf, offset)?;
        // What could not be written yet is the newer truth.
        for change in &self.queue {
            match change {
                Change::Write(at, bytes) => {
                    overlay(buf, offset, *at, bytes.len() as u64, |to, skip| {
                        let from = bytes.get(skip..).unwrap_or_default();
                        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                    });
                }
                Change::Zero(at, len) => overlay(buf, offset, *at, *len, |to, _| to.fill(0)),
            }
        }
        Ok(())
    }
}

/// Calls `f` with the part of `buf` (which starts at `offset`) that `len` bytes at `at` cover, and how
/// many of these lie before it.
fn overlay(buf: &mut [u8], offset: u64, at: u64, len: u64, f: impl FnOnce(&mut [u8], usize)) {
    let start = at.max(offset);
    let end = at
        .saturating_add(len)
        .min(offset.saturating_add(buf.len() as u64));
    let part = |n: u64| usize::try_from(n).ok();
    if start < end
        && let (Some(from), Some(to), Some(skip)) = (
            part(start.saturating_sub(offset)),
            part(end.saturating_sub(offset)),
            part(start.saturating_sub(at)),
        )
        && let Some(covered) = buf.get_mut(from..to)
    {
        f(covered, skip);
    }
}

/// Makes a range of the file read as zeroes, and the file reach to its end.
fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let have = file.length()?;
    let end = offset.saturating_add(len);
    let inside = end.min(have).saturating_sub(offset);
    if inside > 0 {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(file, flags, offset, inside) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let mut done = 0;
                while done < inside {
                    let n = inside.saturating_sub(done).min(ZEROES.len() as u64);
                    let part = usize::try_from(n).ok().and_then(|n| ZEROES.get(..n));
                    file.write_all_at(part.unwrap_or(&ZEROES), offset.saturating_add(done))?;
                    done = done.saturating_add(n);
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
    if end > have {
        file.set_len(end)?;
    }
    Ok(())
}

impl Qcow2IoOps for Handle {
    async fn read_to(&self, offset: u64, buf: &mut [u8]) -> Qcow2Result<usize> {
        let mut inner = self.0.lock();
        if let Err(e) = inner.read(buf, offset) {
            // A table that was not read stays in the library's cache as one that is empty.
            if inner.phase != Phase::Read {
                inner.broken.get_or_insert(Broken::MetadataRead);
            }
            return Err(e.into());
        }
        Ok(buf.len())
    }

    async fn write_from(&self, offset: u64, buf: &[u8]) -> Qcow2Result<()> {
        let mut inner = self.0.lock();
        if inner.phase == Phase::Flush {
            inner.queue.push_back(Change::Write(offset, buf.to_vec()));
            return Ok(());
        }
        self.0
            .may_write_data(&mut inner, offset, buf.len() as u64)?;
        inner.unsynced = true;
        Ok(inner.file()?.write_all_at(buf, offset)?)
    }

    /// The library's name for zeroing a range.
    async fn fallocate(&self, offset: u64, len: usize, _flags: u32) -> Qcow2Result<()> {
        let mut inner = self.0.lock();
        let len = len as u64;
        if inner.phase == Phase::Flush {
            inner.queue.push_back(Change::Zero(offset, len));
            return Ok(());
        }
        self.0.may_write_data(&mut inner, offset, len)?;
        inner.unsynced = true;
        Ok(zero(inner.file()?, offset, len)?)
    }

    /// Syncs are ours: [`ImageFile::replay`] knows what must be on the disk before what.
    async fn fsync(&self, _offset: u64, _len: usize, _flags: u32) -> Qcow2Result<()> {
        Ok(())
    }
}
