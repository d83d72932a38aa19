//! The qcow2 backend, with `qemu-img` as the oracle.

#![allow(
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "sizes of test images, random bytes, and why a test is skipped"
)]

mod basics;
mod engines;
mod oracle;
#[cfg(feature = "qcow2-rs")]
mod qcow2_rs;
#[path = "../support/mod.rs"]
mod support;
