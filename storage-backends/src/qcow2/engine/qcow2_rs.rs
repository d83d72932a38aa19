//! The `qcow2-rs` engine: one thread a disk.
//!
//! The library is asynchronous and made for one thread, so a disk has a thread of its own, which
//! serves the requests of all others in order. It is started by the first request.
//!
//! What the library is not trusted with, and where that is kept from it:
//! | defect | fence |
//! |---|---|
//! | a backing file shorter than its overlay puts what was in memory into the image; a failed read while copying up does, too | it sees no backing file: [`device`], [`disk`] |
//! | internal snapshots are overwritten | the header check refuses them: [`checked_header`](super::super::layer::checked_header) |
//! | a device that is dropped while dirty ends the process | [`Device`](device::Device) is never dropped so |
//! | metadata whose write failed is forgotten; a table whose read failed is taken for empty | [`file`] |
//! | metadata is written without any order when the cache is full | the cache is never full: [`disk`] |
//! | requests over several clusters hide failures | one cluster a request: [`disk`] |
//! | the refcount table's growth leaves its old entries behind | never grown: [`Device::has_room`](device::Device::has_room) |
//! | refcounts of other than 16 bits, small clusters, version 2 | refused: [`Unfit`] |
//! | writing to a cluster that is not marked as owned loses its content, to one marked as zero its place | [`prepare_for_writing`](super::super::whole::prepare_for_writing) leaves none |
//!
//! Like a machine's other threads this one may be missing after a fork(2): the child finds out by
//! its process id and starts another one, over the same state, as nobody was asking at the fork. So the
//! state is not on the thread's stack, and a thread that has answered holds no lock of it. Nothing
//! that belongs to the old thread is touched in the child. A copy that a child never uses is
//! dropped without a word to the image: it is the parent's.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use self::disk::Disk;
use self::file::ImageFile;
use super::Engine;
use crate::qcow2::header::Header;
use crate::qcow2::layer::Top;
use crate::size::SECTOR;
use crate::{Error, ErrorKind};

mod device;
mod disk;
mod file;

/// Logarithm of the size of a slice of an L2 table.
const L2_SLICE_BITS: u8 = 12;

/// What an image says of a cluster of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapped {
    /// Nothing: it is as beneath.
    Nothing,
    /// It reads as zeroes.
    Zero,
    /// Its data is at this place in the file; `owned` when the entry says so.
    Data { at: u64, owned: bool },
    /// Its data is compressed.
    Compressed,
}

/// What this engine does not take, and imago does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::qcow2) enum Unfit {
    #[error(
        "the engine qcow2-rs reads version 3 only; this is version 2 (the engine imago takes it)"
    )]
    Version,
    #[error(
        "the engine qcow2-rs takes clusters of 4 KiB and more (the engine imago takes smaller ones)"
    )]
    SmallClusters,
    #[error(
        "the engine qcow2-rs takes disks of whole sectors of 512 bytes (the engine imago takes others)"
    )]
    PartialSector,
    #[error(
        "the engine qcow2-rs writes refcounts of 16 bits only (the engine imago writes others)"
    )]
    RefcountWidth,
}

impl Unfit {
    fn check(header: &Header, writable: bool) -> Result<(), Self> {
        if header.version != 3 {
            return Err(Self::Version);
        }
        if header.cluster_bits < L2_SLICE_BITS.into() {
            return Err(Self::SmallClusters);
        }
        if !header.size.is_multiple_of(SECTOR) {
            return Err(Self::PartialSector);
        }
        if writable && header.refcount_order != REFCOUNT_ORDER {
            return Err(Self::RefcountWidth);
        }
        Ok(())
    }
}

/// 16 bits.
const REFCOUNT_ORDER: u32 = 4;

/// Bytes of the file that the refcount table covers, with 16 bits a cluster.
fn covered(header: &Header) -> u64 {
    let cluster = header.cluster_size();
    let blocks = u64::from(header.refcount_table_clusters).saturating_mul(cluster / 8);
    blocks.saturating_mul(cluster / 2).saturating_mul(cluster)
}

/// One open disk.
#[derive(Debug)]
pub(super) struct Qcow2Rs {
    /// `None` inside once it is closed.
    disk: Arc<Mutex<Option<Disk>>>,
    file: Arc<ImageFile>,
    thread: Mutex<Thread>,
}

/// The thread that serves a disk, as the process that started it knows it.
#[derive(Debug)]
enum Thread {
    /// There is none yet.
    NotYet,
    Running {
        process: u32,
        jobs: mpsc::Sender<Job>,
        handle: JoinHandle<()>,
    },
}

#[derive(Debug)]
enum Request {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
    WriteBack,
    Flush,
}

#[derive(Debug)]
struct Job {
    request: Request,
    answer: SyncSender<io::Result<Vec<u8>>>,
}

fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qcow2Rs {
    pub(super) fn open(top: &Arc<Top>, operation: &'static str) -> Result<Self, Error> {
        for header in std::iter::once(&top.header)
            .chain(super::chain(top.backing.as_ref()).map(|layer| &layer.header))
        {
            let is_top = std::ptr::eq(header, &top.header);
            Unfit::check(header, is_top && top.writable)
                .map_err(|e| Error::because(ErrorKind::Unsupported, operation, &top.label, e))?;
        }
        let disk = Disk::open(top).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::Other => {
                Error::because(ErrorKind::Damaged, operation, &top.label, e)
            }
            _ => Error::io(operation, &top.label, e),
        })?;
        Ok(Self {
            file: Arc::clone(disk.file()),
            disk: Arc::new(Mutex::new(Some(disk))),
            thread: Mutex::new(Thread::NotYet),
        })
    }

    /// Has the disk's thread do something, and waits for it.
    fn ask(&self, request: Request) -> io::Result<Vec<u8>> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.give(Job { request, answer })?;
        answered
            .recv()
            .map_err(|_| io::Error::other("the disk's thread is gone"))?
    }

    fn give(&self, job: Job) -> io::Result<()> {
        let mut thread = lock(&self.thread);
        let is_ours =
            matches!(&*thread, Thread::Running { process, .. } if *process == std::process::id());
        if !is_ours {
            let (jobs, inbox) = mpsc::channel();
            let disk = Arc::clone(&self.disk);
            let handle = std::thread::Builder::new()
                .name("qcow2-rs".to_owned())
                .spawn(move || serve(&disk, &inbox))?;
            let new = Thread::Running {
                process: std::process::id(),
                jobs,
                handle,
            };
            // The locks of another process's channel may be held by nobody who is here.
            std::mem::forget(std::mem::replace(&mut *thread, new));
        }
        match &*thread {
            Thread::Running { jobs, .. } => jobs
                .send(job)
                .map_err(|_| io::Error::other("the disk's thread is gone")),
            Thread::NotYet => Err(io::Error::other("the disk has no thread")),
        }
    }
}

/// What the thread does. It answers last: whoever has the answer may fork the process, and the lock
/// on the disk is free then.
fn serve(disk: &Mutex<Option<Disk>>, inbox: &Receiver<Job>) {
    while let Ok(Job { request, answer }) = inbox.recv() {
        let outcome = match lock(disk).as_mut() {
            Some(disk) => handle(disk, request),
            None => Err(io::Error::other("the disk is closed")),
        };
        // Whoever asked may have gone.
        let _ = answer.send(outcome);
    }
    if let Some(disk) = lock(disk).take() {
        disk.close();
    }
}

fn handle(disk: &mut Disk, request: Request) -> io::Result<Vec<u8>> {
    match request {
        Request::Read { offset, len } => return disk.read(offset, len),
        Request::Write { offset, data } => disk.write(offset, &data)?,
        Request::WriteZeroes { offset, len, unmap } => disk.write_zeroes(offset, len, unmap)?,
        Request::WriteBack => disk.flush(false)?,
        Request::Flush => disk.flush(true)?,
    }
    Ok(Vec::new())
}

impl Engine for Qcow2Rs {
    fn read(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let len = bufs.iter().map(|b| b.len()).sum();
        let data = self.ask(Request::Read { offset, len })?;
        let mut rest = data.as_slice();
        for buf in bufs {
            let (part, after) = rest
                .split_at_checked(buf.len())
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(part);
            rest = after;
        }
        Ok(())
    }

    fn write(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let data = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        self.ask(Request::Write { offset, data }).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.ask(Request::WriteZeroes { offset, len, unmap })
            .map(drop)
    }

    fn write_back(&self) -> io::Result<()> {
        self.ask(Request::WriteBack).map(drop)
    }

    fn flush(&self) -> io::Result<()> {
        self.ask(Request::Flush).map(drop)
    }

    fn seal(&self) {
        self.file.seal();
    }
}

impl Drop for Qcow2Rs {
    /// Returns once the files are closed, so that their locks are free.
    fn drop(&mut self) {
        match std::mem::replace(&mut *lock(&self.thread), Thread::NotYet) {
            Thread::Running {
                process,
                jobs,
                handle,
            } if process == std::process::id() => {
                drop(jobs);
                if handle.join().is_err() {
                    tracing::error!("a disk's thread panicked");
                }
            }
            // A parent's: it goes on with the image, and this copy only lets go of it.
            theirs @ Thread::Running { .. } => std::mem::forget(theirs),
            // Nobody has asked anything of it.
            Thread::NotYet => {}
        }
        if let Some(disk) = lock(&self.disk).take() {
            disk.abandon();
        }
    }
}

#[cfg(test)]
mod tests;
