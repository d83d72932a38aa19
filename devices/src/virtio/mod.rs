//! Virtio 1.2 devices and their MMIO transport.

mod device;
pub mod interrupt;

pub use device::{Activation, DeviceError, VirtioDevice};
pub use interrupt::Interrupt;
