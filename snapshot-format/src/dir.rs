//! Files in a snapshot's directory, which may hold anything: links, FIFOs, devices.

use std::fs::File;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::{Error, ErrorKind, Place};

/// Opens the directory at `path`. Links in `path` are the caller's own and are followed.
pub(crate) fn open_dir(path: &Path) -> Result<File, Error> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|e| Error::io(Place::Directory, "cannot open it", e))
}

/// Opens the regular file `name` in `dir` for reading.
pub(crate) fn open_regular(dir: &File, name: &str, place: Place) -> Result<File, Error> {
    let not_regular = || Error::new(ErrorKind::Malformed, place, "it is not a regular file");
    let cannot_open = |e: Errno| Error::io(place, "cannot open it", e);
    // Asked first because opening a device can have effects of its own.
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(cannot_open)?;
    if !is_regular(&stat) {
        return Err(not_regular());
    }
    // Asked again because the entry may have been exchanged since; NONBLOCK, so that a FIFO does not block.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP) => return Err(not_regular()),
        Err(e) => return Err(cannot_open(e)),
    };
    if !is_regular(&stat_of(&file, place)?) {
        return Err(not_regular());
    }
    Ok(file)
}

/// Makes the file `name` in `dir`, which must not be there yet, for reading and writing.
pub(crate) fn create_file(dir: &File, name: &str, place: Place) -> Result<File, Error> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|e| Error::io(place, "cannot create it", e))
}

/// What `file` is now.
pub(crate) fn stat_of(file: &File, place: Place) -> Result<Stat, Error> {
    rustix::fs::fstat(file).map_err(|e| Error::io(place, "cannot examine it", e))
}

/// Bytes of a file.
pub(crate) fn size_of_file(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// What differs when a file was changed or exchanged.
pub(crate) fn fingerprint(stat: &Stat) -> impl PartialEq + use<> {
    (
        (stat.st_dev, stat.st_ino, stat.st_size),
        (stat.st_mtime, stat.st_mtime_nsec),
        (stat.st_ctime, stat.st_ctime_nsec),
    )
}

fn is_regular(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}
