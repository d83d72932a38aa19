//! `offshoot run`: boot a kernel and show its serial console until the guest ends.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_storage::{Access, InvalidName, StorageBackend, VolumeName, open_backend};
use offshoot_vmm::arch::cpuid::Baseline;
use offshoot_vmm::boot::{BootSource, Image};
use offshoot_vmm::{
    Bindings, DriveBinding, DriveConfig, ExitReason, Host, Machine, MachineConfig, ModelConfig,
    RamSize, VsockHost,
};

use crate::failure::{Context, Failure};

/// Boot a kernel and show its serial console until the guest ends.
///
/// The guest has a serial port, an entropy device, and the drives and vsock that are asked for.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
    0  the guest switched itself off
    1  the machine could not be made or failed
    2  the command line is wrong
   10  the guest asked for a reset (this command does not boot it again)
   11  the guest's kernel panicked
   12  the guest ended in a triple fault
   13  KVM could not go on with the guest
  124  the time given by --timeout was over")]
pub(crate) struct Run {
    /// The kernel: a bzImage as distributions ship it, or an ELF vmlinux.
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    /// The initial RAM disk.
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1")]
    cmdline: String,
    /// How many virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// What the guest's programs may use of the processor: x86-64-v1 to x86-64-v4, or host.
    #[arg(long, value_name = "BASELINE", default_value_t)]
    cpu: Baseline,
    /// How much memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u64,
    /// The directory that holds the volumes of the drives.
    #[arg(long, value_name = "DIR", requires = "backend")]
    store: Option<PathBuf>,
    /// The storage backend that keeps it: copy, reflink or qcow2.
    #[arg(long, value_name = "NAME", requires = "store")]
    backend: Option<String>,
    /// A drive: a volume of the store, read-only when `:ro` follows its name. The guest finds
    /// drives in the order given, and the name as a drive's serial number. May be repeated.
    #[arg(long, value_name = "VOLUME[:ro]", requires = "store")]
    drive: Vec<DriveArg>,
    /// Give the guest a vsock, and reach it through the Unix socket that is made at this path.
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// The guest's vsock address: 3 or more.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "vsock")]
    cid: u64,
    /// End the guest when it has run for so long.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// One `--drive`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DriveArg {
    volume: VolumeName,
    read_only: bool,
}

impl FromStr for DriveArg {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let (name, read_only) = match text.strip_suffix(":ro") {
            Some(name) => (name, true),
            None => (text, false),
        };
        Ok(Self {
            volume: VolumeName::new(name)?,
            read_only,
        })
    }
}

impl Run {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let host = Host::open()?;
        let config = self.machine()?;
        let bindings = self.bindings()?;
        let running = Machine::boot(&host, &config, bindings)
            .and_then(Machine::start)
            .context(|| format!("cannot run {}", self.kernel.display()))?;
        let end = running.wait(self.timeout.map_or(Duration::MAX, Duration::from_secs));
        // The last of the console is written when the machine is gone.
        running.stop().wait();
        match end {
            Some(ExitReason::PowerOff) => Ok(()),
            Some(reason) => Err(Failure::new(reason.to_string()).with_status(status(&reason))),
            None => {
                let seconds = self.timeout.unwrap_or_default();
                let what = format!("the guest had not ended after {seconds} seconds");
                Err(Failure::new(what).with_status(TIMED_OUT))
            }
        }
    }

    fn machine(&self) -> Result<MachineConfig, Failure> {
        let mut boot = BootSource::new(open(&self.kernel)?);
        boot.initrd = self.initrd.as_deref().map(open).transpose()?;
        boot.command_line.clone_from(&self.cmdline);
        let mut config = MachineConfig::new(RamSize::from_mib(self.memory)?, boot);
        config.vcpus = self.cpus;
        config.cpu.baseline = self.cpu;
        for drive in &self.drive {
            let model = ModelConfig::Drive(DriveConfig {
                read_only: drive.read_only,
                ..DriveConfig::default()
            });
            config = config.with_device(drive.volume.as_str(), model);
        }
        if self.vsock.is_some() {
            let cid = GuestCid::new(self.cid)?;
            config = config.with_device(VSOCK, ModelConfig::Vsock(cid));
        }
        Ok(config.with_device(ENTROPY, ModelConfig::ENTROPY))
    }

    fn bindings(&self) -> Result<Bindings, Failure> {
        // A descriptor of its own: the guest's output is not to wait in a buffer for a line's end.
        let console = io::stdout().as_fd().try_clone_to_owned();
        let console = console.map(File::from).map_err(Failure::output)?;
        let mut bindings = Bindings::default().with_serial(console);
        if let (Some(dir), Some(kind)) = (&self.store, &self.backend) {
            let backend = open_backend(kind, dir)?;
            for drive in &self.drive {
                let binding = open_drive(&backend, drive)?;
                bindings = bindings.with_drive(drive.volume.as_str(), binding);
            }
        }
        if let Some(path) = &self.vsock {
            bindings = bindings.with_vsock(VSOCK, VsockHost::at(path));
        }
        Ok(bindings)
    }
}

/// The ids of the devices that have no name of the user's.
const VSOCK: &str = "vsock";
const ENTROPY: &str = "entropy";

/// As `timeout` of GNU coreutils.
const TIMED_OUT: u8 = 124;

/// The exit status for a guest that did not switch itself off.
fn status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::Reset => 10,
        ExitReason::Panicked => 11,
        ExitReason::TripleFault => 12,
        ExitReason::KvmError(_) => 13,
        _ => 1,
    }
}

fn open(path: &Path) -> Result<Image, Failure> {
    File::open(path)
        .map(Image::File)
        .context(|| format!("cannot open {}", path.display()))
}

fn open_drive(
    backend: &Arc<dyn StorageBackend>,
    drive: &DriveArg,
) -> Result<DriveBinding, Failure> {
    let access = if drive.read_only {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let volume = backend.open(&drive.volume, access)?;
    Ok(DriveBinding::volume(Arc::clone(backend), volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_is_a_volume_and_may_be_read_only() {
        let drive = |text: &str| text.parse::<DriveArg>().ok();
        let root = VolumeName::new("root").unwrap();
        for (text, read_only) in [("root", false), ("root:ro", true)] {
            let volume = root.clone();
            assert_eq!(drive(text), Some(DriveArg { volume, read_only }));
        }
        for wrong in ["", ":ro", "root:rw", "a/b", "root:ro:ro"] {
            assert_eq!(drive(wrong), None, "{wrong}");
        }
    }
}
