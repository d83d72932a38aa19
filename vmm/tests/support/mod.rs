//! Pilots on machines, for the tests that drive them.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::borrow::Cow;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offshoot_devices::virtio::balloon::BalloonConfig;
use offshoot_devices::virtio::net::{Mac, NetConfig};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_storage::{LayerName, StorageBackend, VolumeName, copy};
use offshoot_vmm::boot::{BootSource, Image};
use offshoot_vmm::{
    Bindings, DriveBinding, Host, MachineConfig, ModelConfig, NetHost, NetPeer, RamSize, Running,
    VsockHost,
};

pub(crate) const DISK: u64 = 4 << 20;

/// Says that a test, or a part of it, was not done.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn skipped(why: impl std::fmt::Display) {
    eprintln!("skipped: {why}");
}

/// This host's KVM, or a line that says why the test is skipped.
pub(crate) fn host() -> Option<Arc<Host>> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            skipped(error);
            None
        }
    }
}

/// Keeps what the guest says on its serial line.
#[derive(Debug, Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) backend: Arc<dyn StorageBackend>,
}

impl Place {
    /// Bindings for every device of [`config`], by a name that nobody else has.
    pub(crate) fn bindings(&self, name: &str, drive: DriveBinding) -> Bindings {
        Bindings::default()
            .with_drive("disk", drive)
            .with_vsock("vsock", VsockHost::at(self.socket(name)))
            .with_net("net", NetHost::to(NetPeer::Unplugged))
    }

    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backend = copy::open(&dir.path().join("disks")).unwrap();
        Self { dir, backend }
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn drive(&self, name: &str, layer: Option<&str>) -> DriveBinding {
        let name = VolumeName::new(name).unwrap();
        let volume = match layer {
            Some(layer) => {
                let layer = LayerName::new(layer).unwrap();
                self.backend.fork(&layer, &name).unwrap()
            }
            None => self.backend.create(&name, DISK).unwrap(),
        };
        DriveBinding::volume(self.backend.clone(), volume)
    }
}

pub(crate) fn config(mib: u64, vcpus: u8) -> MachineConfig {
    let kernel = Image::Bytes(Cow::Borrowed(PILOT_ELF));
    let net = NetConfig {
        mac: Mac::new([0x52, 0x54, 0, 0, 0, 1]).unwrap(),
        mtu: None,
    };
    let mut config = MachineConfig::new(RamSize::from_mib(mib).unwrap(), BootSource::new(kernel))
        .with_device("disk", ModelConfig::Drive(Default::default()))
        .with_device("vsock", ModelConfig::Vsock(GuestCid::new(3).unwrap()))
        .with_device("net", ModelConfig::Net(net))
        .with_device("entropy", ModelConfig::ENTROPY)
        .with_device("balloon", ModelConfig::Balloon(BalloonConfig::default()));
    config.vcpus = vcpus;
    config
}

pub(crate) fn client(
    running: &Running,
    socket: &Path,
    console: &Console,
) -> PilotClient<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    PilotClient::connect(socket, deadline).unwrap_or_else(|error| {
        panic!(
            "{error:?}; the guest {:?} and said {:?}",
            running.wait(Duration::ZERO),
            console.text()
        )
    })
}
