//! What a machine takes from its host: every resource, by the id of the device that needs it.
//!
//! None of this is ever in saved state. A copy of a machine gets bindings of its own, and whatever
//! does not fit is listed at once, before anything is made.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use offshoot_devices::virtio::SetupError;
use offshoot_devices::virtio::blk::BlkHost;
use offshoot_devices::virtio::net::{Mac, NetBackend, Stream, Tap, Unplugged};
use offshoot_devices::virtio::vsock::{GuestCid, VsockBinding};
use offshoot_devices::vmgenid::GenerationId;
use offshoot_storage::{LayerName, StorageBackend, Volume};

use crate::error::{Error, ErrorKind, Result};
use crate::legacy::SerialOutput;
use crate::models::Demand;

/// The volume behind a drive, and how it is frozen for a snapshot.
#[derive(Debug, Clone)]
pub struct DriveBinding {
    /// The volume and how its I/O is done.
    pub host: BlkHost,
    /// Where the volume comes from. Without it the machine runs, and cannot be written into a
    /// snapshot.
    pub source: Option<DriveSource>,
}

/// Where a drive's volume comes from.
#[derive(Debug, Clone)]
pub struct DriveSource {
    /// The backend that keeps it.
    pub backend: Arc<dyn StorageBackend>,
    /// The layer it is, when it was opened by [`StorageBackend::open_layer`]: it is immutable and
    /// needs no freezing.
    pub layer: Option<LayerName>,
}

impl DriveBinding {
    /// A volume of `backend`.
    #[must_use]
    pub fn volume(backend: Arc<dyn StorageBackend>, volume: Arc<dyn Volume>) -> Self {
        Self {
            host: BlkHost::new(volume),
            source: Some(DriveSource {
                backend,
                layer: None,
            }),
        }
    }

    /// An immutable layer of `backend`, for a read-only drive.
    #[must_use]
    pub fn layer(
        backend: Arc<dyn StorageBackend>,
        layer: LayerName,
        volume: Arc<dyn Volume>,
    ) -> Self {
        Self {
            host: BlkHost::new(volume),
            source: Some(DriveSource {
                backend,
                layer: Some(layer),
            }),
        }
    }
}

/// How the host reaches the guest's vsock.
#[derive(Debug, Clone)]
pub struct VsockHost {
    /// The Unix socket on the host and its limits.
    pub binding: VsockBinding,
    /// Another CID than the guest has had.
    pub cid: Option<GuestCid>,
}

impl VsockHost {
    /// A Unix socket at `path`, and the CID that the guest has.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            binding: VsockBinding::new(path),
            cid: None,
        }
    }
}

/// What carries a network card's frames.
#[derive(Debug)]
#[non_exhaustive]
pub enum NetPeer {
    /// The tap interface of this name, which must exist.
    Tap(String),
    /// The program that listens on this Unix socket, in the framing of passt and QEMU.
    Socket(PathBuf),
    /// Something that is open already.
    Open(Box<dyn NetBackend>),
    /// Nothing: the link is down.
    Unplugged,
}

impl NetPeer {
    pub(crate) fn open(self) -> std::result::Result<Box<dyn NetBackend>, SetupError> {
        Ok(match self {
            Self::Tap(name) => Box::new(Tap::open(&name)?),
            Self::Socket(path) => Box::new(Stream::connect(&path)?),
            Self::Open(backend) => backend,
            Self::Unplugged => Box::new(Unplugged::new()?),
        })
    }
}

/// How a network card is connected.
#[derive(Debug)]
pub struct NetHost {
    /// The other end of its cable.
    pub peer: NetPeer,
    /// Another Ethernet address than the card has had. The driver of a guest that runs already
    /// looks at it only when it starts.
    pub mac: Option<Mac>,
}

impl NetHost {
    /// Connected to `peer`, with the address that the card has.
    #[must_use]
    pub fn to(peer: NetPeer) -> Self {
        Self { peer, mac: None }
    }
}

/// Everything that a machine takes from its host.
#[derive(Debug, Default)]
pub struct Bindings {
    /// Volumes, by the id of the drive.
    pub drives: BTreeMap<String, DriveBinding>,
    /// The host's side of each vsock, by the id of the device.
    pub vsocks: BTreeMap<String, VsockHost>,
    /// The other end of each network card's cable, by the id of the device.
    pub nets: BTreeMap<String, NetHost>,
    /// Where the serial port's output goes; nowhere when there is none here.
    pub serial: Option<SerialOutput>,
    /// The generation id that the guest finds; a fresh one when there is none here.
    pub generation: Option<GenerationId>,
}

impl Bindings {
    /// Brings a volume for the drive `id`.
    #[must_use]
    pub fn with_drive(mut self, id: impl Into<String>, drive: DriveBinding) -> Self {
        self.drives.insert(id.into(), drive);
        self
    }

    /// Brings the host's side of the vsock `id`.
    #[must_use]
    pub fn with_vsock(mut self, id: impl Into<String>, vsock: VsockHost) -> Self {
        self.vsocks.insert(id.into(), vsock);
        self
    }

    /// Connects the network card `id`.
    #[must_use]
    pub fn with_net(mut self, id: impl Into<String>, net: NetHost) -> Self {
        self.nets.insert(id.into(), net);
        self
    }

    /// Sends the serial port's output to `out`.
    #[must_use]
    pub fn with_serial(mut self, out: impl Write + Send + 'static) -> Self {
        self.serial = Some(SerialOutput(Box::new(out)));
        self
    }

    /// Compares with what the devices demand.
    pub(crate) fn check<'a>(&self, demands: impl Iterator<Item = (&'a str, Demand)>) -> Result<()> {
        let mut misfits = Vec::new();
        let mut wanted = Vec::new();
        for (id, demand) in demands {
            match demand {
                Demand::Nothing => {}
                Demand::Vsock => {
                    wanted.push(id);
                    if !self.vsocks.contains_key(id) {
                        misfits.push(Misfit::NoVsock(id.into()));
                    }
                }
                Demand::Net => {
                    wanted.push(id);
                    if !self.nets.contains_key(id) {
                        misfits.push(Misfit::NoNet(id.into()));
                    }
                }
                Demand::Drive { size, read_only } => {
                    wanted.push(id);
                    match self.drives.get(id) {
                        None => misfits.push(Misfit::NoDrive(id.into())),
                        Some(drive) => {
                            let volume = &drive.host.volume;
                            if size.is_some_and(|size| size != volume.size()) {
                                misfits.push(Misfit::DriveSize {
                                    id: id.into(),
                                    wanted: size.unwrap_or(0),
                                    found: volume.size(),
                                });
                            }
                            if volume.is_read_only() && !read_only {
                                misfits.push(Misfit::DriveReadOnly(id.into()));
                            }
                        }
                    }
                }
            }
        }
        let unknown = |id: &&String| !wanted.contains(&id.as_str());
        let drives = self.drives.keys().filter(unknown).cloned();
        misfits.extend(drives.map(Misfit::UnknownDrive));
        let vsocks = self.vsocks.keys().filter(unknown).cloned();
        misfits.extend(vsocks.map(Misfit::UnknownVsock));
        let nets = self.nets.keys().filter(unknown).cloned();
        misfits.extend(nets.map(Misfit::UnknownNet));
        if misfits.is_empty() {
            Ok(())
        } else {
            Err(Misfits(misfits).into())
        }
    }
}

/// One thing that does not fit between a machine and its bindings.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Misfit {
    /// A drive has no volume.
    NoDrive(String),
    /// There is no such drive.
    UnknownDrive(String),
    /// A vsock has no socket on the host.
    NoVsock(String),
    /// There is no such vsock.
    UnknownVsock(String),
    /// A network card is not said to be connected to anything.
    NoNet(String),
    /// There is no such network card.
    UnknownNet(String),
    /// The volume does not have the size that the guest knows.
    DriveSize {
        /// The drive.
        id: String,
        /// The size that the guest knows, in bytes.
        wanted: u64,
        /// The volume's size, in bytes.
        found: u64,
    },
    /// The guest may write and the volume may not be written.
    DriveReadOnly(String),
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDrive(id) => write!(f, "drive {id} has no volume"),
            Self::UnknownDrive(id) => write!(f, "there is no drive {id}"),
            Self::NoVsock(id) => write!(f, "vsock {id} has no socket on the host"),
            Self::UnknownVsock(id) => write!(f, "there is no vsock {id}"),
            Self::NoNet(id) => write!(f, "network card {id} has no peer"),
            Self::UnknownNet(id) => write!(f, "there is no network card {id}"),
            Self::DriveSize { id, wanted, found } => write!(
                f,
                "drive {id} has {wanted} bytes for the guest and its volume has {found}"
            ),
            Self::DriveReadOnly(id) => {
                write!(f, "drive {id} is writable and its volume is read-only")
            }
        }
    }
}

/// All that does not fit; the source of an error of kind [`ErrorKind::Bindings`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfits(pub Vec<Misfit>);

impl fmt::Display for Misfits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, misfit) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "; " };
            write!(f, "{comma}{misfit}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Misfits {}

impl From<Misfits> for Error {
    fn from(misfits: Misfits) -> Self {
        Self::because(
            ErrorKind::Bindings,
            "what was brought does not fit the machine",
            misfits,
        )
    }
}
