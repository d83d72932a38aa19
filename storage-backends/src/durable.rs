//! Files that appear whole or not at all.
//!
//! A new file is made under a temporary name in the directory where it belongs, locked by its maker,
//! and renamed to its name when it is complete. What a dead process left under a temporary name is
//! told from what a living one is working on by that lock.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, fstat, fsync, linkat, openat, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::lock::{Lock, try_lock};

/// What temporary names start with; no volume or layer name does.
const TEMPORARY: &str = ".offshoot-new-";

/// How many times a temporary name is tried before the directory is called hopeless.
const ATTEMPTS: u32 = 64;

/// A new file that has no name yet that anybody would look for. Dropped before
/// [`publish`](Self::publish), it goes.
#[derive(Debug)]
pub(crate) struct NewFile<'a> {
    dir: BorrowedFd<'a>,
    name: String,
    /// `None` only once it is published.
    file: Option<File>,
}

impl<'a> NewFile<'a> {
    /// Makes an empty file in `dir`, open for reading and writing and locked exclusively.
    pub(crate) fn create(dir: BorrowedFd<'a>, mode: Mode) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        for _ in 0..ATTEMPTS {
            let name = format!(
                "{TEMPORARY}{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = match openat(dir, &name, flags, mode) {
                Ok(fd) => File::from(fd),
                // Left by another process that had this id (or has it in another namespace).
                Err(Errno::EXIST) => continue,
                Err(e) => return Err(e.into()),
            };
            // Somebody who cleans up may see the file before it is locked: then it is theirs.
            if try_lock(&file, Lock::Exclusive)? && is_named(dir, &name, &file)? {
                return Ok(Self {
                    dir,
                    name,
                    file: Some(file),
                });
            }
        }
        Err(io::Error::from(Errno::EXIST))
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        // `publish` takes the file and consumes `self`, so it is always there for others.
        self.file.as_ref().unwrap_or_else(|| unreachable!())
    }

    /// Its temporary name.
    #[cfg(test)]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Gives the file its name, unless that is taken ([`io::ErrorKind::AlreadyExists`]). The lock
    /// stays with the returned file. Neither content nor name is durable by this.
    pub(crate) fn publish<N: AsRef<OsStr> + ?Sized>(mut self, name: &N) -> io::Result<File> {
        rename_noreplace(self.dir, &self.name, name.as_ref())?;
        Ok(self.file.take().unwrap_or_else(|| unreachable!()))
    }
}

impl NewFile<'_> {
    /// Gives the file the name of another one, which loses it in the same moment. The lock stays
    /// with the returned file. Neither content nor name is durable by this.
    pub(crate) fn replace(mut self, name: &str) -> io::Result<File> {
        renameat(self.dir, &self.name, self.dir, name)?;
        Ok(self.file.take().unwrap_or_else(|| unreachable!()))
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if self.file.is_some()
            && let Err(error) = unlinkat(self.dir, &self.name, AtFlags::empty())
        {
            tracing::warn!(name = self.name, %error, "an unfinished file could not be removed");
        }
    }
}

/// Renames within `dir`, never over an existing file.
pub(crate) fn rename_noreplace(dir: BorrowedFd<'_>, from: &str, to: &OsStr) -> io::Result<()> {
    match renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => link_then_unlink(dir, from, to),
        other => Ok(other?),
    }
}

/// The same on file systems without RENAME_NOREPLACE (NFS): a link never replaces. A crash in
/// between leaves both names; the temporary one is cleaned up later.
fn link_then_unlink(dir: BorrowedFd<'_>, from: &str, to: &OsStr) -> io::Result<()> {
    linkat(dir, from, dir, to, AtFlags::empty())?;
    unlinkat(dir, from, AtFlags::empty())?;
    Ok(())
}

/// Whether `dir` has anything of this name.
pub(crate) fn is_taken(dir: BorrowedFd<'_>, name: impl AsRef<OsStr>) -> io::Result<bool> {
    match statat(dir, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether `name` in `dir` is still the file that `file` has open.
pub(crate) fn is_named(dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<bool> {
    let open = fstat(file)?;
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(named) => Ok(named.st_dev == open.st_dev && named.st_ino == open.st_ino),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Makes the names in `dir` durable.
pub(crate) fn sync_dir(dir: impl AsFd) -> io::Result<()> {
    Ok(fsync(dir)?)
}

/// Whether `name` is one that [`NewFile`] makes.
pub(crate) fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY)
}

/// Removes `name` from `dir` if no living process holds it, and tells whether it did. Anything but
/// a regular file is left alone.
pub(crate) fn remove_if_abandoned(dir: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    let file = match open_regular(dir, name, OFlags::RDONLY) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(_) => return Ok(false),
    };
    if !try_lock(&file, Lock::Exclusive)? || !is_named(dir, name, &file)? {
        return Ok(false);
    }
    unlinkat(dir, name, AtFlags::empty())?;
    Ok(true)
}

/// Opens a regular file in `dir` without following a symbolic link and without waiting for the
/// other end of a FIFO.
pub(crate) fn open_regular(dir: BorrowedFd<'_>, name: &str, access: OFlags) -> io::Result<File> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd: OwnedFd = openat(dir, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::RegularFile {
        Ok(File::from(fd))
    } else {
        Err(io::Error::from(NotRegular))
    }
}

/// Found where a regular file belongs.
#[derive(Debug, thiserror::Error)]
#[error("it is not a regular file")]
pub(crate) struct NotRegular;

impl From<NotRegular> for io::Error {
    fn from(e: NotRegular) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        (dir, fd)
    }

    fn entries(dir: &tempfile::TempDir) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_unpublished_file_goes_when_dropped() {
        let (dir, fd) = dir();
        let new = NewFile::create(fd.as_fd(), Mode::RUSR | Mode::WUSR).unwrap();
        assert_eq!(entries(&dir).len(), 1);
        drop(new);
        assert!(entries(&dir).is_empty());
    }

    #[test]
    fn publishing_never_replaces() {
        for publish in [rename_noreplace, link_then_unlink] {
            let (dir, fd) = dir();
            std::fs::write(dir.path().join("taken"), "old").unwrap();
            let new = NewFile::create(fd.as_fd(), Mode::RUSR | Mode::WUSR).unwrap();
            let error = publish(fd.as_fd(), new.name(), "taken".as_ref()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            publish(fd.as_fd(), new.name(), "free".as_ref()).unwrap();
            drop(new);
            assert_eq!(entries(&dir), ["free", "taken"]);
            assert_eq!(std::fs::read(dir.path().join("taken")).unwrap(), b"old");
        }
    }

    #[test]
    fn a_living_makers_file_is_not_abandoned_and_a_dead_ones_is() {
        let (dir, fd) = dir();
        let new = NewFile::create(fd.as_fd(), Mode::RUSR | Mode::WUSR).unwrap();
        assert!(!remove_if_abandoned(fd.as_fd(), new.name()).unwrap());
        std::fs::write(dir.path().join(".offshoot-new-1-1"), "half").unwrap();
        assert!(remove_if_abandoned(fd.as_fd(), ".offshoot-new-1-1").unwrap());
        assert_eq!(entries(&dir), [new.name()]);
    }
}
