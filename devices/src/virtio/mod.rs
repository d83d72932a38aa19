//! Virtio 1.2 devices and their MMIO transport.

pub mod balloon;
pub mod blk;
mod buffers;
mod device;
pub mod interrupt;
pub mod mmio;
pub mod net;
mod ring;
pub mod rng;
mod setup;
#[cfg(test)]
mod test_rig;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;

pub use device::{Activation, DeviceError, VirtioDevice};
pub use interrupt::Interrupt;
pub use mmio::{MmioTransport, TransportState};
pub use setup::SetupError;
