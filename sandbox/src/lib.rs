//! Sandboxes that fork like processes: what embedders use.
//!
//! [`agent`] is the host's side of the agent in a Linux guest: commands, files, figures, and the
//! identity of a fork. It needs a stream to the guest and nothing else of Offshoot.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod agent;
mod error;

pub use error::{Error, ErrorKind};
