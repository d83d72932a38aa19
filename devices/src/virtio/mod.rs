//! Virtio 1.2 devices and their MMIO transport.

pub mod balloon;
pub mod blk;
mod device;
pub mod interrupt;
pub mod mmio;
mod ring;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use device::{Activation, DeviceError, VirtioDevice};
pub use interrupt::Interrupt;
pub use mmio::{MmioTransport, TransportState};
