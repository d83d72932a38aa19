//! The machine: KVM, guest memory, vCPUs, boot, capture and build.
#![allow(
    dead_code,
    unused_imports,
    reason = "the machine that uses these pieces is the next to come"
)]

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod bus;
mod error;
pub mod exits;
pub mod kvm;
pub mod memory;
mod sync;
#[cfg(test)]
mod tests;
mod threads;
mod vcpu;

pub use error::{Error, ErrorKind, Result};
