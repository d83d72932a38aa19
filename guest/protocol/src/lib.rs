//! Messages between host and guest: what the pilot is asked and what it answers.
//!
//! One set of messages in two forms. Over vsock they are length-bounded little-endian frames
//! ([`frame`]); over the serial line they are lines of `name key=value …` ([`Request::parse`] and
//! [`Display`](core::fmt::Display)). Each message and field is declared once, in [`Request`],
//! [`Reply`] and [`State`], and both forms follow from that declaration.
//!
//! A connection starts with [`Request::Hello`], which settles the version; everything after it is
//! one reply to each request, in order, with the request's tag.
//!
//! The messages of the agent in a Linux guest are in `agent`, behind the feature of that name.
//!
//! Without features the crate needs neither `std` nor an allocator: the pilot uses it too.

#![no_std]
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

#[cfg(feature = "agent")]
extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

#[cfg(feature = "agent")]
pub mod agent;
mod declare;
pub mod frame;
pub mod pattern;
mod reply;
mod request;
#[cfg(test)]
mod tests;
mod value;
#[cfg(feature = "std")]
mod vsock;
mod wire;

pub use reply::{Device, DeviceKind, ErrorCode, Outcome, Refusal, Reply, State};
pub use request::{Area, BlkOp, Crash, Mode, Request};
pub use value::{Bytes, Id, Ipv4, List, Mac, Text};
#[cfg(feature = "std")]
pub use vsock::{connect_vsock, greet_vsock};
pub use wire::{Reader, Wire, WireError, WireErrorKind, Writer};

/// The newest version of the messages that this crate speaks.
pub const VERSION: u16 = 1;
/// The oldest version that it still speaks.
pub const OLDEST_VERSION: u16 = 1;

/// vsock port of the command stream.
pub const CONTROL_PORT: u32 = 1024;
/// vsock port that sends back what it receives.
pub const ECHO_PORT: u32 = 1025;
/// vsock port that swallows what it receives.
pub const SINK_PORT: u32 = 1026;
/// vsock port that sends the pattern of seed [`SOURCE_SEED`] without end.
pub const SOURCE_PORT: u32 = 1027;
/// Seed of the stream that [`SOURCE_PORT`] sends.
pub const SOURCE_SEED: u64 = 0x0ff5_4007;

/// Ethertype of the frames that the pilot sends back with the addresses swapped
/// (IEEE 802 local experimental ethertype 1).
pub const ECHO_ETHERTYPE: u16 = 0x88b5;
/// UDP port that the pilot echoes, once it has an address (RFC 862).
pub const UDP_ECHO_PORT: u16 = 7;

/// First words of the line that the pilot prints when it is ready.
pub const READY: &str = "offshoot-pilot";
/// First word of the line that it prints when it dies of a fault.
pub const FAULT: &str = "pilot-fault";
/// First word of the line that it prints when it panics.
pub const PANIC: &str = "pilot-panic";
/// What it prints before each answer in text form.
pub const ANSWER: &str = "ok";
/// What it prints before each refusal in text form.
pub const REFUSED: &str = "error";

/// The longest request line in text form, in bytes.
pub const MAX_LINE: usize = 256;
/// The most virtual CPUs that a report lists.
pub const MAX_VCPUS: usize = 64;
/// The most devices that a report lists.
pub const MAX_DEVICES: usize = 24;
/// The most random bytes that one request gives.
pub const MAX_RANDOM: usize = 64;
