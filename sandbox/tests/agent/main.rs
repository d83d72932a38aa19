//! The agent and the host's side of it against each other, and each against somebody hostile.
//! The agent is the static program that goes into guests, as a process on this machine.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test program: it says what it skips, and fails by panicking"
)]

mod commands;
mod files;
mod hostile_agent;
mod hostile_client;
mod identity;
mod init;
mod jobs;
mod rig;
mod terminal;
mod vsock;
