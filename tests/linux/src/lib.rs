//! The Linux lab: unmodified distribution kernels as guests, with no virtualisation hardware.
//!
//! ```text
//! test ─→ QEMU, emulating a processor with SVM
//!           └ Debian kernel with its kvm_amd          the outer guest
//!               └ lab-inside, one scenario at a time
//!                   └ offshoot, or a worker
//!                       └ Debian kernel               the inner guest
//!                           └ lab-guest, or the agent
//! ```
//!
//! This library is the test's side: it packs the outer guest's initial RAM disk, runs QEMU, and
//! reads the outcome of each scenario from the console. See docs/linux.md.

mod cpio;
mod debian;
mod libraries;
mod packing;
mod programs;
mod qemu;
pub mod report;
mod vmlinux;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use report::Outcome;

/// The scenarios, in the order in which they run.
pub const SCENARIOS: [&str; 14] = [
    "bzimage_boots",
    "bzimage_boots_on_four_cpus",
    "vmlinux_boots",
    "vmlinux_boots_on_four_cpus",
    "ends_are_told_apart",
    "a_guest_that_does_not_end_is_ended",
    "ext4_root_survives_on_copy",
    "ext4_root_survives_on_qcow2",
    "snapshot_goes_on",
    "snapshot_goes_on_on_four_cpus",
    "agent_runs_commands",
    "live_forks_of_linux",
    "vsock_over_generations",
    "snapshot_by_fork_under_load",
];

/// Longer than all scenarios ever took on a busy machine.
const PATIENCE: Duration = Duration::from_secs(600);

/// Why the lab could not run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Something is not installed here: what, and the Debian package that has it.
    Missing(String),
    /// A file could not be read or written.
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program that prepares the lab failed: its command line and what it said.
    Program(String),
    /// The kernel image is not what is expected.
    Kernel(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(what) => f.write_str(what),
            Self::Io { what, source } => write!(f, "{what}: {source}"),
            Self::Program(what) => f.write_str(what),
            Self::Kernel(what) => write!(f, "the kernel cannot be taken apart: {what}"),
        }
    }
}

impl std::error::Error for Error {}

/// Says what an I/O error was about.
fn io_error(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        what: what.to_string(),
        source,
    }
}

/// Runs scenarios in one boot of the outer guest, and leaves its console in `log`.
///
/// # Errors
/// When the lab cannot run; what a scenario finds is in its outcome.
pub fn run(scenarios: &[&str], log: &Path) -> Result<Vec<Outcome>, Error> {
    let qemu = qemu::find()?;
    let kernel = debian::Kernel::find()?;
    let programs = programs::build()?;
    let dir = tempfile::tempdir().map_err(io_error("cannot make a directory for the lab"))?;
    let initrd = dir.path().join("outer.cpio");
    let outer = packing::outer(&kernel, &programs, dir.path())?;
    std::fs::write(&initrd, outer).map_err(io_error("cannot write the initial RAM disk"))?;
    let mut log =
        File::create(log).map_err(io_error(format_args!("cannot write {}", log.display())))?;
    let console = qemu::run(&qemu, &kernel.image, &initrd, scenarios, PATIENCE, &mut log)?;
    Ok(report::read(&console, scenarios))
}
