//! The machine: KVM, guest memory, vCPUs, boot, capture and build.

pub mod acpi;
pub mod arch;
mod bindings;
pub mod boot;
mod build;
pub mod bus;
mod capture;
mod config;
mod device_loop;
mod error;
pub mod exits;
pub mod kvm;
mod legacy;
mod machine;
pub mod memory;
mod models;
mod requirements;
mod slots;
mod snapshot;
mod state;
mod sync;
mod template;
#[cfg(test)]
mod tests;
mod threads;
mod vcpu;
pub mod worker;

pub use bindings::{
    Bindings, DriveBinding, DriveSource, Misfit, Misfits, NetHost, NetPeer, VsockHost,
};
pub use config::{DeviceConfig, MAX_DEVICES, MachineConfig};
pub use error::{Error, ErrorKind, Result};
pub use exits::{ExitReason, Exits, KvmError, Registers};
pub use kvm::Host;
pub use legacy::{LegacyState, SerialOutput};
pub use machine::{Cleanup, Machine, Paused, Running};
pub use memory::{Memory, RamSize};
pub use models::{DriveConfig, ModelConfig, ModelState};
pub use offshoot_devices::vmgenid::GenerationId;
pub use snapshot::{SaveOptions, Saved};
pub use state::{DeviceState, MachineState, PlatformState};
pub use template::{Origin, Template};
