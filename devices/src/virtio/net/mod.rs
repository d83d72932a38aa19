//! virtio-net (virtio 1.2, 5.1) with one pair of queues, over a tap interface or a Unix stream
//! socket in the framing of passt and QEMU's `-netdev stream`.
//!
//! What is offered follows the peer: a tap takes checksum and segmentation offloads both ways,
//! a stream socket none. MAC, MTU, link status and mergeable receive buffers are always there.
//! Nothing is filtered on reception.
//!
//! When the peer goes, the link goes down: the guest sees it in the status field and by a
//! configuration interrupt, and what it sends is dropped. Nothing is reconnected silently.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test fails by panicking"
    )
)]

mod backend;
mod device;
mod header;
mod peer;
mod receive;
mod state;
mod stream;
mod tap;
mod tap_ioctl;
#[cfg(test)]
mod tests;
mod unplugged;

pub use backend::{NetBackend, OFFLOADS, Sent};
pub use device::Net;
pub use header::{HEADER_LEN, MAX_FRAME, MAX_PACKET};
pub use state::{Mac, NetConfig, NetState};
pub use stream::Stream;
pub use tap::Tap;
pub use unplugged::Unplugged;
