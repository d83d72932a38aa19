//! KVM: what this host offers, and the making of a VM.

mod host;
mod vm;

pub use host::Host;
pub(crate) use vm::{IrqLine, Vm};
