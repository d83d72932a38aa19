//! One connection: frames in and out of a stream socket of any family.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use offshoot_protocol::agent::frame::{HEADER, MAX_RAW};
use offshoot_protocol::agent::{ErrorCode, Header, RawKind, Refusal, Reply, Request};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};

use crate::failure::refusal;

/// A connection; each direction is used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    /// It belonged to an earlier generation and was ended for that.
    superseded: AtomicBool,
}

/// What came in instead of a message.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The other side closed the stream between two frames.
    Closed,
    /// The stream failed or took too long.
    Broken(io::Error),
    /// The bytes are no frame or no message.
    Nonsense(Refusal),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            superseded: AtomicBool::new(false),
        }
    }

    /// How long a read may wait; no limit by `None`.
    pub(crate) fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(&self.socket, Timeout::Recv, limit)?)
    }

    /// Ends it because the guest is another one now.
    pub(crate) fn supersede(&self) {
        self.superseded.store(true, Ordering::Release);
        self.close();
    }

    pub(crate) fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    /// Ends both directions; whoever waits for it wakes up.
    pub(crate) fn close(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Ends the direction to the host.
    pub(crate) fn finish(&self) {
        let _ = shutdown(&self.socket, Shutdown::Write);
    }

    /// Reads up to the size of the buffer; 0 at the end.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
                Ok((got, _)) => return Ok(got),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Fills the buffer. Says false when the stream ends before the first byte.
    fn fill(&self, buffer: &mut [u8]) -> io::Result<bool> {
        let mut rest = &mut *buffer;
        let mut any = false;
        while !rest.is_empty() {
            match self.read(rest)? {
                0 if !any => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                got => rest = rest.get_mut(got..).unwrap_or_default(),
            }
            any = true;
        }
        Ok(true)
    }

    /// Reads a frame's header and its payload into `payload`.
    pub(crate) fn frame(&self, payload: &mut Vec<u8>) -> Result<u16, Trouble> {
        let mut header = [0; HEADER];
        if !self.fill(&mut header)? {
            return Err(Trouble::Closed);
        }
        let header = Header::decode(&header)
            .map_err(|error| Trouble::Nonsense(malformed(&format!("frame: {error}"))))?;
        payload.clear();
        payload.resize(header.len, 0);
        if header.len > 0 && !self.fill(payload)? {
            return Err(Trouble::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(header.kind)
    }

    /// Reads a request.
    pub(crate) fn request(&self) -> Result<Request, Trouble> {
        let mut payload = Vec::new();
        let kind = self.frame(&mut payload)?;
        Request::decode(kind, &payload)
            .map_err(|error| Trouble::Nonsense(malformed(&format!("request {kind}: {error}"))))
    }

    fn send(&self, mut head: &[u8], mut body: &[u8]) -> io::Result<()> {
        while !head.is_empty() || !body.is_empty() {
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            let mut control = SendAncillaryBuffer::default();
            match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    let of_head = sent.min(head.len());
                    head = head.get(of_head..).unwrap_or_default();
                    body = body.get(sent.saturating_sub(of_head)..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends bytes of a stream, at most [`MAX_RAW`].
    pub(crate) fn raw(&self, kind: RawKind, bytes: &[u8]) -> io::Result<()> {
        debug_assert!(bytes.len() <= MAX_RAW);
        let header = Header::encode(kind as u16, bytes.len()).map_err(io::Error::other)?;
        self.send(&header, bytes)
    }

    /// Sends a reply.
    pub(crate) fn reply(&self, reply: &Reply) -> io::Result<()> {
        let frame = reply.to_frame().map_err(io::Error::other)?;
        self.send(&frame, &[])
    }

    /// Sends a refusal.
    pub(crate) fn refuse(&self, refusal: Refusal) -> io::Result<()> {
        self.reply(&Reply::Refused { refusal })
    }

    /// After the last frame: lets the other side read it before the socket goes. A socket that is
    /// closed with unread bytes in it is reset, and the answer may be lost with it.
    pub(crate) fn linger(&self) {
        const PATIENCE: Duration = Duration::from_secs(2);
        self.finish();
        let mut scrap = vec![0; 16 << 10];
        let until = Instant::now() + PATIENCE;
        let _ = self.set_read_timeout(Some(PATIENCE));
        while let Ok(1..) = self.read(&mut scrap) {
            if Instant::now() >= until {
                break;
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn malformed(detail: &str) -> Refusal {
    refusal(ErrorCode::Malformed, detail)
}
