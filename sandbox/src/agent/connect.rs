//! Ways to a guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::PORT;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Makes streams to an agent. Each operation takes one of its own, so it is called from any
/// thread, many times at once; it must come back by the deadline.
pub trait Connect: Send + Sync {
    /// Makes a stream that leads to the agent.
    ///
    /// # Errors
    /// Whatever prevents it until the deadline.
    fn connect(&self, deadline: Instant) -> io::Result<UnixStream>;
}

impl<F: Fn(Instant) -> io::Result<UnixStream> + Send + Sync> Connect for F {
    fn connect(&self, deadline: Instant) -> io::Result<UnixStream> {
        self(deadline)
    }
}

/// Through the host side of a vsock: a Unix socket that takes `CONNECT <port>`.
#[derive(Debug)]
pub(super) struct ByVsock {
    pub(super) path: PathBuf,
}

impl Connect for ByVsock {
    fn connect(&self, deadline: Instant) -> io::Result<UnixStream> {
        patiently(deadline, || {
            let mut stream = open(&self.path)?;
            offshoot_protocol::greet_vsock(&mut stream, PORT, deadline)?;
            Ok(stream)
        })
    }
}

/// An agent that listens on a Unix socket itself.
#[derive(Debug)]
pub(super) struct BySocket {
    pub(super) path: PathBuf,
}

impl Connect for BySocket {
    fn connect(&self, deadline: Instant) -> io::Result<UnixStream> {
        patiently(deadline, || open(&self.path))
    }
}

/// Tries again until the deadline: a guest that boots has no agent yet.
fn patiently<T>(deadline: Instant, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    const PAUSE: Duration = Duration::from_millis(1);
    loop {
        match attempt() {
            Err(_) if Instant::now() + PAUSE < deadline => thread::sleep(PAUSE),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            result => return result,
        }
    }
}

/// Connects without waiting: where a listener accepts nobody, a blocking connect never returns.
fn open(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(io::ErrorKind::WouldBlock.into()),
        Err(error) => return Err(error.into()),
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
