//! A Unix stream socket as the peer: each frame behind its length (32 bits, big-endian), as passt
//! and QEMU's `-netdev stream` have it. No virtio headers, so no offloads.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::backend::{NetBackend, Sent};
use super::header::{HEADER_LEN, MAX_FRAME};
use crate::virtio::SetupError;

const LENGTH: usize = 4;
/// Room for a whole frame and what came with it.
const INBOX: usize = 2 * (LENGTH + MAX_FRAME);

/// A connection to a program that carries frames.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    /// Bytes received: `inbox[start..end]` are not taken yet.
    inbox: Vec<u8>,
    start: usize,
    end: usize,
    /// What is left of a frame that was sent in part, less than one frame.
    outbox: Vec<u8>,
}

impl Stream {
    /// Connects to the program that listens at `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, SetupError> {
        let failed = SetupError::host("cannot connect to the network socket");
        Self::new(UnixStream::connect(path).map_err(failed)?)
    }

    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> Result<Self, SetupError> {
        socket.set_nonblocking(true).map_err(SetupError::host(
            "cannot make the network socket non-blocking",
        ))?;
        Ok(Self {
            socket: socket.into(),
            inbox: vec![0; INBOX],
            start: 0,
            end: 0,
            outbox: Vec::new(),
        })
    }

    /// The next whole frame in the inbox, taken out of it.
    fn next_frame(&mut self) -> io::Result<Option<&[u8]>> {
        let waiting = self.inbox.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the peer announced a frame that is too long",
            ));
        }
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        self.start = self.start.saturating_add(LENGTH).saturating_add(length);
        Ok(Some(frame))
    }

    /// Reads what there is. False when there is nothing.
    fn fill(&mut self) -> io::Result<bool> {
        self.inbox.copy_within(self.start..self.end, 0);
        self.end = self.end.saturating_sub(self.start);
        self.start = 0;
        let room = self.inbox.get_mut(self.end..).unwrap_or_default();
        loop {
            match rustix::net::recv(&self.socket, &mut *room, RecvFlags::empty()) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((got, _)) => {
                    self.end = self.end.saturating_add(got);
                    return Ok(true);
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl NetBackend for Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn offload_features(&self) -> u64 {
        0
    }

    fn set_offloads(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if let Some(frame) = self.next_frame()? {
                let len = HEADER_LEN.saturating_add(frame.len());
                let Some((header, place)) = packet
                    .get_mut(..len)
                    .and_then(|p| p.split_at_mut_checked(HEADER_LEN))
                else {
                    return Err(io::ErrorKind::InvalidInput.into());
                };
                header.fill(0);
                place.copy_from_slice(frame);
                return Ok(Some(len));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<Sent> {
        if !self.flush()? {
            return Ok(Sent::Blocked);
        }
        let frame = packet.get(HEADER_LEN..).unwrap_or_default();
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_be_bytes();
        let parts = [IoSlice::new(&length), IoSlice::new(frame)];
        let sent = loop {
            let mut nothing = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.socket, &parts, &mut nothing, SendFlags::NOSIGNAL) {
                Ok(sent) => break sent,
                Err(Errno::AGAIN) => return Ok(Sent::Blocked),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        // The peer has a part of it: the rest must follow, whatever comes next.
        self.outbox.extend(length.iter().chain(frame).skip(sent));
        Ok(Sent::Taken)
    }

    fn flush(&mut self) -> io::Result<bool> {
        while !self.outbox.is_empty() {
            match rustix::net::send(&self.socket, &self.outbox, SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.outbox.drain(..sent.min(self.outbox.len()))),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }
}
