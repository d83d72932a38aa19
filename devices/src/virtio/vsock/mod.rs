//! virtio-vsock (virtio 1.2, 5.10): stream sockets between the guest and Unix sockets of the
//! host.
//!
//! A host program connects to the device's socket path, sends `CONNECT <port>\n` and, when a
//! program in the guest accepts, reads `OK <host port>\n`; from then on the socket is the
//! connection. When the guest connects to port `n` of the host (CID 2), the device connects to
//! `<path>_<n>`.
//!
//! # After a restore
//! Connections are not captured. The restored device tells the guest with a transport reset event
//! and moves no packet in either direction until the guest has handled it, which shows by the
//! event buffer coming back: Linux resets every connected socket when it handles the event, one
//! that was opened a moment before included. Host programs may connect at once; what they ask for
//! is delivered right after. A guest that posts no event buffers, or does not return them in
//! time, gets its traffic anyhow, and resets for whatever it sends on old connections.
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

pub mod connection;
mod device;
mod greeting;
mod listener;
mod mux;
pub mod packet;
mod ports;
mod reset;
mod slots;
mod state;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use listener::MAX_PATH;
pub use mux::HOST_CID;
pub use state::{GuestCid, VsockBinding, VsockState};
