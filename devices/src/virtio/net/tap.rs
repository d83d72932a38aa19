//! A tap interface as the peer.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::backend::{NetBackend, OFFLOADS, Sent};
use super::tap_ioctl;
use crate::virtio::SetupError;

/// A queue of a tap interface, with virtio headers.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Opens the tap interface `name`, which must exist.
    ///
    /// # Errors
    /// When there is no such interface, it is no tap, somebody else has it, or the process may
    /// not open it.
    pub fn open(name: &str) -> Result<Self, SetupError> {
        raw_name(name)?;
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )
        .map_err(|e| SetupError::host("cannot look for a tap interface")(e.into()))?;
        // The kernel makes what does not exist; a mistyped name is not to do that.
        match rustix::net::netdevice::name_to_index(&socket, name) {
            Ok(_) => Self::attach(name),
            Err(Errno::NODEV | Errno::NOENT) => Err(SetupError::NoSuchTap {
                name: name.to_owned(),
            }),
            Err(e) => Err(SetupError::host("cannot look for a tap interface")(
                e.into(),
            )),
        }
    }

    /// Opens the tap interface `name`, making it when it does not exist; one that was made here
    /// goes with the descriptor.
    ///
    /// # Errors
    /// As for [`open`](Self::open), but for an interface that does not exist.
    pub fn create(name: &str) -> Result<Self, SetupError> {
        Self::attach(name)
    }

    fn attach(name: &str) -> Result<Self, SetupError> {
        let raw = raw_name(name)?;
        let fd: OwnedFd = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(SetupError::host("cannot open /dev/net/tun"))?
            .into();
        tap_ioctl::attach(fd.as_fd(), raw).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => SetupError::TapBusy {
                name: name.to_owned(),
            },
            Some(libc::EINVAL) => SetupError::NotATap {
                name: name.to_owned(),
            },
            _ => SetupError::host("cannot attach to the tap interface")(e),
        })?;
        Self::prepare(fd)
    }

    /// Takes over a descriptor that is attached to a tap interface with `IFF_NO_PI` and
    /// `IFF_VNET_HDR`, as another process passed it.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SetupError> {
        let flags = tap_ioctl::flags(fd.as_fd()).map_err(SetupError::host(
            "the descriptor is not one of a tap interface",
        ))?;
        if flags & tap_ioctl::FLAGS != tap_ioctl::FLAGS {
            return Err(SetupError::NotATap {
                name: "the descriptor given (without IFF_TAP, IFF_NO_PI or IFF_VNET_HDR)"
                    .to_owned(),
            });
        }
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|e| SetupError::host("cannot make the tap non-blocking")(e.into()))?;
        Self::prepare(fd)
    }

    fn prepare(fd: OwnedFd) -> Result<Self, SetupError> {
        tap_ioctl::set_header_len(fd.as_fd(), 12)
            .and_then(|()| tap_ioctl::set_offload(fd.as_fd(), 0))
            .map_err(SetupError::host("cannot configure the tap interface"))?;
        Ok(Self { fd })
    }
}

/// The name as the kernel takes it.
fn raw_name(name: &str) -> Result<[u8; 16], SetupError> {
    let bytes = name.as_bytes();
    let mut raw = [0; 16];
    let place = raw.get_mut(..bytes.len()).filter(|p| {
        // One byte is the terminating zero; `%` would be a template for the kernel.
        !p.is_empty() && p.len() < 16 && !bytes.contains(&0) && !bytes.contains(&b'%')
    });
    let Some(place) = place else {
        return Err(SetupError::TapName {
            name: name.to_owned(),
        });
    };
    place.copy_from_slice(bytes);
    Ok(raw)
}

impl NetBackend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn offload_features(&self) -> u64 {
        OFFLOADS
    }

    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        let has = |bit: u32, flag: libc::c_uint| if features & (1 << bit) != 0 { flag } else { 0 };
        let checksum = has(VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM);
        // The kernel segments only what it also may leave without a checksum.
        let segments = if checksum == 0 {
            0
        } else {
            has(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4)
                | has(VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)
        };
        tap_ioctl::set_offload(self.fd.as_fd(), checksum | segments)
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.fd, &mut *packet) {
                Ok(len) => return Ok(Some(len)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<Sent> {
        loop {
            match rustix::io::write(&self.fd, packet) {
                Ok(_) => return Ok(Sent::Taken),
                Err(Errno::AGAIN) => return Ok(Sent::Blocked),
                Err(Errno::INTR) => {}
                Err(e @ Errno::BADFD) => return Err(e.into()),
                // The interface is down, the host is short of memory, or the stack does not like
                // the frame: it is lost, as frames may be.
                Err(error) => {
                    tracing::debug!(%error, "the tap dropped a frame");
                    return Ok(Sent::Taken);
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }
}
