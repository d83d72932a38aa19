//! The agent as process 1: mounts, and an orderly end.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::{ErrorCode, PowerAction, Refusal};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::failure::{Doing, log, refusal};
use crate::{Agent, net, sys};

/// How long processes have to end after SIGTERM.
const TERM_TIME: Duration = Duration::from_secs(5);
/// … and after SIGKILL.
const KILL_TIME: Duration = Duration::from_secs(2);

/// What is mounted: where, type, flags, options, permissions of the directory.
const MOUNTS: [(&str, &str, MountFlags, &str); 8] = {
    let quiet = MountFlags::NOSUID.union(MountFlags::NODEV);
    let data = quiet.union(MountFlags::NOEXEC);
    [
        ("/proc", "proc", data, ""),
        ("/sys", "sysfs", data, ""),
        ("/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755"),
        (
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID.union(MountFlags::NOEXEC),
            "gid=5,mode=0620,ptmxmode=0666",
        ),
        ("/dev/shm", "tmpfs", quiet, "mode=1777"),
        ("/run", "tmpfs", quiet, "mode=0755"),
        ("/tmp", "tmpfs", quiet, "mode=1777"),
        ("/sys/fs/cgroup", "cgroup2", data, ""),
    ]
};

/// Whether this process is the guest's, or the namespace's, first.
pub(crate) fn is_init() -> bool {
    rustix::process::getpid().is_init()
}

/// Mounts what every Linux program expects and nobody else would mount. (In a namespace it has to
/// be a namespace of mounts too.) What is mounted already
/// stays; what can't be mounted is missing, and the console says so.
pub(crate) fn set_up() {
    for (target, kind, flags, options) in MOUNTS {
        if is_mounted(Path::new(target)) {
            continue;
        }
        // The directory may be there, on a file system that can't be written to.
        let _ = fs::create_dir_all(target);
        let options = std::ffi::CString::new(options).unwrap_or_default();
        if let Err(error) = mount(kind, target, kind, flags, Some(options.as_c_str())) {
            log(format_args!("mounting {target}: {error}"));
        }
    }
    for (link, to) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if fs::symlink_metadata(link).is_err() {
            let _ = std::os::unix::fs::symlink(to, link);
        }
    }
    // Control-Alt-Delete is a signal to us, not a reset. A namespace has no such keys.
    let _ = reboot(RebootCommand::CadOff);
    if let Err(error) = net::loopback_up() {
        log(format_args!("bringing the loopback interface up: {error}"));
    }
}

/// A directory on another file system than the one above it.
fn is_mounted(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    // Not by its device: a directory bound over itself is a mount on the same one.
    statx(CWD, path, AtFlags::empty(), StatxFlags::empty())
        .is_ok_and(|about| about.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// A way to stop that is there.
#[derive(Debug)]
pub(crate) enum Stopper {
    /// This process is init.
    Own(PowerAction),
    /// Another one is, and has a command for it.
    Command(&'static str),
}

/// How this guest can be stopped.
pub(crate) fn stopper(agent: &Agent, action: PowerAction) -> Result<Stopper, Refusal> {
    if is_init() {
        return Ok(Stopper::Own(action));
    }
    // An agent that listens on a Unix socket may run on somebody's machine.
    if !agent.server.is_in_guest() {
        return Err(refusal(ErrorCode::WrongState, "the agent is not init here"));
    }
    Ok(Stopper::Command(match action {
        PowerAction::Reboot => "reboot",
        _ => "poweroff",
    }))
}

impl Stopper {
    /// Stops the guest; returns when that failed, or when another init will do it.
    pub(crate) fn run(self, agent: &Arc<Agent>) -> Result<(), Refusal> {
        match self {
            Self::Own(action) => stop(agent, action),
            Self::Command(name) => {
                let mut command = Command::new(name);
                command.envs(agent.environment.all()).stdin(Stdio::null());
                let (_, child) = agent
                    .children
                    .spawn(&mut command)
                    .doing("stopping the guest")?;
                child.wait(Some(Instant::now() + TERM_TIME));
                Ok(())
            }
        }
    }
}

/// Ends every process, unmounts and stops.
pub(crate) fn stop(agent: &Agent, action: PowerAction) -> Result<(), Refusal> {
    log(format_args!("stopping: {action}"));
    for (signal, time) in [(libc::SIGTERM, TERM_TIME), (libc::SIGKILL, KILL_TIME)] {
        sys::kill_all(signal);
        // What was stopped by a debugger or job control can only end when it runs.
        sys::kill_all(libc::SIGCONT);
        let deadline = Instant::now() + time;
        while agent.children.any() && Instant::now() < deadline {
            // The thread that reaps may be the one that is here.
            agent.children.reap();
            thread::sleep(Duration::from_millis(5));
        }
    }
    rustix::fs::sync();
    if owns_machine() {
        unmount_all();
    }
    let command = match action {
        PowerAction::Reboot => RebootCommand::Restart,
        _ => RebootCommand::PowerOff,
    };
    reboot(command).doing("stopping")
}

/// Whether the file systems are this guest's to unmount. The first process of a mere namespace
/// would take them from everybody else: a remount is of the file system, not of the mount.
fn owns_machine() -> bool {
    // PROC_PID_INIT_INO of the kernel: the first namespace.
    fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link == Path::new("pid:[4026531836]"))
}

/// Unmounts what can be, the last mounted first; the root file system becomes read-only.
fn unmount_all() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let targets: Vec<_> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|target| !["/", "/proc", "/sys", "/dev"].contains(target))
        .collect();
    for target in targets.iter().rev() {
        // A name with a space in it is escaped here, and detached with what it lies on.
        let _ = unmount(*target, UnmountFlags::NOFOLLOW);
    }
    let _ = mount_remount("/", MountFlags::RDONLY, c"");
    rustix::fs::sync();
}
