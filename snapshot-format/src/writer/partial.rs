//! The hidden directory of a snapshot that is not published, and the removal of abandoned ones.

use std::fs::File;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::dir::open_dir;
use crate::{Error, ErrorKind, MANIFEST_FILE, MEMORY_FILE, Place, SnapshotId};

/// Between id and random digits in the name of a hidden directory.
const INFIX: &str = ".partial-";
/// How often another name is tried; each is wrong by a chance of 2^-32.
const ATTEMPTS: u32 = 16;

/// A hidden directory that this process owns: locked, and removed on drop.
#[derive(Debug)]
pub(super) struct Partial {
    parent: File,
    name: String,
    /// Holds the lock.
    dir: File,
    /// The process that removes it; `None` when it has become a snapshot.
    owner: Option<u32>,
}

impl Partial {
    pub(super) fn create(parent: &File, id: SnapshotId) -> Result<Self, Error> {
        let parent = parent
            .try_clone()
            .map_err(|e| Error::io(Place::Directory, "cannot keep it open", e))?;
        for _ in 0..ATTEMPTS {
            let mut random = [0; 4];
            getrandom(&mut random, GetRandomFlags::empty())
                .map_err(|e| Error::io(Place::Directory, "cannot get random bytes", e))?;
            let name = format!(".{id}{INFIX}{:08x}", u32::from_le_bytes(random));
            match rustix::fs::mkdirat(&parent, &name, Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(e) => return Err(Error::io(Place::Directory, "cannot create it", e)),
            }
            // A clean-up may have come between the two: then there is another try.
            match lock(&parent, &name) {
                Ok(Locked::Mine(dir)) => {
                    return Ok(Self {
                        parent,
                        name,
                        dir,
                        owner: Some(std::process::id()),
                    });
                }
                Ok(Locked::InUse | Locked::Gone) => {}
                Err(e) => {
                    let _ = rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR);
                    return Err(Error::io(Place::Directory, "cannot lock it", e));
                }
            }
        }
        let detail = "every name that was tried for the hidden directory was taken";
        Err(Error::new(ErrorKind::Io, Place::Directory, detail))
    }

    pub(super) fn dir(&self) -> &File {
        &self.dir
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// It has become a snapshot: dropping removes nothing.
    pub(super) fn disown(&mut self) {
        self.owner = None;
    }

    /// It has lost its name again.
    pub(super) fn own_again(&mut self) {
        self.owner = Some(std::process::id());
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.owner == Some(std::process::id()) {
            // What cannot be removed is hidden, and left to `clean_partial`.
            let _ = remove(&self.parent, &self.name, &self.dir);
        }
    }
}

/// What became of trying to lock a hidden directory.
enum Locked {
    Mine(File),
    InUse,
    /// The name refers to something else by now, or to nothing.
    Gone,
}

fn lock(parent: &File, name: &str) -> Result<Locked, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Ok(dir) => File::from(dir),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Locked::Gone),
        Err(e) => return Err(e),
    };
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(Locked::InUse),
        Err(e) => return Err(e),
    }
    // Only now that it is locked nobody publishes or removes it: does the name still mean this directory?
    let mine = rustix::fs::fstat(&dir)?;
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(named) if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino) => {
            Ok(Locked::Mine(dir))
        }
        Ok(_) | Err(Errno::NOENT) => Ok(Locked::Gone),
        Err(e) => Err(e),
    }
}

/// Removes a hidden directory that is locked by the caller, and the files that a writer makes in it.
fn remove(parent: &File, name: &str, dir: &File) -> Result<(), Errno> {
    for file in [MANIFEST_FILE, MEMORY_FILE] {
        match rustix::fs::unlinkat(dir, file, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// What [`clean_partial`] did.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct CleanReport {
    /// Names of hidden directories that were removed.
    pub removed: Vec<String>,
    /// Names of hidden directories that a living process is writing.
    pub in_use: Vec<String>,
    /// Names of hidden directories that could not be removed, and why.
    pub failed: Vec<(String, Error)>,
}

/// Removes what writers that died have left in `parent`. What a living process is writing is not
/// touched, nor is any snapshot.
///
/// # Errors
/// When `parent` cannot be listed.
pub fn clean_partial(parent: &Path) -> Result<CleanReport, Error> {
    let cannot_list = |e: Errno| Error::io(Place::Directory, "cannot list it", e);
    let parent = open_dir(parent)?;
    let mut report = CleanReport::default();
    let mut names = Vec::new();
    for entry in Dir::read_from(&parent).map_err(cannot_list)? {
        let entry = entry.map_err(cannot_list)?;
        if let Ok(name) = entry.file_name().to_str()
            && is_partial_name(name)
        {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    for name in names {
        let removed = match lock(&parent, &name) {
            Ok(Locked::Mine(dir)) => remove(&parent, &name, &dir),
            Ok(Locked::InUse) => {
                report.in_use.push(name);
                continue;
            }
            Ok(Locked::Gone) => continue,
            Err(e) => Err(e),
        };
        match removed {
            Ok(()) => report.removed.push(name),
            Err(e) => {
                let error = Error::io(Place::Directory, "cannot remove it", e);
                report.failed.push((name, error));
            }
        }
    }
    Ok(report)
}

/// Whether only a writer makes directories of this name.
fn is_partial_name(name: &str) -> bool {
    let parts = name.strip_prefix('.').and_then(|n| n.split_once(INFIX));
    parts.is_some_and(|(id, random)| {
        id.parse::<SnapshotId>().is_ok_and(|p| p.to_string() == id)
            && random.len() == 8
            && random.bytes().all(|b| b.is_ascii_hexdigit())
    })
}
