//! Writing a file: a new one that takes the name in one step, or at the end of the old one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot_protocol::agent::{ErrorCode, RawKind, Refusal, Reply, User, WriteMode};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, openat, renameat_with};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::path;
use crate::connection::{Connection, Trouble};
use crate::failure::{Doing, refusal};
use crate::users;

/// How long the host may pause between two frames of a file.
const PAUSE: Duration = Duration::from_secs(120);
/// Symbolic links that are followed to the file to replace.
const LINKS: usize = 40;

/// What is to be written.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) path: Vec<u8>,
    pub(crate) how: WriteMode,
    pub(crate) mode: Option<u32>,
    pub(crate) owner: Option<User>,
    pub(crate) sync: bool,
}

/// Serves `Write`.
pub(crate) fn write(connection: &Connection, target: &Target) -> Result<(), Refusal> {
    let owner = target.owner.as_ref().map(users::owner).transpose()?;
    let name = resolve(path(&target.path)).doing("following the path")?;
    match target.how {
        WriteMode::Append => append(connection, target, owner, &name),
        _ => replace(connection, target, owner, &name),
    }
}

/// The file that a path leads to in the end; the file itself need not exist.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&path) {
            Ok(to) => path = path.parent().unwrap_or(Path::new("/")).join(to),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                return Ok(path);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

fn append(
    connection: &Connection,
    target: &Target,
    owner: Option<(Uid, Gid)>,
    name: &Path,
) -> Result<(), Refusal> {
    let mut file = File::options()
        .append(true)
        .create(true)
        .mode(target.mode.unwrap_or(0o644) & 0o7777)
        .custom_flags(libc::O_NONBLOCK)
        .open(name)
        .doing("opening the file")?;
    if !file.metadata().doing("looking at the file")?.is_file() {
        return Err(refusal(
            ErrorCode::Invalid,
            "only regular files are appended to",
        ));
    }
    if let Some(owner) = owner {
        users::give(&file, owner)?;
    }
    if let Some(mode) = target.mode {
        set_mode(&file, mode)?;
    }
    let Some(bytes) = receive(connection, &mut file)? else {
        return Ok(());
    };
    if target.sync {
        file.sync_all().doing("writing the file to the disk")?;
    }
    let _ = connection.reply(&Reply::Finished { bytes });
    Ok(())
}

fn replace(
    connection: &Connection,
    target: &Target,
    owner: Option<(Uid, Gid)>,
    name: &Path,
) -> Result<(), Refusal> {
    let old = match fs::symlink_metadata(name) {
        Ok(old) if old.is_dir() => {
            return Err(io::Error::from_raw_os_error(libc::EISDIR)).doing("writing the file");
        }
        Ok(_) if target.how == WriteMode::CreateNew => {
            return Err(io::Error::from_raw_os_error(libc::EEXIST)).doing("writing the file");
        }
        // Devices, pipes and sockets are replaced like anything else, with new permissions.
        Ok(old) => Some(old).filter(|old| old.is_file()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).doing("looking at the file"),
    };
    let parent = name
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let mut new = New::in_dir(parent.unwrap_or(Path::new("."))).doing("making a new file")?;
    let of_old = old
        .as_ref()
        .map(|old| (Uid::from_raw(old.uid()), Gid::from_raw(old.gid())));
    if let Some(owner) = owner.or(of_old) {
        users::give(&new.file, owner)?;
    }
    let mode = target.mode.or(old.map(|old| old.mode())).unwrap_or(0o644);
    set_mode(&new.file, mode)?;
    let Some(bytes) = receive(connection, &mut new.file)? else {
        return Ok(());
    };
    if target.sync {
        new.file.sync_all().doing("writing the file to the disk")?;
    }
    new.take_name(name, target.how == WriteMode::CreateNew)
        .doing("giving the file its name")?;
    if target.sync {
        let dir = File::open(parent.unwrap_or(Path::new("."))).doing("opening the directory")?;
        dir.sync_all().doing("writing the directory to the disk")?;
    }
    let _ = connection.reply(&Reply::Finished { bytes });
    Ok(())
}

fn set_mode(file: &File, mode: u32) -> Result<(), Refusal> {
    let mode = fs::Permissions::from_mode(mode & 0o7777);
    file.set_permissions(mode).doing("setting the permissions")
}

/// Takes the host's frames into the file. `None` when the host gave up.
fn receive(connection: &Connection, file: &mut File) -> Result<Option<u64>, Refusal> {
    let _ = connection.set_read_timeout(Some(PAUSE));
    if connection.reply(&Reply::Opened { size: 0 }).is_err() {
        return Ok(None);
    }
    let mut payload = Vec::new();
    let mut bytes = 0u64;
    loop {
        match connection.frame(&mut payload) {
            Ok(kind) if kind == RawKind::Data as u16 => {
                file.write_all(&payload).doing("writing the file")?;
                bytes = bytes.saturating_add(u64::try_from(payload.len()).unwrap_or_default());
            }
            Ok(kind) if kind == RawKind::End as u16 => return Ok(Some(bytes)),
            Ok(kind) => {
                let detail = format!("frame of kind {kind} in the middle of a file");
                return Err(refusal(ErrorCode::Malformed, &detail));
            }
            Err(Trouble::Nonsense(refusal)) => return Err(refusal),
            Err(_) => return Ok(None),
        }
    }
}

/// A file that has no name yet, or one that nobody looks for.
struct New {
    file: File,
    dir: PathBuf,
    /// Where the file system can't make a file without a name.
    hidden: Option<PathBuf>,
}

impl New {
    fn in_dir(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
        let dir = dir.to_owned();
        match openat(CWD, &dir, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(Self {
                file: fd.into(),
                dir,
                hidden: None,
            }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let (hidden, file) = unused(&dir, |name| {
                    File::options()
                        .write(true)
                        .create_new(true)
                        .mode(0o600)
                        .open(name)
                })?;
                Ok(Self {
                    file,
                    dir,
                    hidden: Some(hidden),
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the file its name, over what had it before unless `fresh`.
    fn take_name(mut self, name: &Path, fresh: bool) -> io::Result<()> {
        let hidden = match self.hidden.take() {
            Some(hidden) => hidden,
            // A file without a name can't take a name that is in use: it gets another one first.
            None => {
                let itself = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let flags = AtFlags::SYMLINK_FOLLOW;
                unused(&self.dir, |new| {
                    Ok(linkat(CWD, itself.as_str(), CWD, new, flags)?)
                })?
                .0
            }
        };
        self.hidden = Some(hidden.clone());
        match fresh {
            true => renameat_with(CWD, &hidden, CWD, name, RenameFlags::NOREPLACE)?,
            false => fs::rename(&hidden, name)?,
        }
        self.hidden = None;
        Ok(())
    }
}

impl Drop for New {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            let _ = fs::remove_file(hidden);
        }
    }
}

/// Tries names until one is unused.
fn unused<T>(dir: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    for _ in 0..100 {
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let random = u64::from_ne_bytes(random);
        let name = dir.join(OsString::from(format!(".offshoot-{random:016x}")));
        match make(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => return Ok((name, result?)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
