//! An agent to talk to.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use offshoot::agent::Agent;
use offshoot_agent_image::AGENT_ELF;
use tempfile::TempDir;

/// Where the program lies; written once, before anything is started from it.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = dir.join("offshoot-agent");
        // Renamed, so that nobody runs a file that is being written.
        let new = dir.join(format!("offshoot-agent.{}", std::process::id()));
        fs::write(&new, AGENT_ELF).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    })
}

/// A deadline that nothing here should come near.
pub(crate) fn soon() -> Instant {
    within(30_000)
}

pub(crate) fn within(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Says on the output of the tests that one was skipped.
pub(crate) fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// An agent process with a directory of its own.
pub(crate) struct Rig {
    pub(crate) agent: Agent,
    pub(crate) dir: TempDir,
    pub(crate) process: Child,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::start(|listen| {
            let mut command = Command::new(program());
            command.args(["--listen", listen]);
            command
        })
    }

    /// An agent below the command that is made from its address.
    pub(crate) fn start(make: impl FnOnce(&str) -> Command) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let socket = dir.path().join("s");
        let mut command = make(&format!("unix:{}", socket.display()));
        // Not the test's own: whoever reads that would wait for a process that is left over.
        let log = fs::File::create(dir.path().join("log")).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap());
        let process = command.stderr(log).spawn().unwrap();
        let agent = Agent::at_socket(&socket);
        agent.ping(soon()).unwrap();
        Self {
            agent,
            dir,
            process,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A line of the agent process' /proc status, in KiB.
    pub(crate) fn kib(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let status = fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let number = line.unwrap().split_ascii_whitespace().next();
        number.unwrap().parse().unwrap()
    }

    pub(crate) fn threads(&self) -> u64 {
        let path = format!("/proc/{}/task", self.process.id());
        fs::read_dir(path).unwrap().count() as u64
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until something holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process exists and is no zombie.
pub(crate) fn is_alive(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z"))
}

/// `sh` with a script as the first process of namespaces of its own.
/// `$0` is the agent and `$1` its address; the script ends with `exec`.
pub(crate) fn in_namespaces(script: &str, listen: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--uts", "--net", "--ipc", "--pid", "--fork"])
        .args(["--mount-proc", "--kill-child=KILL", "sh", "-ec", script])
        .arg(program())
        .arg(listen);
    command
}
