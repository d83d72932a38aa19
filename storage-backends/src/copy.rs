//! The **copy** backend: any directory, every layer and every fork a full copy.
//!
//! Holes stay holes, so that a copy takes the time and the space of the content, not of the size.
//! Blocks are never shared, also where the file system could: who chooses this backend may rely on
//! a fork having its own space, so that a later write to it needs none (btrfs and others that never
//! write in place excepted).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::copy_file_range;
use rustix::io::retry_on_intr;

use crate::filesystem::FileSystem;
use crate::raw::{DataRanges, Duplicate, RawStore, read_exact_at, write_all_at};
use crate::{Capabilities, Error, ForkCost, StorageBackend};

/// The backend's name.
pub const NAME: &str = "copy";

/// How much is copied at once through memory.
const CHUNK: usize = 1 << 20;

/// Opens the directory `dir` as a copy store, making it one if it is empty or absent.
///
/// # Errors
/// [`ErrorKind::ForeignStore`](crate::ErrorKind) when another backend has it; when it cannot be
/// written.
pub fn open(dir: &Path) -> Result<Arc<dyn StorageBackend>, Error> {
    Ok(Arc::new(RawStore::<FullCopy>::open(dir)?))
}

/// What [`open`] would give, without making anything that stays.
///
/// # Errors
/// As for [`open`].
pub fn probe(dir: &Path) -> Result<Capabilities, Error> {
    RawStore::<FullCopy>::probe(dir)
}

/// Copies bytes.
#[derive(Debug)]
struct FullCopy {
    /// The kernel may do the copying: this file system does not take the chance to share blocks.
    in_kernel: bool,
}

impl Duplicate for FullCopy {
    const KIND: &'static str = NAME;
    const SHARES_BLOCKS: bool = false;
    const COST: ForkCost = ForkCost::Bytes;
    const ATOMIC: bool = false;

    fn try_in(_dir: BorrowedFd<'_>, scratch: &File, path: &Path) -> Result<Self, Error> {
        let file_system = FileSystem::of(scratch)
            .map_err(|e| Error::io("open the copy store", path.display(), e))?;
        Ok(Self {
            in_kernel: matches!(file_system, FileSystem::Ext4 | FileSystem::Tmpfs),
        })
    }

    fn duplicate(&self, from: &File, to: &File, size: u64) -> io::Result<()> {
        to.set_len(size)?;
        for range in DataRanges::new(from, 0..size) {
            if self.in_kernel {
                copy_in_kernel(from, to, range?)?;
            } else {
                copy_through_memory(from, to, range?)?;
            }
        }
        Ok(())
    }

    fn shared(&self, _file: &File) -> io::Result<u64> {
        Ok(0)
    }
}

fn copy_in_kernel(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let (mut read_at, mut write_at) = (range.start, range.start);
    while read_at < range.end {
        let left = usize::try_from(range.end - read_at).unwrap_or(usize::MAX);
        let copied = retry_on_intr(|| {
            copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left)
        })?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn copy_through_memory(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut buf = vec![0; CHUNK];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).map_or(CHUNK, |left| left.min(CHUNK));
        let part = buf.split_at_mut(len).0;
        read_exact_at(from, &mut [IoSliceMut::new(part)], at)?;
        write_all_at(to, &[IoSlice::new(part)], at)?;
        at += len as u64;
    }
    Ok(())
}
