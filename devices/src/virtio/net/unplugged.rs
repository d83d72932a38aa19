//! No peer at all: the card is there and its link is down.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;

use super::backend::{NetBackend, OFFLOADS, Sent};
use crate::virtio::SetupError;

/// A card without a cable: for a copy that is to have no network although its source had one.
/// Whatever offloads the guest uses, it can go on.
#[derive(Debug)]
pub struct Unplugged {
    /// Never becomes ready.
    fd: OwnedFd,
}

impl Unplugged {
    /// # Errors
    /// When the host has no descriptor.
    pub fn new() -> Result<Self, SetupError> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| {
                SetupError::host("cannot make a descriptor for a network card")(e.into())
            })?;
        Ok(Self { fd })
    }
}

fn unplugged() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the card is not plugged in")
}

impl NetBackend for Unplugged {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn offload_features(&self) -> u64 {
        OFFLOADS
    }

    fn set_offloads(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, _packet: &mut [u8]) -> io::Result<Option<usize>> {
        Err(unplugged())
    }

    fn send(&mut self, _packet: &[u8]) -> io::Result<Sent> {
        Err(unplugged())
    }

    fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }
}
