//! Messages over a `SOCK_SEQPACKET` socket: one datagram a message, descriptors beside it.
//!
//! Layout of a datagram: the version of the messages (16 bits, little-endian), then the message in
//! postcard. A datagram is at most [`MAX_MESSAGE`] bytes and carries at most [`MAX_FDS`] descriptors.
//! What comes from the other side is bounded and decoded without trust: a worker may have been taken
//! over by its guest.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version of the messages. Both sides are the same build as a rule; another one is refused.
const VERSION: u16 = 1;
/// The largest message in bytes.
pub(crate) const MAX_MESSAGE: usize = 64 << 10;
/// The most descriptors in one message (Linux allows 253, `SCM_MAX_FD`).
pub(crate) const MAX_FDS: usize = 253;

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

/// What was received.
#[derive(Debug)]
pub(crate) struct Received<T> {
    pub(crate) message: T,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Channel {
    /// Two ends.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(a), Self(b)))
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends a message whole, waiting for room for at most `timeout`.
    pub(crate) fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> io::Result<()> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        if fds.len() > MAX_FDS {
            return Err(invalid("too many descriptors for one message"));
        }
        let start = VERSION.to_le_bytes().to_vec();
        let bytes = postcard::to_extend(message, start).map_err(io::Error::other)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(invalid("the message is too long"));
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        loop {
            let mut beside = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(invalid("too many descriptors for one message"));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut beside, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, timeout)? {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes a message if one is there: `None` when the other side is gone.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; `InvalidData` for one that cannot be read.
    pub(crate) fn try_receive<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = loop {
            match recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut beside,
                flags,
            ) {
                Ok(got) => break got,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        let mut fds = Vec::new();
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        if got
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(invalid("a message was cut off"));
        }
        let (version, body) = bytes
            .get(..got.bytes)
            .and_then(|bytes| bytes.split_first_chunk())
            .ok_or_else(|| invalid("a message is too short"))?;
        if u16::from_le_bytes(*version) != VERSION {
            return Err(invalid(
                "the other side speaks another version: worker and embedder must be of one build",
            ));
        }
        let (message, rest) = postcard::take_from_bytes(body)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        if !rest.is_empty() {
            return Err(invalid("a message is longer than it should be"));
        }
        Ok(Some(Received { message, fds }))
    }

    /// Waits until a message can be taken or the other side is gone; `false` after `timeout`.
    pub(crate) fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        self.wait(PollFlags::IN, timeout)
    }

    fn wait(&self, what: PollFlags, timeout: Duration) -> io::Result<bool> {
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.0, what)], Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn messages_keep_their_bounds_and_their_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let file = File::open("/proc/self/stat").unwrap();
        a.send(&"one".to_owned(), &[file.as_fd(), file.as_fd()], SOON)
            .unwrap();
        a.send(&"two".to_owned(), &[], SOON).unwrap();
        let one: Received<String> = b.try_receive().unwrap().unwrap();
        assert_eq!((one.message.as_str(), one.fds.len()), ("one", 2));
        let mut text = String::new();
        File::from(one.fds.into_iter().next().unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert!(!text.is_empty());
        let two: Received<String> = b.try_receive().unwrap().unwrap();
        assert_eq!((two.message.as_str(), two.fds.len()), ("two", 0));
        let none = b.try_receive::<String>().unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert!(b.wait_readable(SOON).unwrap());
        assert!(b.try_receive::<String>().unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let (a, b) = Channel::pair().unwrap();
        let raw = |bytes: &[u8]| {
            rustix::net::send(&a.0, bytes, SendFlags::empty()).unwrap();
            b.try_receive::<String>().unwrap_err()
        };
        for (bytes, part) in [
            (&[1][..], "too short"),
            (&[2, 0, 0], "another version"),
            (&[1, 0, 5, b'x'], ""),
            (&[1, 0, 1, b'x', b'y'], "longer"),
        ] {
            let error = raw(bytes);
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
            assert!(error.to_string().contains(part), "{error}");
        }
        let long = "x".repeat(MAX_MESSAGE);
        let error = a.send(&long, &[], SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_side_that_takes_nothing_costs_a_timeout() {
        let (a, _b) = Channel::pair().unwrap();
        let block = "x".repeat(60_000);
        let error = loop {
            if let Err(error) = a.send(&block, &[], Duration::from_millis(20)) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
