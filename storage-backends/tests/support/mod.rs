//! File systems of the tests' own, on loop devices.

#![allow(dead_code, reason = "each test program uses some of it")]
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a skipped test says so, and processes that tests start speak to them"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by tests that start processes, and by tests that would mind: a process that is being started
/// keeps the locks of all that this one has open, until its exec.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file system that the tests can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileSystem {
    Btrfs,
    Xfs,
    /// XFS that cannot clone.
    XfsWithoutReflink,
    Ext4,
}

impl FileSystem {
    fn mkfs(self) -> Command {
        let (program, args): (_, &[&str]) = match self {
            Self::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
            Self::Xfs => ("mkfs.xfs", &["-q", "-f", "-m", "reflink=1"]),
            Self::XfsWithoutReflink => ("mkfs.xfs", &["-q", "-f", "-m", "reflink=0"]),
            Self::Ext4 => ("mkfs.ext4", &["-q", "-F"]),
        };
        let mut command = Command::new(program);
        command.args(args);
        command
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Xfs | Self::XfsWithoutReflink => "xfs",
            Self::Ext4 => "ext4",
        }
    }
}

/// A file system in a sparse file, mounted until this is dropped.
#[derive(Debug)]
pub(crate) struct Mounted {
    dir: tempfile::TempDir,
    file_system: FileSystem,
    mounted: bool,
}

impl Mounted {
    /// Makes one of `mib` MiB, or says on stderr why it cannot and returns `None`: no root, no
    /// mkfs, no loop devices.
    pub(crate) fn new(file_system: FileSystem, mib: u64) -> Option<Self> {
        match Self::try_new(file_system, mib) {
            Ok(mounted) => Some(mounted),
            Err(why) => {
                eprintln!("skipped: no {} of our own: {why}", file_system.kind());
                None
            }
        }
    }

    fn try_new(file_system: FileSystem, mib: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".into());
        }
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let mut made = Self {
            dir,
            file_system,
            mounted: false,
        };
        std::fs::File::create(made.image())
            .and_then(|file| file.set_len(mib << 20))
            .map_err(|e| e.to_string())?;
        std::fs::create_dir(made.path()).map_err(|e| e.to_string())?;
        run(file_system.mkfs().arg(made.image()))?;
        made.mount()?;
        Ok(made)
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn mount(&mut self) -> Result<(), String> {
        // nouuid: an image that is a copy of another one's may be mounted while that is still known.
        let options = match self.file_system.kind() {
            "xfs" => "loop,nouuid",
            _ => "loop",
        };
        let mut mount = Command::new("mount");
        mount.args(["-t", self.file_system.kind(), "-o", options]);
        run(mount.arg(self.image()).arg(self.path()))?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        run(Command::new("umount").arg(self.path()))?;
        self.mounted = false;
        Ok(())
    }

    /// Keeps what a power cut now would leave: what has reached the disk at this moment, and
    /// nothing of what is only in memory.
    pub(crate) fn moment(&self) -> Moment {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let kept = self.dir.path().join(format!("moment{number}"));
        // The loop device hands each write on to the image file, so the image is the disk.
        let mut copy = Command::new("cp");
        run(copy.arg("--sparse=always").arg(self.image()).arg(&kept)).unwrap();
        Moment(kept)
    }

    /// Mounts the file system as it was after the power cut. Nothing on it is open any more.
    pub(crate) fn power_was_cut(&mut self, at: Moment) {
        self.unmount().unwrap();
        std::fs::rename(at.0, self.image()).unwrap();
        self.mount().unwrap();
    }
}

/// A disk as it was at some moment.
#[derive(Debug)]
pub(crate) struct Moment(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted && self.unmount().is_err() {
            // Something in a failing test still holds a file open.
            let _ = run(Command::new("umount").arg("--lazy").arg(self.path()));
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .output()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{}: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// The names in a directory, sorted.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Says that a test, or a part of it, was not done.
pub(crate) fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

/// Says something to the process that started this one.
pub(crate) fn say(what: &str) {
    println!("{what}");
}
