//! Frames over a stream, with a deadline on everything.
//!
//! The stream's own mode and time-outs are not used: each call looks first, and waits in poll for
//! no longer than its deadline. So one thread may read while another writes, and a guest that
//! stops in the middle of a frame, or sends a byte a minute, costs its caller the deadline.

use std::io;
use std::mem;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use offshoot_protocol::agent::frame::HEADER;
use offshoot_protocol::agent::{Header, RawKind, Reply, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::{Error, ErrorKind};

/// What the agent sent.
#[derive(Debug)]
pub(super) enum Incoming {
    Raw(RawKind, Vec<u8>),
    Reply(Reply),
}

/// A frame that has come in part.
#[derive(Debug, Default)]
struct Partial {
    head: [u8; HEADER],
    head_len: usize,
    header: Option<Header>,
    payload: Vec<u8>,
    filled: usize,
}

/// A stream to the agent.
#[derive(Debug)]
pub(super) struct Channel {
    operation: &'static str,
    stream: UnixStream,
    partial: Mutex<Partial>,
}

impl Channel {
    pub(super) fn new(operation: &'static str, stream: UnixStream) -> Self {
        Self {
            operation,
            stream,
            partial: Mutex::default(),
        }
    }

    pub(super) fn error(&self, kind: ErrorKind) -> Error {
        Error::new(kind, self.operation)
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::stream(self.operation, error)
    }

    /// Waits until the stream is ready; an error when the deadline comes first.
    fn wait(&self, flags: PollFlags, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.stream, flags)], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn read(&self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        loop {
            match recv(&self.stream, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((got, _)) => return Ok(got),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends all bytes. After a failure the stream may end in the middle of a frame.
    fn write(&self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            match send(
                &self.stream,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends a request.
    pub(super) fn request(&self, request: &Request, deadline: Instant) -> Result<(), Error> {
        let frame = request
            .to_frame()
            .map_err(|error| Error::because(ErrorKind::Invalid, self.operation, error))?;
        self.write(&frame, deadline)
            .map_err(|error| self.failed(error))
    }

    /// Sends bytes of a stream: at most a frame's worth.
    pub(super) fn raw(&self, kind: RawKind, bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        let header = Header::encode(kind as u16, bytes.len())
            .map_err(|error| Error::because(ErrorKind::Invalid, self.operation, error))?;
        // One call: a small frame is one packet to the guest.
        let mut frame = Vec::with_capacity(HEADER.saturating_add(bytes.len()));
        frame.extend(header);
        frame.extend(bytes);
        self.write(&frame, deadline)
            .map_err(|error| self.failed(error))
    }

    /// Whether something has come in already, be it the end.
    pub(super) fn has_answer(&self) -> bool {
        let now = Timespec::default();
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&now)), Ok(1))
    }

    /// Takes the next frame. What has come of it by the deadline is kept for the next call.
    pub(super) fn next(&self, deadline: Instant) -> Result<Incoming, Error> {
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let header = self.fill(&mut partial, deadline)?;
        let payload = mem::take(&mut *partial).payload;
        if let Some(raw) = RawKind::of(header.kind) {
            return Ok(Incoming::Raw(raw, payload));
        }
        match Reply::decode(header.kind, &payload) {
            Ok(Reply::Refused { refusal }) => Err(Error::refused(self.operation, refusal)),
            Ok(reply) => Ok(Incoming::Reply(reply)),
            Err(error) => Err(Error::because(
                ErrorKind::Untrustworthy,
                self.operation,
                error,
            )),
        }
    }

    fn fill(&self, partial: &mut Partial, deadline: Instant) -> Result<Header, Error> {
        let header = loop {
            if let Some(header) = partial.header {
                break header;
            }
            let rest = partial.head.get_mut(partial.head_len..).unwrap_or_default();
            if rest.is_empty() {
                let header = Header::decode(&partial.head).map_err(|error| {
                    Error::because(ErrorKind::Untrustworthy, self.operation, error)
                })?;
                partial.header = Some(header);
                // At most what a frame may have, and only as long as this call.
                partial.payload = vec![0; header.len];
                continue;
            }
            partial.head_len += self
                .read(rest, deadline)
                .map_err(|error| self.failed(error))?;
        };
        while partial.filled < header.len {
            let rest = partial
                .payload
                .get_mut(partial.filled..)
                .unwrap_or_default();
            partial.filled += self
                .read(rest, deadline)
                .map_err(|error| self.failed(error))?;
        }
        Ok(header)
    }

    /// Ends both directions, whoever waits for one.
    pub(super) fn close(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Takes the next frame, which has to be a reply.
    pub(super) fn reply(&self, deadline: Instant) -> Result<Reply, Error> {
        match self.next(deadline)? {
            Incoming::Reply(reply) => Ok(reply),
            Incoming::Raw(..) => Err(self.error(ErrorKind::Untrustworthy)),
        }
    }
}
