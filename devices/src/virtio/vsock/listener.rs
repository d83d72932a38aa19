//! The host's side: the Unix socket that host programs connect to, and the sockets of host
//! programs that the guest connects to.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::virtio::SetupError;

/// `sun_path` holds 108 bytes with its terminating zero; `_4294967295` must fit behind the path.
pub const MAX_PATH: usize = 107 - 11;

const BACKLOG: i32 = 1024;

/// A listening Unix socket at a path. On drop the path is removed, if it is still this socket
/// and this is the process that made it (not a fork of it).
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of what was bound, and the process that bound it.
    identity: Option<(u64, u64)>,
    owner: u32,
}

impl Listener {
    pub(super) fn bind(path: &Path, replace_stale: bool) -> Result<Self, SetupError> {
        if path.as_os_str().len() > MAX_PATH {
            return Err(SetupError::PathTooLong {
                path: path.to_owned(),
                max: MAX_PATH,
            });
        }
        let failed = SetupError::host("cannot listen on the vsock socket path");
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        let socket = unix_socket().map_err(|e| failed(e.into()))?;
        match rustix::net::bind(&socket, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => {
                clear_stale(path, replace_stale)?;
                rustix::net::bind(&socket, &address).map_err(|e| match e {
                    Errno::ADDRINUSE => SetupError::PathInUse {
                        path: path.to_owned(),
                    },
                    other => failed(other.into()),
                })?;
            }
            Err(e) => return Err(failed(e.into())),
        }
        let identity = fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let listener = Self {
            socket,
            path: path.to_owned(),
            identity,
            owner: std::process::id(),
        };
        rustix::net::listen(&listener.socket, BACKLOG).map_err(|e| failed(e.into()))?;
        Ok(listener)
    }

    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    /// Connects to the program that serves the guest's connections to `port`. Never waits: a
    /// program whose backlog is full refuses like one that does not exist.
    pub(super) fn connect_to(&self, port: u32) -> Result<OwnedFd, Errno> {
        let mut path = OsString::from(self.path.as_os_str());
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path.as_bytes())?;
        let socket = unix_socket()?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .ok()
            .map(|m| (m.dev(), m.ino()));
        if ours.is_some()
            && ours == self.identity
            && self.owner == std::process::id()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = ?self.path, %error, "the vsock socket could not be removed");
        }
    }
}

fn unix_socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

/// Something is at `path`: removes it if it is a socket that nobody listens on and that was
/// asked for. Two processes that replace the same stale socket at the same moment can still
/// take it from one another; each learns of it by its clients, none by its guest.
fn clear_stale(path: &Path, replace_stale: bool) -> Result<(), SetupError> {
    let failed = SetupError::host("cannot look at the vsock socket path");
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    let path = path.to_owned();
    if !metadata.file_type().is_socket() {
        return Err(SetupError::PathNotSocket { path });
    }
    let address = SocketAddrUnix::new(&path).map_err(|e| failed(e.into()))?;
    let probe = unix_socket().map_err(|e| failed(e.into()))?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED) if replace_stale => fs::remove_file(&path).map_err(failed),
        Err(Errno::CONNREFUSED) => Err(SetupError::PathStale { path }),
        Err(Errno::NOENT) => Ok(()),
        _ => Err(SetupError::PathInUse { path }),
    }
}
