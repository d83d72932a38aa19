//! A guest in a process of its own, forked live and from a snapshot:
//! `cargo run -p offshoot-vmm --example worker -- qcow2`
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_snapshot_format::Verify;
use offshoot_vmm::worker::{
    DriveFrom, MachinePlan, Program, Worker, WorkerBindings, run_if_worker,
};
use offshoot_vmm::{ModelConfig, RamSize, SaveOptions};

const TIMEOUT: Duration = Duration::from_secs(20);

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // First thing: this program serves as the worker, too.
    if let Some(status) = run_if_worker(offshoot_storage::open_backend) {
        return Ok(status);
    }
    let backend = std::env::args().nth(1).unwrap_or("copy".into());
    let dir = tempfile::tempdir()?;
    let bindings = |name: &str, disk| {
        WorkerBindings::default()
            .with_drive("disk", &*backend, dir.path().join("disks"), disk)
            .with_vsock("vsock", dir.path().join(name), None)
    };

    let mut kernel: File = tempfile::tempfile()?;
    kernel.write_all(PILOT_ELF)?;
    let machine = MachinePlan::new(RamSize::from_mib(128)?, kernel)
        .with_device("disk", ModelConfig::Drive(Default::default()))
        .with_device("vsock", ModelConfig::Vsock(GuestCid::new(3)?));
    // What the worker may reach of the file system; its own disk and socket it may in any case.
    let program = Program::this().allowing(dir.path());
    let size = NonZeroU64::new(1 << 30).ok_or("a disk has a size")?;
    let disk = DriveFrom::New("source".into(), size);
    let source = Worker::boot(&program, &machine, bindings("source", disk), TIMEOUT)?;
    println!("the source counts: {}", count(&dir.path().join("source"))?);

    let fork = |name: &str| bindings(name, DriveFrom::Fork(name.into()));
    let children = source.fork(vec![fork("a"), fork("b")], TIMEOUT)?;
    println!("the source was stopped for {:?}", children.source_pause);
    println!("a goes on from there: {}", count(&dir.path().join("a"))?);

    let saved = source.snapshot(dir.path(), SaveOptions::new()?, TIMEOUT)?;
    let saved = saved.wait(|_done, _total| (), TIMEOUT)?;
    let (template, _) = Worker::template(&program, &saved.path, Verify::Eager, TIMEOUT)?;
    let sandbox = template.fork(vec![fork("c")], TIMEOUT)?;
    println!(
        "c goes on from the snapshot: {}",
        count(&dir.path().join("c"))?
    );
    for worker in sandbox
        .workers
        .into_iter()
        .chain(children.workers)
        .chain([source])
    {
        worker.stop(TIMEOUT)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn count(socket: &Path) -> Result<u64, Box<dyn Error>> {
    Ok(PilotClient::connect(socket, Instant::now() + TIMEOUT)?
        .state()?
        .counter)
}
