//! Device models and their saved state. Nothing here knows KVM: interrupts and queue
//! notifications are eventfds, guest memory is `vm-memory`, disks are `offshoot-storage` volumes.

mod error;
mod event;
pub mod legacy;
pub mod virtio;
pub mod vmgenid;

pub use error::{Error, ErrorKind};

/// Guest RAM as every device sees it. One `Arc` of it is shared by all of a machine's devices.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
