//! The pilot under this machine: every device in use, snapshots of it, and copies.

use std::borrow::Cow;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offshoot_devices::virtio::balloon::BalloonConfig;
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::protocol::{BlkOp, Outcome, Request, State};
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{LayerName, StorageBackend, VolumeName, copy};
use offshoot_vmm::boot::{BootSource, Image};
use offshoot_vmm::{
    Bindings, DriveBinding, Host, Machine, MachineConfig, ModelConfig, RamSize, Running,
    SaveOptions, Template, VsockHost,
};
use std::os::unix::net::UnixStream;

const DISK: u64 = 4 << 20;

#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn host() -> Option<Arc<Host>> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Keeps what the guest says on its serial line.
#[derive(Debug, Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

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
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

struct Place {
    dir: tempfile::TempDir,
    backend: Arc<dyn StorageBackend>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backend = copy::open(&dir.path().join("disks")).unwrap();
        Self { dir, backend }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn drive(&self, name: &str, layer: Option<&str>) -> DriveBinding {
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

fn config(mib: u64, vcpus: u8) -> MachineConfig {
    let kernel = Image::Bytes(Cow::Borrowed(PILOT_ELF));
    let mut config = MachineConfig::new(RamSize::from_mib(mib).unwrap(), BootSource::new(kernel))
        .with_device("disk", ModelConfig::Drive(Default::default()))
        .with_device("vsock", ModelConfig::Vsock(GuestCid::new(3).unwrap()))
        .with_device("entropy", ModelConfig::ENTROPY)
        .with_device("balloon", ModelConfig::Balloon(BalloonConfig::default()));
    config.vcpus = vcpus;
    config
}

fn client(running: &Running, socket: &Path, console: &Console) -> PilotClient<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    PilotClient::connect(socket, deadline).unwrap_or_else(|error| {
        panic!(
            "{error:?}; the guest {:?} and said {:?}",
            running.wait(Duration::ZERO),
            console.text()
        )
    })
}

fn blk(op: BlkOp, seed: u64) -> Request {
    Request::Blk {
        device: 0,
        op,
        offset: 0,
        len: 1 << 20,
        seed,
        chunk: 65536,
        depth: 8,
    }
}

fn fill(seed: u64) -> Request {
    Request::Fill {
        offset: 0,
        len: 4 << 20,
        seed,
    }
}

fn verify(seed: u64) -> Request {
    Request::Verify {
        offset: 0,
        len: 4 << 20,
        seed,
    }
}

fn good(client: &mut PilotClient<UnixStream>, request: &Request) -> Outcome {
    let outcome = client.work(request).unwrap();
    assert_eq!(outcome.bad, 0, "{request:?}: {outcome:?}");
    outcome
}

fn story(vcpus: u8) {
    let Some(host) = host() else { return };
    let place = Place::new();
    let console = Console::default();
    let socket = place.socket("source");
    let bindings = Bindings::default()
        .with_drive("disk", place.drive("disk", None))
        .with_vsock("vsock", VsockHost::at(&socket))
        .with_serial(console.clone());
    let config = config(64, vcpus);
    let mut running = Machine::boot(&host, &config, bindings)
        .unwrap()
        .start()
        .unwrap();
    let mut pilot = client(&running, &socket, &console);
    good(&mut pilot, &blk(BlkOp::Write, 1));
    good(&mut pilot, &fill(1));
    let before: State = pilot.state().unwrap();
    assert_eq!(before.devices.as_slice().len(), 4);

    let snapshots = place.dir.path().join("snapshots");
    std::fs::create_dir(&snapshots).unwrap();
    let paused = running.pause().unwrap();
    let saved = paused
        .save(&snapshots, SaveOptions::new().unwrap())
        .unwrap();
    paused.resume().unwrap();
    // The source goes on over the same connection.
    good(&mut pilot, &fill(2));
    good(&mut pilot, &blk(BlkOp::Write, 2));
    let after = pilot.state().unwrap();
    assert_eq!(after.boot_id, before.boot_id);
    assert_eq!(after.generation, before.generation);

    let raw = RawSnapshot::open(&saved.path).unwrap();
    let template = Template::load(&host, &raw, Verify::Eager).unwrap();
    let layer = template.origin().unwrap().disks[0].layer.clone();
    let mut copies = Vec::new();
    for number in 0..3_u64 {
        let socket = place.socket(&format!("copy{number}"));
        let bindings = Bindings::default()
            .with_drive("disk", place.drive(&format!("copy{number}"), Some(&layer)))
            .with_vsock("vsock", VsockHost::at(&socket))
            .with_serial(console.clone());
        let running = template.fork(bindings).unwrap().start().unwrap();
        let mut pilot = client(&running, &socket, &console);
        let state = pilot.state().unwrap();
        assert_eq!(state.boot_id, before.boot_id, "the same past");
        assert!(state.counter >= before.counter);
        assert_ne!(
            state.generation, before.generation,
            "a copy knows that it is one"
        );
        good(&mut pilot, &verify(1));
        good(&mut pilot, &blk(BlkOp::Verify, 1));
        good(&mut pilot, &fill(10 + number));
        good(&mut pilot, &blk(BlkOp::Write, 10 + number));
        copies.push((number, running, pilot));
    }
    for (number, _, pilot) in &mut copies {
        good(pilot, &verify(10 + *number));
        good(pilot, &blk(BlkOp::Verify, 10 + *number));
    }
    good(&mut pilot, &verify(2));
    good(&mut pilot, &blk(BlkOp::Verify, 2));
    drop(copies);
    running.stop().wait();
}

#[test]
fn copies_of_a_pilot_continue_and_are_apart() {
    story(1);
}

#[test]
fn copies_of_a_pilot_with_two_processors() {
    story(2);
}
