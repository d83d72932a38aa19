//! A frozen machine: what a build writes into a snapshot's sections, later builds read.
//!
//! `tests/golden/machine-1` is the manifest of a pilot with two vCPUs and a device of every model.
//! It never changes: one that is no longer read is a user's snapshot that is no longer read. After a
//! section's version is raised, add another one beside it:
//! `OFFSHOOT_MAKE_GOLDEN=1 cargo test -p offshoot-vmm golden` writes those that are not there yet.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use offshoot_devices::virtio::balloon::BalloonConfig;
use offshoot_devices::virtio::net::{Mac, NetConfig};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_snapshot_format::{Manifest, RawSnapshot};
use offshoot_storage::{VolumeName, copy};

use super::guest::host;
use crate::boot::{BootSource, Image};
use crate::snapshot::sections;
use crate::template::decode;
use crate::{
    Bindings, DriveBinding, Machine, MachineConfig, ModelConfig, ModelState, NetHost, NetPeer,
    RamSize, SaveOptions, VsockHost,
};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/machine-1")
}

#[test]
fn a_frozen_machine_is_read_and_written_as_it_was() {
    let golden = std::fs::read(path()).unwrap();
    let manifest = Manifest::parse(&golden).unwrap();
    let state = decode(manifest.sections()).unwrap();

    assert_eq!((state.platform.vcpus, state.vcpus.len()), (2, 2));
    assert_eq!(state.platform.ram, 64 << 20);
    assert_eq!(
        state.platform.devices,
        ["disk", "vsock", "net", "entropy", "balloon"]
    );
    assert!(state.legacy.serial.is_some());
    assert_eq!(state.devices.len(), 5);
    let ModelState::Drive(disk) = &state.devices[0].model else {
        panic!("{:?}", state.devices[0])
    };
    assert_eq!(disk.capacity_sectors, 2048);
    let ModelState::Vsock(vsock) = &state.devices[1].model else {
        panic!("{:?}", state.devices[1])
    };
    assert_eq!(vsock.cid, 33);
    let ModelState::Net(net) = &state.devices[2].model else {
        panic!("{:?}", state.devices[2])
    };
    assert_eq!(net.mac.bytes(), [0x52, 0x54, 0, 0, 0, 9]);
    assert_eq!(net.mtu, Some(1400));
    assert!(matches!(state.devices[3].model, ModelState::Entropy(_)));
    assert!(matches!(state.devices[4].model, ModelState::Balloon(_)));
    // The pilot had set them up.
    assert!(
        state
            .devices
            .iter()
            .all(|device| device.transport.status != 0)
    );

    // A change of what is written shows here: raise the section's version and add a golden.
    let frozen = manifest.clone().into_parts().sections;
    let written = sections(&state).unwrap();
    assert_eq!(written.len(), frozen.len());
    for section in &written {
        let place = section.place();
        let same = frozen.iter().find(|frozen| frozen.place() == place);
        assert_eq!(Some(section), same, "{place:?} is written differently");
    }
}

#[test]
fn goldens_that_are_missing_are_made_when_asked_for() {
    if std::env::var_os("OFFSHOOT_MAKE_GOLDEN").is_none() || path().exists() {
        return;
    }
    let host = host().expect("a golden is made on a host with KVM");
    let dir = tempfile::tempdir().unwrap();
    let disks = copy::open(&dir.path().join("disks")).unwrap();
    let volume = disks
        .create(&VolumeName::new("disk").unwrap(), 1 << 20)
        .unwrap();
    let kernel = BootSource::new(Image::Bytes(PILOT_ELF.into()));
    let net = NetConfig {
        mac: Mac::new([0x52, 0x54, 0, 0, 0, 9]).unwrap(),
        mtu: Some(1400),
    };
    let mut config = MachineConfig::new(RamSize::from_mib(64).unwrap(), kernel)
        .with_device("disk", ModelConfig::Drive(Default::default()))
        .with_device("vsock", ModelConfig::Vsock(GuestCid::new(33).unwrap()))
        .with_device("net", ModelConfig::Net(net))
        .with_device("entropy", ModelConfig::ENTROPY)
        .with_device("balloon", ModelConfig::Balloon(BalloonConfig::default()));
    config.vcpus = 2;
    let socket = dir.path().join("vsock");
    let bindings = Bindings::default()
        .with_drive("disk", DriveBinding::volume(disks, volume))
        .with_vsock("vsock", VsockHost::at(&socket))
        .with_net("net", NetHost::to(NetPeer::Unplugged));
    let mut running = Machine::boot(&host, &config, bindings)
        .unwrap()
        .start()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    PilotClient::connect(&socket, deadline)
        .unwrap()
        .state()
        .unwrap();
    let paused = running.pause().unwrap();
    let saved = paused
        .save(dir.path(), SaveOptions::new().unwrap())
        .unwrap();
    let whole = RawSnapshot::open(&saved.path).unwrap();
    decode(whole.manifest().sections()).unwrap();
    std::fs::create_dir_all(path().parent().unwrap()).unwrap();
    std::fs::copy(saved.path.join("manifest"), path()).unwrap();
}
