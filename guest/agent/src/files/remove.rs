//! Removing a tree of any depth with one open directory and a small stack.
//!
//! What lies in a subdirectory of a subdirectory is first moved up to the top, so the tree gets
//! flatter instead of the walk going deeper. A rename does not cross a mount: what is mounted in
//! the tree stops the removal instead of being emptied.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use offshoot_protocol::agent::Refusal;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::path;
use crate::failure::Doing;

/// Serves `Remove`.
pub(crate) fn remove(name: &[u8], recursive: bool) -> Result<(), Refusal> {
    let at = path(name);
    let about = std::fs::symlink_metadata(at).doing("looking at the file")?;
    if !about.is_dir() {
        return std::fs::remove_file(at).doing("removing the file");
    }
    if !recursive {
        return std::fs::remove_dir(at).doing("removing the directory");
    }
    let tree = open(CWD, at).doing("opening the directory")?;
    Tree {
        top: tree,
        moved: 0,
    }
    .empty()
    .doing("emptying the directory")?;
    std::fs::remove_dir(at).doing("removing the directory")
}

fn open(dir: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

struct Tree {
    top: OwnedFd,
    moved: u64,
}

impl Tree {
    fn empty(&mut self) -> io::Result<()> {
        // What is moved up while the directory is read may be seen in the same pass or not.
        loop {
            let names = names(&self.top)?;
            if names.is_empty() {
                return Ok(());
            }
            for name in names {
                self.remove(&name)?;
            }
        }
    }

    fn remove(&mut self, name: &CString) -> io::Result<()> {
        match take_away(&self.top, name) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            result => return Ok(result?),
        }
        let sub = open(&self.top, name.as_c_str())?;
        for inner in names(&sub)? {
            match take_away(&sub, &inner) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => self.move_up(&sub, &inner)?,
                result => result?,
            }
        }
        match unlinkat(&self.top, name.as_c_str(), AtFlags::REMOVEDIR) {
            // Something was put in meanwhile: the next pass sees it.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOENT) => Ok(()),
            result => Ok(result?),
        }
    }

    fn move_up(&mut self, from: &OwnedFd, name: &CString) -> rustix::io::Result<()> {
        loop {
            self.moved = self.moved.wrapping_add(1);
            let new = format!(".offshoot-removing-{}", self.moved);
            match renameat(from, name.as_c_str(), &self.top, new.as_str()) {
                // A directory of that name is there, or a file.
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                result => return result,
            }
        }
    }
}

/// Removes a name, be it a file or an empty directory. One that is gone already is fine.
fn take_away(dir: &OwnedFd, name: &CString) -> rustix::io::Result<()> {
    let result = match unlinkat(dir, name.as_c_str(), AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => unlinkat(dir, name.as_c_str(), AtFlags::REMOVEDIR),
        result => result,
    };
    match result {
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}

/// Up to some thousand names in a directory.
fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    // Opened anew: a copy of the descriptor would share its place in the directory.
    let mut listing = Dir::read_from(open(dir, ".")?)?;
    let mut names = Vec::new();
    while let Some(item) = listing.read() {
        let item = item?;
        let name = item.file_name();
        let itself =
            item.file_type() == FileType::Directory && matches!(name.to_bytes(), b"." | b"..");
        if !itself {
            names.push(name.to_owned());
        }
        if names.len() >= 4096 {
            break;
        }
    }
    Ok(names)
}
