//! Pilots in processes of their own, for the benches of forks.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use offshoot_devices::virtio::net::{Mac, NetConfig};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_vmm::worker::{self, DriveFrom, MachinePlan, Program, Worker, WorkerBindings};
use offshoot_vmm::{DriveConfig, ModelConfig};

use super::{Bed, DISK_BYTES};
use crate::failure::{Context, Failure};
use crate::guest::{DISK, PATIENCE};

/// A pilot in a worker, and the host's end of its network cable.
pub(super) struct Subject {
    pub(super) worker: Worker,
    pub(super) name: String,
    pub(super) cable: UnixStream,
}

/// Bindings of all of a pilot's devices, and the host's end of its network cable.
pub(super) fn bindings(
    bed: &Bed<'_>,
    name: &str,
    disk: DriveFrom,
) -> Result<(WorkerBindings, UnixStream), Failure> {
    let (ours, theirs) = UnixStream::pair().context(|| "cannot make a network cable".into())?;
    let bindings = WorkerBindings::default()
        .with_drive(DISK, bed.name, bed.place.store_dir(bed.name), disk)
        .with_vsock("vsock", bed.socket(name), None)
        .with_stream("net", theirs, None);
    Ok((bindings, ours))
}

/// Boots a pilot in a worker.
pub(super) fn boot(bed: &Bed<'_>, name: &str) -> Result<Subject, Failure> {
    let net = NetConfig {
        mac: Mac::new([0x52, 0x54, 0, 0, 0, 1])?,
        mtu: None,
    };
    let mut kernel: File = tempfile::tempfile().context(|| "cannot write a kernel".into())?;
    kernel.write_all(PILOT_ELF)?;
    let plan = bed.args.plan()?;
    let machine = MachinePlan::new(plan.ram, kernel)
        .with_vcpus(plan.vcpus)
        .with_device(DISK, ModelConfig::Drive(DriveConfig::default()))
        .with_device("net", ModelConfig::Net(net))
        .with_device("vsock", ModelConfig::Vsock(GuestCid::new(3)?))
        .with_device("entropy", ModelConfig::ENTROPY);
    let size = NonZeroU64::new(DISK_BYTES).ok_or_else(|| Failure::new("a disk has a size"))?;
    let (bindings, cable) = bindings(bed, name, DriveFrom::New(name.to_owned(), size))?;
    Ok(Subject {
        worker: Worker::boot(&Program::this(), &machine, bindings, PATIENCE)?,
        name: name.to_owned(),
        cable,
    })
}

/// Forks one child of `source`.
pub(super) fn fork(
    bed: &Bed<'_>,
    source: &Worker,
    name: &str,
) -> Result<(Subject, Duration), Failure> {
    let (bindings, cable) = bindings(bed, name, DriveFrom::Fork(name.to_owned()))?;
    let children = source.fork(vec![bindings], PATIENCE)?;
    let worker = children.workers.into_iter().next();
    let subject = Subject {
        worker: worker.ok_or_else(|| Failure::new("a fork has no child"))?,
        name: name.to_owned(),
        cable,
    };
    Ok((subject, children.source_pause))
}

impl Subject {
    /// Connects to the guest's command port.
    pub(super) fn client(&self, bed: &Bed<'_>) -> Result<PilotClient<UnixStream>, Failure> {
        let socket = bed.socket(&self.name);
        let deadline = Instant::now() + PATIENCE;
        PilotClient::connect(&socket, deadline).context(|| format!("{} does not answer", self.name))
    }

    /// When an instruction of the guest first caused an exit, after `called`.
    pub(super) fn first_exit(&self, called: Duration) -> Result<Duration, Failure> {
        let deadline = worker::monotonic() + PATIENCE;
        loop {
            if let Some(at) = self.worker.first_exit(PATIENCE)? {
                return Ok(at.saturating_sub(called));
            }
            if worker::monotonic() > deadline {
                return Err(Failure::new(
                    "the guest has not run an instruction that the host sees",
                ));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Ends it and removes its disk.
    pub(super) fn discard(self) -> Result<(), Failure> {
        drop(self.cable);
        Ok(self.worker.discard(PATIENCE)?)
    }
}
