//! What a worker is told to make: the machine and its bindings as plain data, with descriptors beside.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use offshoot_devices::virtio::net::{Mac, Stream, Tap};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_devices::vmgenid::GenerationId;
use offshoot_storage::{Access, LayerName, StorageBackend, VolumeName};
use serde::{Deserialize, Serialize};

use super::Backends;
use crate::arch::cpuid::CpuProfile;
use crate::boot::{BootSource, Discovery, Image, Protocol};
use crate::error::{Error, ErrorKind, Result};
use crate::{
    Bindings, DeviceConfig, DriveBinding, MachineConfig, ModelConfig, NetHost, NetPeer, RamSize,
    VsockHost,
};

/// A machine that a worker is to boot: as [`MachineConfig`], with files for kernel and initrd.
#[derive(Debug)]
pub struct MachinePlan {
    pub(super) spec: MachineSpec,
    pub(super) kernel: File,
    pub(super) initrd: Option<File>,
}

/// The part of a [`MachinePlan`] that is sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MachineSpec {
    vcpus: u8,
    ram: u64,
    cpu: CpuProfile,
    devices: Vec<(String, ModelConfig)>,
    serial: bool,
    command_line: String,
    protocol: Protocol,
    discovery: Discovery,
    pub(super) initrd: bool,
}

impl MachinePlan {
    /// One vCPU, a serial port and no other device.
    #[must_use]
    pub fn new(ram: RamSize, kernel: File) -> Self {
        Self {
            spec: MachineSpec {
                vcpus: 1,
                ram: ram.bytes(),
                cpu: CpuProfile::default(),
                devices: Vec::new(),
                serial: true,
                command_line: String::new(),
                protocol: Protocol::Auto,
                discovery: Discovery::Acpi,
                initrd: false,
            },
            kernel,
            initrd: None,
        }
    }

    /// With so many vCPUs.
    #[must_use]
    pub fn with_vcpus(mut self, vcpus: u8) -> Self {
        self.spec.vcpus = vcpus;
        self
    }

    /// With another processor than the default baseline's.
    #[must_use]
    pub fn with_cpu(mut self, cpu: CpuProfile) -> Self {
        self.spec.cpu = cpu;
        self
    }

    /// With an initial RAM disk.
    #[must_use]
    pub fn with_initrd(mut self, initrd: File) -> Self {
        self.spec.initrd = true;
        self.initrd = Some(initrd);
        self
    }

    /// With a command line.
    #[must_use]
    pub fn with_command_line(mut self, line: impl Into<String>) -> Self {
        self.spec.command_line = line.into();
        self
    }

    /// With a device more.
    #[must_use]
    pub fn with_device(mut self, id: impl Into<String>, model: ModelConfig) -> Self {
        self.spec.devices.push((id.into(), model));
        self
    }
}

impl MachineSpec {
    pub(super) fn config(self, kernel: OwnedFd, initrd: Option<OwnedFd>) -> Result<MachineConfig> {
        let devices = self.devices.into_iter();
        Ok(MachineConfig {
            vcpus: self.vcpus,
            ram: RamSize::from_bytes(self.ram)?,
            cpu: self.cpu,
            boot: BootSource {
                kernel: Image::File(kernel.into()),
                initrd: initrd.map(|fd| Image::File(fd.into())),
                command_line: self.command_line,
                protocol: self.protocol,
                discovery: self.discovery,
            },
            devices: devices
                .map(|(id, model)| DeviceConfig { id, model })
                .collect(),
            serial: self.serial,
        })
    }
}

/// Where the volume of a drive comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DriveFrom {
    /// A volume that exists.
    Volume(String),
    /// A new volume, of this name and size in bytes.
    New(String, NonZeroU64),
    /// A new volume of this name, made of what the drive held at the fork or in the snapshot.
    Fork(String),
    /// An immutable layer, for a read-only drive.
    Layer(String),
}

/// What a machine in a worker takes from its host. Every copy gets its own.
#[derive(Debug, Default)]
pub struct WorkerBindings {
    pub(super) spec: BindingSpec,
    pub(super) fds: Vec<OwnedFd>,
}

/// The part of [`WorkerBindings`] that is sent. Descriptors follow in the order of `nets`, then the
/// serial port's.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct BindingSpec {
    drives: Vec<DriveSpec>,
    vsocks: Vec<VsockSpec>,
    nets: Vec<NetSpec>,
    serial: bool,
    generation: Option<[u8; 16]>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct DriveSpec {
    id: String,
    backend: String,
    store: PathBuf,
    from: DriveFrom,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct VsockSpec {
    id: String,
    path: PathBuf,
    cid: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct NetSpec {
    id: String,
    peer: PeerSpec,
    mac: Option<Mac>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum PeerSpec {
    /// A descriptor of a tap interface.
    Tap,
    /// A connected stream socket.
    Stream,
    Unplugged,
}

impl PeerSpec {
    fn has_fd(self) -> bool {
        !matches!(self, Self::Unplugged)
    }
}

impl WorkerBindings {
    /// Brings a volume of the store of `backend` in the directory `store` for the drive `id`.
    #[must_use]
    pub fn with_drive(
        mut self,
        id: impl Into<String>,
        backend: impl Into<String>,
        store: impl Into<PathBuf>,
        from: DriveFrom,
    ) -> Self {
        self.spec.drives.push(DriveSpec {
            id: id.into(),
            backend: backend.into(),
            store: store.into(),
            from,
        });
        self
    }

    /// Brings a Unix socket for the vsock `id`, and another CID than the guest had when given.
    #[must_use]
    pub fn with_vsock(
        mut self,
        id: impl Into<String>,
        path: impl Into<PathBuf>,
        cid: Option<GuestCid>,
    ) -> Self {
        self.spec.vsocks.push(VsockSpec {
            id: id.into(),
            path: path.into(),
            cid: cid.map(GuestCid::get),
        });
        self
    }

    /// Connects the network card `id` to a descriptor of a tap interface
    /// ([`Tap::from_fd`] says of what kind), with another MAC when given.
    #[must_use]
    pub fn with_tap(self, id: impl Into<String>, tap: OwnedFd, mac: Option<Mac>) -> Self {
        self.with_net(id, PeerSpec::Tap, Some(tap), mac)
    }

    /// Connects the network card `id` to a stream socket, in the framing of passt and QEMU.
    #[must_use]
    pub fn with_stream(self, id: impl Into<String>, socket: UnixStream, mac: Option<Mac>) -> Self {
        self.with_net(id, PeerSpec::Stream, Some(socket.into()), mac)
    }

    /// Leaves the network card `id` without a peer.
    #[must_use]
    pub fn with_unplugged(self, id: impl Into<String>) -> Self {
        self.with_net(id, PeerSpec::Unplugged, None, None)
    }

    fn with_net(
        mut self,
        id: impl Into<String>,
        peer: PeerSpec,
        fd: Option<OwnedFd>,
        mac: Option<Mac>,
    ) -> Self {
        let id = id.into();
        let nets = self
            .spec
            .nets
            .iter()
            .filter(|net| net.peer.has_fd())
            .count();
        self.spec.nets.push(NetSpec { id, peer, mac });
        // Before the serial port's, which is last.
        if let Some(fd) = fd {
            self.fds.insert(nets, fd);
        }
        self
    }

    /// Sends the serial port's output to `out`.
    #[must_use]
    pub fn with_serial(mut self, out: OwnedFd) -> Self {
        if std::mem::replace(&mut self.spec.serial, true) {
            self.fds.pop();
        }
        self.fds.push(out);
        self
    }

    /// With this generation id instead of a fresh one.
    #[must_use]
    pub fn with_generation(mut self, generation: GenerationId) -> Self {
        self.spec.generation = Some(*generation.as_bytes());
        self
    }

    pub(super) fn borrowed_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd)
    }
}

/// A volume or a layer, by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) backend: String,
    pub(super) store: PathBuf,
    pub(super) name: String,
}

/// The layer that a drive was frozen to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FrozenLayer {
    pub(super) drive: String,
    /// Whether it was made for this; a read-only drive's was there before.
    pub(super) made: bool,
    pub(super) layer: Stored,
}

/// Volumes that were made for a machine; unless they are kept, they are deleted again.
#[derive(Debug, Default)]
pub(super) struct Made {
    volumes: Vec<(Arc<dyn StorageBackend>, VolumeName)>,
    kept: bool,
}

impl Made {
    pub(super) fn keep(mut self) -> Self {
        self.kept = true;
        self
    }

    /// Deletes them; nothing has them open any more.
    pub(super) fn delete(&mut self) {
        for (backend, volume) in self.volumes.drain(..) {
            if let Err(error) = backend.delete(&volume) {
                tracing::error!(
                    %volume,
                    error = &error as &dyn std::error::Error,
                    "a volume that nobody needs stays behind"
                );
            }
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.kept {
            self.delete();
        }
    }
}

impl BindingSpec {
    /// How many descriptors belong to it.
    pub(super) fn fd_count(&self) -> usize {
        let nets = self.nets.iter().filter(|net| net.peer.has_fd()).count();
        nets + usize::from(self.serial)
    }

    /// Where each drive's store is, for a freeze.
    pub(super) fn stores(&self) -> impl Iterator<Item = (&str, &str, &PathBuf)> {
        self.drives
            .iter()
            .map(|d| (d.id.as_str(), d.backend.as_str(), &d.store))
    }

    /// The volumes that opening it makes.
    pub(super) fn makes(&self) -> Vec<Stored> {
        let made = self.drives.iter().filter_map(|drive| match &drive.from {
            DriveFrom::New(name, _) | DriveFrom::Fork(name) => Some(Stored {
                backend: drive.backend.clone(),
                store: drive.store.clone(),
                name: name.clone(),
            }),
            DriveFrom::Volume(_) | DriveFrom::Layer(_) => None,
        });
        made.collect()
    }

    /// The directories that it reaches into: of stores and sockets.
    pub(super) fn directories(&self) -> impl Iterator<Item = &Path> {
        let stores = self.drives.iter().map(|drive| drive.store.as_path());
        let sockets = self.vsocks.iter().filter_map(|vsock| {
            let parent = vsock.path.parent()?;
            // A bare name lies in the working directory.
            Some(if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            })
        });
        stores.chain(sockets)
    }

    /// Opens everything. `layers` are what forks of drives are made of.
    pub(super) fn open(
        self,
        backends: &mut Backends,
        fds: Vec<OwnedFd>,
        layers: &[(String, String)],
    ) -> Result<(Bindings, Made)> {
        let mut fds = fds.into_iter();
        let mut next = || {
            fds.next()
                .ok_or_else(|| bad("a descriptor is missing".to_owned()))
        };
        // First, so that it is dropped last: what it deletes must not be open any more.
        let mut made = Made::default();
        let mut bindings = Bindings::default();
        for net in self.nets {
            let failed =
                |e| Error::because(ErrorKind::Bindings, format!("cannot connect {}", net.id), e);
            let peer = match net.peer {
                PeerSpec::Tap => NetPeer::Open(Box::new(Tap::from_fd(next()?).map_err(failed)?)),
                PeerSpec::Stream => {
                    let socket = UnixStream::from(next()?);
                    NetPeer::Open(Box::new(Stream::new(socket).map_err(failed)?))
                }
                PeerSpec::Unplugged => NetPeer::Unplugged,
            };
            bindings.nets.insert(net.id, NetHost { peer, mac: net.mac });
        }
        if self.serial {
            bindings = bindings.with_serial(File::from(next()?));
        }
        for vsock in self.vsocks {
            let mut host = VsockHost::at(vsock.path);
            host.cid =
                vsock.cid.map(GuestCid::new).transpose().map_err(|e| {
                    Error::because(ErrorKind::Bindings, "the vsock has no such CID", e)
                })?;
            bindings.vsocks.insert(vsock.id, host);
        }
        bindings.generation = self.generation.map(GenerationId::from_bytes);
        for drive in self.drives {
            let backend = backends.open(&drive.backend, &drive.store)?;
            let binding = open_drive(&backend, &drive, layers, &mut made)?;
            bindings.drives.insert(drive.id, binding);
        }
        Ok((bindings, made))
    }
}

fn bad(what: String) -> Error {
    Error::new(ErrorKind::Bindings, what)
}

fn open_drive(
    backend: &Arc<dyn StorageBackend>,
    drive: &DriveSpec,
    layers: &[(String, String)],
    made: &mut Made,
) -> Result<DriveBinding> {
    let id = &drive.id;
    let storage =
        |e: offshoot_storage::Error| crate::snapshot::storage(format!("cannot open drive {id}"), e);
    let name = |name: &str| {
        VolumeName::new(name).map_err(|e| {
            Error::because(
                ErrorKind::Bindings,
                format!("drive {id} has no such volume"),
                e,
            )
        })
    };
    let layer = |name: &str| {
        LayerName::new(name).map_err(|e| {
            Error::because(
                ErrorKind::Bindings,
                format!("drive {id} has no such layer"),
                e,
            )
        })
    };
    let volume = match &drive.from {
        DriveFrom::Volume(volume) => backend.open(&name(volume)?, Access::ReadWrite),
        DriveFrom::New(volume, size) => backend.create(&name(volume)?, size.get()),
        DriveFrom::Fork(volume) => {
            let from = layers.iter().find(|(drive, _)| drive == id);
            let (_, from) = from.ok_or_else(|| {
                bad(format!(
                    "drive {id} cannot be forked: its source has no such drive"
                ))
            })?;
            backend.fork(&layer(from)?, &name(volume)?)
        }
        DriveFrom::Layer(from) => {
            let from = layer(from)?;
            let volume = backend.open_layer(&from).map_err(storage)?;
            return Ok(DriveBinding::layer(Arc::clone(backend), from, volume));
        }
    };
    let volume = volume.map_err(storage)?;
    if matches!(drive.from, DriveFrom::New(..) | DriveFrom::Fork(_)) {
        made.volumes
            .push((Arc::clone(backend), volume.name().clone()));
    }
    Ok(DriveBinding::volume(Arc::clone(backend), volume))
}
