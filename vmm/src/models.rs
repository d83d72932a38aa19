//! The kinds of virtio devices that a machine can have: the one place that knows them all.

use std::sync::{Arc, Mutex};

use offshoot_devices::virtio::balloon::{Balloon, BalloonConfig, BalloonState};
use offshoot_devices::virtio::blk::{Blk, BlkConfig, BlkState};
use offshoot_devices::virtio::net::{Net, NetConfig, NetState};
use offshoot_devices::virtio::rng::{BytesPerSecond, DEFAULT_RATE, Rng, RngState};
use offshoot_devices::virtio::vsock::{GuestCid, Vsock, VsockState};
use offshoot_devices::virtio::{SetupError, VirtioDevice};
use offshoot_snapshot_format::{self as format, Payload, Section, Sections};
use serde::{Deserialize, Serialize};

use crate::bindings::Bindings;
use crate::device_loop::Subscriber;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Memory, RamReclaim};
use crate::sync::lock;

/// A device as it is configured. It is the same in every copy of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ModelConfig {
    /// A drive. Its volume comes with the bindings.
    Drive(DriveConfig),
    /// Random bytes from the host, at most at this rate.
    Entropy(BytesPerSecond),
    /// A balloon: memory that the guest gives back.
    Balloon(BalloonConfig),
    /// A vsock: streams between guest and host. The host's socket comes with the bindings.
    Vsock(GuestCid),
    /// A network card. What it is connected to comes with the bindings.
    Net(NetConfig),
}

impl ModelConfig {
    /// Random bytes at the usual rate.
    pub const ENTROPY: Self = Self::Entropy(DEFAULT_RATE);
}

/// How a drive looks to the guest.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
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
    /// An entropy device.
    Entropy(RngState),
    /// A balloon.
    Balloon(BalloonState),
    /// A vsock.
    Vsock(VsockState),
    /// A network card.
    Net(NetState),
}

/// What a device needs from the bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Demand {
    Nothing,
    /// A socket on the host.
    Vsock,
    /// A peer.
    Net,
    /// A volume: of this size in bytes when the guest knows one already.
    Drive {
        size: Option<u64>,
        read_only: bool,
    },
}

/// A living device.
#[derive(Debug)]
pub(crate) enum Model {
    Drive(Arc<Mutex<Blk>>),
    Entropy(Arc<Mutex<Rng>>),
    Balloon(Arc<Mutex<Balloon>>),
    Vsock(Arc<Mutex<Vsock>>),
    Net(Arc<Mutex<Net>>),
}

impl ModelConfig {
    pub(crate) fn demand(&self) -> Demand {
        match self {
            Self::Drive(drive) => Demand::Drive {
                size: None,
                read_only: drive.read_only,
            },
            Self::Entropy(_) | Self::Balloon(_) => Demand::Nothing,
            Self::Vsock(_) => Demand::Vsock,
            Self::Net(_) => Demand::Net,
        }
    }
}

const SECTOR: u64 = 512;
const BLK: &str = "virtio-blk";
const RNG: &str = "virtio-rng";
const BALLOON: &str = "virtio-balloon";
const VSOCK: &str = "virtio-vsock";
const NET: &str = "virtio-net";

/// Every model that there is, as a snapshot's requirements list them.
pub(crate) const MODEL_NAMES: &[&str] = &[BLK, RNG, BALLOON, VSOCK, NET];

impl ModelState {
    pub(crate) fn demand(&self) -> Demand {
        match self {
            Self::Drive(state) => Demand::Drive {
                size: Some(state.capacity_sectors.saturating_mul(SECTOR)),
                read_only: state.read_only,
            },
            Self::Entropy(_) | Self::Balloon(_) => Demand::Nothing,
            Self::Vsock(_) => Demand::Vsock,
            Self::Net(_) => Demand::Net,
        }
    }

    /// The model's name, as a snapshot's requirements list it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Drive(_) => BLK,
            Self::Entropy(_) => RNG,
            Self::Balloon(_) => BALLOON,
            Self::Vsock(_) => VSOCK,
            Self::Net(_) => NET,
        }
    }

    /// The state as the section of the device at place `instance`.
    pub(crate) fn section(&self, instance: u32) -> std::result::Result<Section, format::Error> {
        match self {
            Self::Drive(state) => Section::required(instance, state),
            Self::Entropy(state) => Section::required(instance, state),
            Self::Balloon(state) => Section::required(instance, state),
            Self::Vsock(state) => Section::required(instance, state),
            Self::Net(state) => Section::required(instance, state),
        }
    }

    /// Takes the section of the device at place `instance`, whatever model it is of.
    pub(crate) fn take(sections: &mut Sections<'_>, instance: u32) -> Result<Self> {
        fn one<P: Payload>(
            sections: &mut Sections<'_>,
            instance: u32,
            wrap: fn(P) -> ModelState,
        ) -> Option<std::result::Result<ModelState, format::Error>> {
            let section = sections.take_if_present(P::KIND, instance)?;
            Some(section.decode().map(wrap))
        }
        one(sections, instance, Self::Drive)
            .or_else(|| one(sections, instance, Self::Entropy))
            .or_else(|| one(sections, instance, Self::Balloon))
            .or_else(|| one(sections, instance, Self::Vsock))
            .or_else(|| one(sections, instance, Self::Net))
            .ok_or_else(|| {
                let what = format!("device {instance} of the snapshot is of no known model");
                Error::new(ErrorKind::BadState, what)
            })?
            .map_err(|e| Error::because(ErrorKind::BadState, "the snapshot cannot be used", e))
    }
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

fn device_error(id: &str, error: offshoot_devices::Error) -> Error {
    use offshoot_devices::ErrorKind as Kind;
    let kind = match error.kind() {
        Kind::InvalidState => ErrorKind::BadState,
        Kind::InvalidConfig => ErrorKind::Config,
        _ => ErrorKind::Device,
    };
    Error::because(kind, format!("cannot make device {id}"), error)
}

fn set_up(id: &str, error: SetupError) -> Error {
    let kind = match error {
        SetupError::State { .. } => ErrorKind::BadState,
        SetupError::Host { .. } => ErrorKind::Device,
        // The others are about what was brought: paths, interfaces, ids.
        _ => ErrorKind::Bindings,
    };
    Error::because(kind, format!("cannot make device {id}"), error)
}

fn unbound(id: &str) -> Error {
    Error::new(ErrorKind::Bindings, format!("device {id} has no binding"))
}

impl Model {
    /// Makes a new device. The bindings have been checked.
    pub(crate) fn new(
        id: &str,
        config: &ModelConfig,
        bindings: &mut Bindings,
        memory: &Memory,
    ) -> Result<Self> {
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
            ModelConfig::Entropy(rate) => Rng::new(*rate)
                .map(|rng| Self::Entropy(shared(rng)))
                .map_err(|e| device_error(id, e)),
            ModelConfig::Vsock(cid) => {
                let host = bindings.vsocks.get(id).ok_or_else(|| unbound(id))?;
                Vsock::new(host.cid.unwrap_or(*cid), host.binding.clone())
                    .map(|vsock| Self::Vsock(shared(vsock)))
                    .map_err(|e| set_up(id, e))
            }
            ModelConfig::Net(config) => {
                let host = bindings.nets.remove(id).ok_or_else(|| unbound(id))?;
                let mut config = *config;
                config.mac = host.mac.unwrap_or(config.mac);
                host.peer
                    .open()
                    .and_then(|peer| Net::new(config, peer))
                    .map(|net| Self::Net(shared(net)))
                    .map_err(|e| set_up(id, e))
            }
            ModelConfig::Balloon(config) => Balloon::new(*config, RamReclaim::boxed(memory))
                .map(|balloon| Self::Balloon(shared(balloon)))
                .map_err(|e| device_error(id, e)),
        }
    }

    /// Makes a device from saved state, quiesced. The bindings have been checked.
    pub(crate) fn restore(
        id: &str,
        state: &ModelState,
        bindings: &mut Bindings,
        memory: &Memory,
    ) -> Result<Self> {
        match state {
            ModelState::Drive(state) => {
                let binding = bindings.drives.get(id).ok_or_else(|| unbound(id))?;
                Blk::restore(state.clone(), binding.host.clone())
                    .map(|blk| Self::Drive(shared(blk)))
                    .map_err(|e| device_error(id, e))
            }
            ModelState::Entropy(state) => Rng::restore(state)
                .map(|rng| Self::Entropy(shared(rng)))
                .map_err(|e| device_error(id, e)),
            ModelState::Vsock(state) => {
                let host = bindings.vsocks.get(id).ok_or_else(|| unbound(id))?;
                Vsock::restore(state, host.cid, host.binding.clone())
                    .map(|vsock| Self::Vsock(shared(vsock)))
                    .map_err(|e| set_up(id, e))
            }
            ModelState::Net(state) => {
                let host = bindings.nets.remove(id).ok_or_else(|| unbound(id))?;
                host.peer
                    .open()
                    .and_then(|peer| Net::restore(state, host.mac, peer))
                    .map(|net| Self::Net(shared(net)))
                    .map_err(|e| set_up(id, e))
            }
            ModelState::Balloon(state) => Balloon::restore(state, RamReclaim::boxed(memory))
                .map(|balloon| Self::Balloon(shared(balloon)))
                .map_err(|e| device_error(id, e)),
        }
    }

    /// The device's state; it is quiesced.
    pub(crate) fn save(&self) -> ModelState {
        match self {
            Self::Drive(blk) => ModelState::Drive(lock(blk).save()),
            Self::Entropy(rng) => ModelState::Entropy(lock(rng).save()),
            Self::Balloon(balloon) => ModelState::Balloon(lock(balloon).save()),
            Self::Vsock(vsock) => ModelState::Vsock(lock(vsock).save()),
            Self::Net(net) => ModelState::Net(lock(net).save()),
        }
    }

    pub(crate) fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        match self {
            Self::Drive(blk) => Arc::clone(blk) as _,
            Self::Entropy(rng) => Arc::clone(rng) as _,
            Self::Balloon(balloon) => Arc::clone(balloon) as _,
            Self::Vsock(vsock) => Arc::clone(vsock) as _,
            Self::Net(net) => Arc::clone(net) as _,
        }
    }

    pub(crate) fn subscriber(&self) -> Subscriber {
        match self {
            Self::Drive(blk) => Arc::clone(blk) as _,
            Self::Entropy(rng) => Arc::clone(rng) as _,
            Self::Balloon(balloon) => Arc::clone(balloon) as _,
            Self::Vsock(vsock) => Arc::clone(vsock) as _,
            Self::Net(net) => Arc::clone(net) as _,
        }
    }
}
