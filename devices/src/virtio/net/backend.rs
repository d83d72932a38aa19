//! What carries a network device's frames on the host.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

/// The feature bits that depend on the peer (virtio 1.2, 5.1.3).
pub const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The peer has it, or dropped it as networks may.
    Taken,
    /// There is no room at the moment: nothing of it was sent, offer it again.
    Blocked,
}

/// A network device's peer on the host. A packet is a `virtio_net_hdr_v1` of
/// [`HEADER_LEN`](super::HEADER_LEN) bytes and a frame.
///
/// All calls come from one thread at a time and must not block. The device watches
/// [`fd`](Self::fd) edge-triggered: it reads until `Ok(None)` and, after [`Sent::Blocked`], waits
/// until the descriptor is writable.
pub trait NetBackend: Send + Debug {
    /// The descriptor that becomes readable and writable. Always the same one.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Those of [`OFFLOADS`] that the peer can do. Always the same ones.
    fn offload_features(&self) -> u64;

    /// The driver has agreed on `features`; of [`OFFLOADS`], only these may be used.
    ///
    /// # Errors
    /// When the peer refuses.
    fn set_offloads(&mut self, features: u64) -> io::Result<()>;

    /// Takes a packet from the peer: its length, or `None` when there is none now. `packet` has
    /// [`MAX_PACKET`](super::MAX_PACKET) bytes.
    ///
    /// # Errors
    /// When there will never be another one.
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>>;

    /// Gives the peer a packet whose header was checked.
    ///
    /// # Errors
    /// When the peer will never take another one.
    fn send(&mut self, packet: &[u8]) -> io::Result<Sent>;

    /// Goes on with a packet that was taken in part; `false` when the peer still has no room.
    ///
    /// # Errors
    /// When the peer will never take another one.
    fn flush(&mut self) -> io::Result<bool>;
}
