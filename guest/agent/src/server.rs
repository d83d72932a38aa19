//! Listening, and a thread for each connection.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::{ErrorCode, PORT};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};

use crate::connection::Connection;
use crate::failure::{log, refusal};
use crate::lock::lock;
use crate::{Agent, STACK, serve, sys};

/// Connections at a time.
const MAX_CONNECTIONS: usize = 128;
/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;
/// How long the port may take to become free when it is opened anew.
const REBIND: Duration = Duration::from_secs(2);

/// Where the agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A vsock port, for the host only.
    Vsock(u32),
    /// A Unix socket, for the agent's own user and root only.
    Unix(PathBuf),
}

impl Default for Address {
    fn default() -> Self {
        Self::Vsock(PORT)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vsock", port)) => {
                let port = port
                    .parse()
                    .map_err(|_| format!("{port} is no vsock port"))?;
                Ok(Self::Vsock(port))
            }
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text} is neither vsock:PORT nor unix:PATH")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    fn open(&self) -> io::Result<OwnedFd> {
        let socket = match self {
            Self::Vsock(port) => sys::vsock_bind(*port)?,
            Self::Unix(path) => {
                let old = std::fs::symlink_metadata(path);
                if old.is_ok_and(|old| old.file_type().is_socket()) {
                    std::fs::remove_file(path)?;
                }
                let flags = SocketFlags::CLOEXEC;
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                bind(&socket, &SocketAddrUnix::new(path.as_path())?)?;
                socket
            }
        };
        listen(&socket, BACKLOG)?;
        // Woken by one of several causes, and never to wait in accept.
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(socket)
    }

    /// Commands of root are not for just anybody: within the guest, vsock has a loopback.
    fn is_welcome(&self, peer: &OwnedFd) -> bool {
        match self {
            Self::Vsock(_) => sys::vsock_peer(peer.as_fd()).is_ok_and(|cid| cid == sys::HOST_CID),
            Self::Unix(_) => sys::unix_peer(peer.as_fd())
                .is_ok_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw()),
        }
    }
}

/// One who waits for the port to be opened anew.
type Waiter = mpsc::SyncSender<io::Result<()>>;

/// The listening side.
#[derive(Debug)]
pub(crate) struct Server {
    address: Address,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    wake: OwnedFd,
    waiters: Mutex<Vec<Waiter>>,
}

impl Server {
    pub(crate) fn new(address: Address) -> io::Result<Self> {
        Ok(Self {
            address,
            connections: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            waiters: Mutex::default(),
        })
    }

    /// Whether only a host can be at the other end.
    pub(crate) fn is_in_guest(&self) -> bool {
        matches!(self.address, Address::Vsock(_))
    }

    /// Ends every connection but one: they belong to an earlier generation.
    pub(crate) fn drop_others(&self, kept: u64) {
        let connections = lock(&self.connections);
        for (_, other) in connections.iter().filter(|(number, _)| **number != kept) {
            other.supersede();
        }
    }

    /// Closes the port and opens it again.
    pub(crate) fn listen_again(&self) -> io::Result<()> {
        let (done, result) = mpsc::sync_channel(1);
        lock(&self.waiters).push(done);
        rustix::io::write(&self.wake, &1u64.to_ne_bytes())?;
        let lost = |_| io::Error::from(io::ErrorKind::TimedOut);
        result.recv_timeout(2 * REBIND).map_err(lost)?
    }

    /// Accepts connections for ever.
    pub(crate) fn run(&self, agent: &Arc<Agent>) -> io::Result<()> {
        let mut socket = self.address.open()?;
        log(format_args!("listening on {}", self.address));
        let mut number = 0;
        loop {
            let mut fds = [
                PollFd::new(&socket, PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
            let waiters = std::mem::take(&mut *lock(&self.waiters));
            if !waiters.is_empty() {
                drop(socket);
                let reopened = self.reopen();
                for waiter in &waiters {
                    let told = match &reopened {
                        Ok(_) => Ok(()),
                        Err(error) => Err(io::Error::from(error.kind())),
                    };
                    let _ = waiter.send(told);
                }
                socket = reopened?;
                continue;
            }
            match accept_with(&socket, SocketFlags::CLOEXEC) {
                Ok(peer) if self.address.is_welcome(&peer) => {
                    number += 1;
                    self.start(agent, number, peer);
                }
                Ok(_) => log(format_args!("a connection from elsewhere was closed")),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                // Out of descriptors or memory: that passes.
                Err(error) => {
                    log(format_args!("accepting a connection: {error}"));
                    thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn reopen(&self) -> io::Result<OwnedFd> {
        let deadline = Instant::now() + REBIND;
        loop {
            match self.address.open() {
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
                result => return result,
            }
        }
    }

    fn start(&self, agent: &Arc<Agent>, number: u64, peer: OwnedFd) {
        let connection = Arc::new(Connection::new(peer));
        let mut connections = lock(&self.connections);
        if connections.len() >= MAX_CONNECTIONS {
            let _ = connection.refuse(refusal(ErrorCode::Busy, "too many connections"));
            return;
        }
        connections.insert(number, Arc::clone(&connection));
        drop(connections);
        let owner = Arc::clone(agent);
        let thread = thread::Builder::new().stack_size(STACK).spawn(move || {
            let open = Open {
                agent: &owner,
                number,
            };
            serve::serve(&owner, number, &connection);
            drop(open);
        });
        if let Err(error) = thread {
            log(format_args!("starting a thread for a connection: {error}"));
            lock(&self.connections).remove(&number);
        }
    }
}

/// A connection in the list, taken out however its thread ends.
struct Open<'a> {
    agent: &'a Agent,
    number: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        lock(&self.agent.server.connections).remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_text_form() {
        for text in ["vsock:1001", "unix:/run/agent.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "vsock:",
            "vsock:x",
            "unix:",
            "tcp:1",
            "vsock:4294967296",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        assert_eq!(Address::default(), Address::Vsock(PORT));
    }
}
