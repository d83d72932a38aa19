//! Files of the guest.

mod remove;
mod write;

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use offshoot_protocol::agent::frame::{MAX_PAYLOAD, MAX_RAW};
use offshoot_protocol::agent::{Entry, EntryKind, ErrorCode, RawKind, Refusal, Reply};

use crate::connection::Connection;
use crate::failure::{Doing, refusal};

pub(crate) use remove::remove;
pub(crate) use write::{Target, write};

/// Entries are sent when they are about this many bytes.
const BATCH: usize = MAX_PAYLOAD / 4;

/// A path as the kernel takes it.
fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Serves `Read`.
pub(crate) fn read(
    connection: &Connection,
    name: &[u8],
    offset: u64,
    len: u64,
) -> Result<(), Refusal> {
    // Not blocking: to open a pipe that nobody writes to would wait for ever.
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path(name))
        .doing("opening the file")?;
    let about = file.metadata().doing("looking at the file")?;
    let kind = about.file_type();
    if kind.is_dir() {
        return Err(std::io::Error::from_raw_os_error(libc::EISDIR)).doing("reading the file");
    }
    if kind.is_fifo() || kind.is_socket() {
        return Err(refusal(ErrorCode::Invalid, "not a file that can be read"));
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))
            .doing("going to the offset")?;
    }
    let size = about.len();
    if connection.reply(&Reply::Opened { size }).is_err() {
        return Ok(());
    }
    let mut rest = file.take(len);
    let mut buffer = vec![0; MAX_RAW];
    loop {
        let got = match rest.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).doing("reading the file"),
        };
        let bytes = buffer.get(..got).unwrap_or_default();
        if connection.raw(RawKind::Data, bytes).is_err() {
            return Ok(());
        }
    }
    let _ = connection.raw(RawKind::End, &[]);
    Ok(())
}

/// Serves `Stat`.
pub(crate) fn stat(name: &[u8], follow: bool) -> Result<Entry, Refusal> {
    let at = path(name);
    let about = match follow {
        true => fs::metadata(at),
        false => fs::symlink_metadata(at),
    };
    let about = about.doing("looking at the file")?;
    let last = at.file_name().map_or(name, OsStr::as_bytes);
    Ok(entry(last, at, &about))
}

/// Serves `List`.
pub(crate) fn list(connection: &Connection, name: &[u8]) -> Result<(), Refusal> {
    let mut entries = Vec::new();
    let mut bytes = 0;
    for item in fs::read_dir(path(name)).doing("reading the directory")? {
        let item = item.doing("reading the directory")?;
        // What vanishes meanwhile was not there.
        let Ok(about) = item.metadata() else { continue };
        let entry = entry(item.file_name().as_bytes(), &item.path(), &about);
        bytes += entry.name.len() + entry.target.len() + 64;
        entries.push(entry);
        if bytes >= BATCH {
            let entries = std::mem::take(&mut entries);
            if connection.reply(&Reply::Entries { entries }).is_err() {
                return Ok(());
            }
            bytes = 0;
        }
    }
    if entries.is_empty() || connection.reply(&Reply::Entries { entries }).is_ok() {
        let _ = connection.raw(RawKind::End, &[]);
    }
    Ok(())
}

fn entry(name: &[u8], at: &Path, about: &Metadata) -> Entry {
    let kind = about.file_type();
    let kind = match () {
        () if kind.is_file() => EntryKind::File,
        () if kind.is_dir() => EntryKind::Directory,
        () if kind.is_symlink() => EntryKind::Symlink,
        () => EntryKind::Other,
    };
    let target = match kind {
        EntryKind::Symlink => fs::read_link(at).ok(),
        _ => None,
    };
    let seconds = u64::try_from(about.mtime()).unwrap_or_default();
    let nanos = u64::try_from(about.mtime_nsec()).unwrap_or_default();
    Entry {
        name: name.to_vec(),
        kind,
        mode: about.mode() & 0o7777,
        uid: about.uid(),
        gid: about.gid(),
        size: about.len(),
        modified_unix_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
        target: target
            .map(|target| target.as_os_str().as_bytes().to_vec())
            .unwrap_or_default(),
    }
}

/// Serves `MakeDir`.
pub(crate) fn make_dir(name: &[u8], parents: bool, mode: u32) -> Result<(), Refusal> {
    fs::DirBuilder::new()
        .recursive(parents)
        .mode(mode & 0o7777)
        .create(path(name))
        .doing("making the directory")
}

/// Serves `Rename`.
pub(crate) fn rename(from: &[u8], to: &[u8]) -> Result<(), Refusal> {
    fs::rename(path(from), path(to)).doing("renaming")
}
