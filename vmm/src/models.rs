//! The kinds of virtio devices that a machine can have: the one place that knows them all.

use std::sync::{Arc, Mutex};

use offshoot_devices::virtio::VirtioDevice;
use offshoot_devices::virtio::blk::{Blk, BlkConfig, BlkState};

use crate::bindings::Bindings;
use crate::device_loop::Subscriber;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::lock;

/// A device as it is configured. It is the same in every copy of a machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ModelConfig {
    /// A drive. Its volume comes with the bindings.
    Drive(DriveConfig),
}

/// How a drive looks to the guest.
#[derive(Debug, Clone, Default)]
pub struct DriveConfig {
    /// What the guest reads as its serial number: at most 20 bytes; its id when there is none.
    pub serial: Option<String>,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// A device's saved state.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ModelState {
    /// A drive.
    Drive(BlkState),
}

/// What a device needs from the bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Demand {
    /// A volume: of this size in bytes when the guest knows one already.
    Drive { size: Option<u64>, read_only: bool },
}

/// A living device.
#[derive(Debug)]
pub(crate) enum Model {
    Drive(Arc<Mutex<Blk>>),
}

impl ModelConfig {
    pub(crate) fn demand(&self) -> Demand {
        match self {
            Self::Drive(drive) => Demand::Drive {
                size: None,
                read_only: drive.read_only,
            },
        }
    }
}

const SECTOR: u64 = 512;

impl ModelState {
    pub(crate) fn demand(&self) -> Demand {
        match self {
            Self::Drive(state) => Demand::Drive {
                size: Some(state.capacity_sectors.saturating_mul(SECTOR)),
                read_only: state.read_only,
            },
        }
    }

    /// The model's name, as a snapshot's requirements list it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Drive(_) => "virtio-blk",
        }
    }
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

fn device_error(id: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::because(ErrorKind::Device, format!("cannot make device {id}"), error)
}

fn unbound(id: &str) -> Error {
    Error::new(ErrorKind::Bindings, format!("device {id} has no binding"))
}

impl Model {
    /// Makes a new device. The bindings have been checked.
    pub(crate) fn new(id: &str, config: &ModelConfig, bindings: &Bindings) -> Result<Self> {
        match config {
            ModelConfig::Drive(drive) => {
                let binding = bindings.drives.get(id).ok_or_else(|| unbound(id))?;
                let mut config = BlkConfig::new(id);
                config.read_only = drive.read_only;
                if let Some(serial) = &drive.serial {
                    config.serial = [0; 20];
                    if serial.len() > config.serial.len() {
                        return Err(Error::new(
                            ErrorKind::Config,
                            format!("the serial number of drive {id} is longer than 20 bytes"),
                        ));
                    }
                    config.serial[..serial.len()].copy_from_slice(serial.as_bytes());
                }
                Blk::new(config, binding.host.clone())
                    .map(|blk| Self::Drive(shared(blk)))
                    .map_err(|e| device_error(id, e))
            }
        }
    }

    /// Makes a device from saved state, quiesced. The bindings have been checked.
    pub(crate) fn restore(id: &str, state: &ModelState, bindings: &Bindings) -> Result<Self> {
        match state {
            ModelState::Drive(state) => {
                let binding = bindings.drives.get(id).ok_or_else(|| unbound(id))?;
                Blk::restore(state.clone(), binding.host.clone())
                    .map(|blk| Self::Drive(shared(blk)))
                    .map_err(|e| device_error(id, e))
            }
        }
    }

    /// The device's state; it is quiesced.
    pub(crate) fn save(&self) -> ModelState {
        match self {
            Self::Drive(blk) => ModelState::Drive(lock(blk).save()),
        }
    }

    pub(crate) fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        match self {
            Self::Drive(blk) => Arc::clone(blk) as _,
        }
    }

    pub(crate) fn subscriber(&self) -> Subscriber {
        match self {
            Self::Drive(blk) => Arc::clone(blk) as _,
        }
    }
}
