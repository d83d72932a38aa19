//! The **reflink** backend: btrfs and XFS, every layer and every fork a clone that shares blocks.
//!
//! A clone (FICLONE) copies the map of a file's extents, not its bytes, and the file system copies
//! a block when one side writes to it. Volumes and layers are independent files: any may be
//! deleted at any time. A clone is ordered before the rename that names it, so a fork need not be
//! synced when it is made.

mod fiemap;

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, ioctl_ficlone};
use rustix::io::{Errno, retry_on_intr};

use crate::durable::NewFile;
use crate::filesystem::FileSystem;
use crate::raw::{Duplicate, RawStore, write_all_at};
use crate::{Capabilities, Error, ErrorKind, ForkCost, StorageBackend};

/// The backend's name.
pub const NAME: &str = "reflink";

/// Opens the directory `dir` as a reflink store, making it one if it is empty or absent.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the directory is not on btrfs or on an XFS that was made with
/// `reflink=1`; [`ErrorKind::ForeignStore`] when another backend has it.
pub fn open(dir: &Path) -> Result<Arc<dyn StorageBackend>, Error> {
    Ok(Arc::new(RawStore::<Clones>::open(dir)?))
}

/// What [`open`] would give, without making anything that stays.
///
/// # Errors
/// As for [`open`].
pub fn probe(dir: &Path) -> Result<Capabilities, Error> {
    RawStore::<Clones>::probe(dir)
}

/// Why a directory cannot hold a reflink store.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "the file system is {0}, and reflink needs btrfs or XFS: choose a directory on one of \
         these, or the qcow2 backend, or copy"
    )]
    FileSystem(FileSystem),
    #[error(
        "this {0} does not clone files (an XFS must be made with reflink=1): choose another \
         directory, or the qcow2 backend, or copy"
    )]
    NoClones(FileSystem),
}

/// Clones files.
#[derive(Debug)]
struct Clones;

impl Duplicate for Clones {
    const KIND: &'static str = NAME;
    const SHARES_BLOCKS: bool = true;
    const COST: ForkCost = ForkCost::Extents;
    const ATOMIC: bool = true;

    /// The file system's name decides, and a clone that is tried: others can clone too, but not
    /// with the guarantees on order that forks rely on here.
    fn try_in(dir: BorrowedFd<'_>, scratch: &File, path: &Path) -> Result<Self, Error> {
        let fail = |e: io::Error| Error::io("open the reflink store", path.display(), e);
        let refuse = |why| {
            let object = path.display();
            Error::because(
                ErrorKind::Unsupported,
                "open the reflink store",
                object,
                why,
            )
        };
        let file_system = FileSystem::of(scratch).map_err(fail)?;
        if !matches!(file_system, FileSystem::Btrfs | FileSystem::Xfs) {
            return Err(refuse(Refusal::FileSystem(file_system)));
        }
        write_all_at(scratch, &[IoSlice::new(&[1; 4096])], 0).map_err(fail)?;
        let target = NewFile::create(dir, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        match retry_on_intr(|| ioctl_ficlone(target.file(), scratch)) {
            Ok(()) => Ok(Self),
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => Err(refuse(Refusal::NoClones(file_system))),
            Err(e) => Err(fail(e.into())),
        }
    }

    fn duplicate(&self, from: &File, to: &File, _size: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| ioctl_ficlone(to, from))?)
    }

    fn shared(&self, file: &File) -> io::Result<u64> {
        fiemap::shared_bytes(file)
    }
}
