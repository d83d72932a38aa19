//! Boots a guest with a disk and a vsock, snapshots it while it runs, and forks the snapshot:
//! `cargo run -p offshoot-vmm --example snapshot_and_fork -- qcow2`
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{StorageBackend, Volume, VolumeName, open_backend};
use offshoot_vmm::boot::{BootSource, Image};
use offshoot_vmm::{
    Bindings, DriveBinding, Host, Machine, MachineConfig, ModelConfig, RamSize, SaveOptions,
    Template, VsockHost,
};

fn main() -> Result<(), Box<dyn Error>> {
    let kind = std::env::args().nth(1).unwrap_or("copy".into());
    let dir = tempfile::tempdir()?;
    let disks = open_backend(&kind, &dir.path().join("disks"))?;
    let host = Host::open()?;

    let kernel = Image::Bytes(PILOT_ELF.into());
    let config = MachineConfig::new(RamSize::from_mib(128)?, BootSource::new(kernel))
        .with_device("disk", ModelConfig::Drive(Default::default()))
        .with_device("vsock", ModelConfig::Vsock(GuestCid::new(3)?));
    let disk = disks.create(&VolumeName::new("source")?, 1 << 30)?;
    let socket = dir.path().join("source.sock");
    let mut source = Machine::boot(&host, &config, bind(&disks, disk, &socket))?.start()?;
    println!("the source counts: {}", count(&socket)?);

    let paused = source.pause()?;
    let saved = paused.save(dir.path(), SaveOptions::new()?)?;
    paused.resume()?;
    let snapshot = RawSnapshot::open(&saved.path)?;
    let template = Template::load(&host, &snapshot, Verify::Eager)?;
    for name in ["fork-1", "fork-2", "fork-3"] {
        let socket = dir.path().join(name);
        let disk = disks.fork(&saved.layers[0].1, &VolumeName::new(name)?)?;
        let fork = template.fork(bind(&disks, disk, &socket))?.start()?;
        println!("{name} goes on from there: {}", count(&socket)?);
        fork.stop().wait();
    }
    Ok(())
}

fn bind(disks: &Arc<dyn StorageBackend>, disk: Arc<dyn Volume>, socket: &Path) -> Bindings {
    Bindings::default()
        .with_drive("disk", DriveBinding::volume(Arc::clone(disks), disk))
        .with_vsock("vsock", VsockHost::at(socket))
}

fn count(socket: &Path) -> Result<u64, Box<dyn Error>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    Ok(PilotClient::connect(socket, deadline)?.state()?.counter)
}
