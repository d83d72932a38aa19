//! The directory of a store.
//!
//! ```text
//! <dir>/offshoot-store        which backend owns the directory: "offshoot-store 1 <kind>\n"
//! <dir>/volumes/<name>.<ext>  one file a volume
//! <dir>/layers/<name>.<ext>   one file a layer
//! <dir>/*/.offshoot-new-<pid>-<n>  in the making, locked by its maker; see `durable`
//! ```
//!
//! All access goes through descriptors of the three directories, one path component at a time, and
//! follows no symbolic link beneath `<dir>`: whoever can plant a link in the store still cannot
//! make it reach a file elsewhere.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, fsync, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;

use crate::durable::{self, NewFile};
use crate::lock::{Lock, try_lock};
use crate::{Access, Error, ErrorKind};

const MARKER: &str = "offshoot-store";
/// Kinds are short; a longer marker is nobody's.
const MARKER_MAX: u64 = 128;

/// The two directories of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// Where volumes are.
    Volumes,
    /// Where layers are.
    Layers,
}

impl Room {
    fn as_str(self) -> &'static str {
        match self {
            Self::Volumes => "volumes",
            Self::Layers => "layers",
        }
    }

    fn thing(self) -> &'static str {
        match self {
            Self::Volumes => "volume",
            Self::Layers => "layer",
        }
    }
}

/// An opened store directory.
#[derive(Debug)]
pub(crate) struct StoreDir {
    path: PathBuf,
    extension: &'static str,
    volumes: OwnedFd,
    layers: OwnedFd,
}

impl StoreDir {
    /// The directories.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.volumes.as_fd(), self.layers.as_fd()]
    }

    /// Opens `path` as a store of `kind`, making it one if it is empty or absent (its parent must
    /// exist), and removes what dead processes left half-made.
    pub(crate) fn open(
        path: &Path,
        kind: &'static str,
        extension: &'static str,
    ) -> Result<Self, Error> {
        let fail = |e: io::Error| Error::io("open the store", path.display(), e);
        match mkdirat(CWD, path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(e.into())),
        }
        let root = open_dir(CWD, path).map_err(fail)?;
        match owner(&root, path)? {
            Some(owner) => check_owner(&owner, kind, path)?,
            None => {
                refuse_unmarked(&root, path)?;
                claim(root.as_fd(), kind, path)?;
            }
        }
        let store = Self {
            path: path.to_path_buf(),
            extension,
            volumes: make_room(&root, Room::Volumes).map_err(fail)?,
            layers: make_room(&root, Room::Layers).map_err(fail)?,
        };
        fsync(&root).map_err(|e| fail(e.into()))?;
        for dir in [root.as_fd(), store.volumes.as_fd(), store.layers.as_fd()] {
            store.clean(dir).map_err(fail)?;
        }
        Ok(store)
    }

    /// What a room's files are called in messages: "volume x of /srv/store".
    pub(crate) fn describe(&self, room: Room, name: &str) -> String {
        format!("{} {name} of {}", room.thing(), self.path.display())
    }

    /// An operating system error about a volume or layer. What no store makes (a link, a FIFO, a
    /// directory under a volume's name) is damage.
    pub(crate) fn error(
        &self,
        operation: &'static str,
        room: Room,
        name: &str,
        e: io::Error,
    ) -> Error {
        const NOT_OURS: [Errno; 4] = [Errno::LOOP, Errno::NXIO, Errno::ISDIR, Errno::NOTDIR];
        let object = self.describe(room, name);
        if e.kind() == io::ErrorKind::InvalidData
            || Errno::from_io_error(&e).is_some_and(|errno| NOT_OURS.contains(&errno))
        {
            Error::because(ErrorKind::Damaged, operation, object, e)
        } else {
            Error::io(operation, object, e)
        }
    }

    /// The directory of a room.
    pub(crate) fn room(&self, room: Room) -> BorrowedFd<'_> {
        match room {
            Room::Volumes => self.volumes.as_fd(),
            Room::Layers => self.layers.as_fd(),
        }
    }

    /// The file name of a volume or layer.
    pub(crate) fn file_name(&self, name: &str) -> String {
        format!("{name}.{}", self.extension)
    }

    /// A room's path, for messages and for libraries that take nothing else. It is as good as the
    /// one that the store was opened with.
    pub(crate) fn room_path(&self, room: Room) -> PathBuf {
        self.path.join(room.as_str())
    }

    /// Starts a new file in a room: mode 0600, locked exclusively.
    pub(crate) fn new_file(&self, room: Room) -> io::Result<NewFile<'_>> {
        NewFile::create(self.room(room), Mode::RUSR | Mode::WUSR)
    }

    /// Whether there is something of this name, before any work is put into making it. The answer
    /// that counts is that of [`NewFile::publish`].
    pub(crate) fn exists(&self, room: Room, name: &str) -> io::Result<bool> {
        durable::is_taken(self.room(room), self.file_name(name))
    }

    /// Opens the file of a volume or layer without a lock.
    pub(crate) fn open_unlocked(&self, room: Room, name: &str, access: Access) -> io::Result<File> {
        let flags = match access {
            Access::ReadWrite => OFlags::RDWR,
            Access::ReadOnly => OFlags::RDONLY,
        };
        durable::open_regular(self.room(room), &self.file_name(name), flags)
    }

    /// Opens the file of a volume or layer and locks it; `None` when somebody else's lock is in the
    /// way. What was deleted or replaced meanwhile is not found.
    pub(crate) fn open_locked(
        &self,
        room: Room,
        name: &str,
        access: Access,
        lock: Lock,
    ) -> io::Result<Option<File>> {
        let file = self.open_unlocked(room, name, access)?;
        if !try_lock(&file, lock)? {
            return Ok(None);
        }
        if durable::is_named(self.room(room), &self.file_name(name), &file)? {
            Ok(Some(file))
        } else {
            Err(Errno::NOENT.into())
        }
    }

    /// Removes the file of a volume or layer; the caller holds what lock it needs.
    pub(crate) fn remove(&self, room: Room, name: &str) -> io::Result<()> {
        Ok(unlinkat(
            self.room(room),
            self.file_name(name),
            AtFlags::empty(),
        )?)
    }

    /// The names in a room, sorted; files whose name is none are passed over.
    pub(crate) fn list<N>(
        &self,
        room: Room,
        parse: impl Fn(&str) -> Option<N>,
    ) -> Result<Vec<N>, Error> {
        let names = self
            .names(room)
            .map_err(|e| Error::io("list", self.room_path(room).display(), e))?;
        Ok(names.iter().filter_map(|name| parse(name)).collect())
    }

    /// What stands before ".<ext>" in a room's file names, sorted.
    pub(crate) fn names(&self, room: Room) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(self.room(room))? {
            let entry = entry?;
            if let Ok(file_name) = entry.file_name().to_str()
                && let Some(name) = file_name
                    .strip_suffix(self.extension)
                    .and_then(|rest| rest.strip_suffix('.'))
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Removes what no living process is working on: temporary files, and empty ones. (After a power
    /// cut some file systems keep the name of a file that was never synced but not its content;
    /// no complete volume or layer is empty.)
    fn clean(&self, dir: BorrowedFd<'_>) -> io::Result<()> {
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            let ours = name
                .strip_suffix(self.extension)
                .is_some_and(|rest| rest.ends_with('.'));
            let abandoned = durable::is_temporary(name)
                || ours && is_empty(statat(dir, name, AtFlags::SYMLINK_NOFOLLOW));
            if abandoned && durable::remove_if_abandoned(dir, name)? {
                tracing::info!(store = %self.path.display(), name, "removed an unfinished file");
            }
        }
        Ok(())
    }
}

fn is_empty(stat: rustix::io::Result<rustix::fs::Stat>) -> bool {
    stat.is_ok_and(|s| s.st_size == 0)
}

fn open_dir(at: BorrowedFd<'_>, path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(at, path, flags, Mode::empty())?)
}

fn make_room(root: &OwnedFd, room: Room) -> io::Result<OwnedFd> {
    match mkdirat(root, room.as_str(), Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(root, room.as_str(), flags, Mode::empty())?)
}

/// Why a directory is not the store that was asked for.
#[derive(Debug, thiserror::Error)]
enum NotOurs {
    #[error(
        "it is a store of the {owner} backend; open it as such, or give {kind} another directory"
    )]
    OtherBackend { owner: String, kind: &'static str },
    #[error("its file {MARKER} does not say whose it is in a way that this version understands")]
    Unreadable,
    #[error(
        "it is not empty (it holds {0:?}) and has no file {MARKER} that makes it a store; name an empty \
         or a new directory"
    )]
    Unmarked(String),
}

/// The kind of backend that owns the directory at `path`, if any does. Follows the rules for a
/// store: the marker is not a link, short, and says exactly what it should.
fn owner(root: &OwnedFd, path: &Path) -> Result<Option<String>, Error> {
    let unreadable = || foreign(path, NotOurs::Unreadable);
    let file = match durable::open_regular(root.as_fd(), MARKER, OFlags::RDONLY) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open the store", path.display(), e)),
    };
    let mut text = String::new();
    file.take(MARKER_MAX)
        .read_to_string(&mut text)
        .map_err(|_| unreadable())?;
    let kind = text
        .strip_prefix("offshoot-store 1 ")
        .and_then(|rest| rest.strip_suffix('\n'))
        .filter(|kind| !kind.is_empty() && kind.bytes().all(|b| b.is_ascii_graphic()))
        .ok_or_else(unreadable)?;
    Ok(Some(kind.to_owned()))
}

/// The kind of backend that owns the directory `path`; `None` when nobody does.
fn owner_of(path: &Path) -> Result<Option<String>, Error> {
    let root =
        open_dir(CWD, path).map_err(|e| Error::io("look at the store", path.display(), e))?;
    let owner = owner(&root, path)?;
    if owner.is_none() {
        refuse_unmarked(&root, path)?;
    }
    Ok(owner)
}

/// Where to try out what a store of `kind` at `path` would need: the directory itself, or the one
/// that it would be made in. Refused where the store itself would be.
pub(crate) fn for_trial(path: &Path, kind: &'static str) -> Result<OwnedFd, Error> {
    let fail = |e| Error::io("open the store", path.display(), e);
    match open_dir(CWD, path) {
        Ok(root) => {
            match owner(&root, path)? {
                Some(owner) => check_owner(&owner, kind, path)?,
                None => refuse_unmarked(&root, path)?,
            }
            Ok(root)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let parent = match path.parent() {
                Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
                Some(parent) => parent,
                None => return Err(fail(e)),
            };
            open_dir(CWD, parent).map_err(fail)
        }
        Err(e) => Err(fail(e)),
    }
}

/// Refuses `kind` in a directory that `owner` has.
fn check_owner(owner: &str, kind: &'static str, path: &Path) -> Result<(), Error> {
    if owner == kind {
        return Ok(());
    }
    let owner = owner.to_owned();
    Err(foreign(path, NotOurs::OtherBackend { owner, kind }))
}

/// A directory that holds something of somebody else's is not taken over.
fn refuse_unmarked(root: &OwnedFd, path: &Path) -> Result<(), Error> {
    let fail = |e: Errno| Error::io("open the store", path.display(), e.into());
    for entry in Dir::read_from(root).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy();
        // What a new file system has, and what another opener is making at this moment.
        if matches!(&*name, "." | ".." | "lost+found") || durable::is_temporary(&name) {
            continue;
        }
        // Two openers may race to make the store: the marker comes first, so if there is something
        // now, there is a marker now, or it is not a store.
        return match owner(root, path)? {
            Some(_) => Ok(()),
            None => Err(foreign(path, NotOurs::Unmarked(name.into_owned()))),
        };
    }
    Ok(())
}

fn foreign(path: &Path, why: NotOurs) -> Error {
    Error::because(
        ErrorKind::ForeignStore,
        "open the store",
        path.display(),
        why,
    )
}

/// Marks a directory as a store of `kind`; if somebody else is faster, theirs decides.
fn claim(root: BorrowedFd<'_>, kind: &'static str, path: &Path) -> Result<(), Error> {
    let fail = |e: io::Error| Error::io("make the store", path.display(), e);
    let new = NewFile::create(root, Mode::RUSR | Mode::WUSR).map_err(fail)?;
    let mut file = new.file();
    file.write_all(format!("offshoot-store 1 {kind}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(fail)?;
    match new.publish(MARKER) {
        Ok(_) => durable::sync_dir(root).map_err(fail),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let owner = owner_of(path)?.ok_or_else(|| foreign(path, NotOurs::Unreadable))?;
            check_owner(&owner, kind, path)
        }
        Err(e) => Err(fail(e)),
    }
}

#[cfg(test)]
mod tests;
