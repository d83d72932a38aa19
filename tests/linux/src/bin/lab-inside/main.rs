//! Runs scenarios in the outer guest, with the `/dev/kvm` there.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "its console is how it is heard"
)]

mod agent;
mod boots;
mod command;
mod console;
mod disks;
mod forks;
mod load;
mod sandbox;
mod snapshots;
mod vsock;

use std::error::Error;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use offshoot_lab::report;
use offshoot_vmm::arch::cpuid::Baseline;
use offshoot_vmm::worker;

/// Whatever goes wrong in a scenario.
type Failure = Box<dyn Error + Send + Sync>;

/// What the outer guest's RAM disk holds for the inner guest.
const BZIMAGE: &str = "/guest/bzImage";
const VMLINUX: &str = "/guest/vmlinux";
const INITRD: &str = "/guest/initrd";
const EXT4: &str = "/guest/ext4";

/// Without XSAVE: QEMU's emulation does not intercept XSETBV, so that KVM in the outer guest never
/// learns of the inner guest's XCR0, and loses its AVX registers on the next exit.
const CPU: Baseline = Baseline::V2;
/// Warnings are printed, so that what the kernel complains of is seen.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 panic=-1";

/// Longer than a scenario takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// Before the name of a scenario that this process is to run by itself.
const ALONE: &str = "--alone";

fn main() -> ExitCode {
    // Workers are this program, too.
    if let Some(status) = worker::run_if_worker(offshoot_storage::open_backend) {
        return status;
    }
    let names: Vec<String> = std::env::args().skip(1).collect();
    if let [option, name] = &names[..]
        && option == ALONE
    {
        return alone(name);
    }
    for name in names {
        // The terminal's state may stand before it on the line.
        println!("\n{}", report::begin(&name));
        let start = Instant::now();
        let result = supervised(&name).map_err(|error| sentence(&*error));
        println!("(took {:.1} s)", start.elapsed().as_secs_f64());
        println!("{}", report::end(&name, &result));
    }
    ExitCode::SUCCESS
}

/// Runs a scenario in a process of its own, so that one that hangs does not stop the others.
fn supervised(name: &str) -> Result<(), Failure> {
    let mut child = Command::new(std::env::current_exe()?)
        .args([ALONE, name])
        .stderr(Stdio::piped())
        .spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Err(format!("it had not ended after {} s", PATIENCE.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().into())
    }
}

fn alone(name: &str) -> ExitCode {
    let result = scenario(name)
        .ok_or_else(|| "there is no such scenario".into())
        .and_then(|scenario| scenario());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", sentence(&*error));
            ExitCode::FAILURE
        }
    }
}

fn scenario(name: &str) -> Option<fn() -> Result<(), Failure>> {
    Some(match name {
        "bzimage_boots" => || boots::boots(BZIMAGE, 1),
        "bzimage_boots_on_four_cpus" => || boots::boots(BZIMAGE, 4),
        "vmlinux_boots" => || boots::boots(VMLINUX, 1),
        "vmlinux_boots_on_four_cpus" => || boots::boots(VMLINUX, 4),
        "ends_are_told_apart" => boots::ends_are_told_apart,
        "a_guest_that_does_not_end_is_ended" => boots::a_guest_that_does_not_end_is_ended,
        "ext4_root_survives_on_copy" => || disks::ext4_root_survives("copy"),
        "ext4_root_survives_on_qcow2" => || disks::ext4_root_survives("qcow2"),
        "snapshot_goes_on" => || snapshots::goes_on(1),
        "snapshot_goes_on_on_four_cpus" => || snapshots::goes_on(4),
        "agent_runs_commands" => agent::runs_commands,
        "live_forks_of_linux" => forks::live,
        "vsock_over_generations" => vsock::over_generations,
        "snapshot_by_fork_under_load" => forks::by_snapshot,
        _ => return None,
    })
}

/// An error and what is behind it.
fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_scenario_is_known() {
        for name in offshoot_lab::SCENARIOS {
            assert!(super::scenario(name).is_some(), "{name}");
        }
    }
}
