//! The qcow2 backend, with `qemu-img` as the oracle.

#![allow(
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "sizes of test images, random bytes, and why a test is skipped"
)]

mod basics;
mod oracle;
