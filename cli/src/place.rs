//! Where a demo or a bench does its work: a directory that goes away afterwards, and a btrfs of
//! its own where that is asked for.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use clap::Args;
use offshoot_storage::{StorageBackend, open_backend, probe};
use tempfile::TempDir;

use crate::failure::{Context, Failure};
use crate::leftovers::Leftovers;

/// Where the work is done, and with which storage.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlaceArgs {
    /// Make the working directory in this one (it is removed afterwards).
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A storage backend: reflink, qcow2, qcow2:<engine> or copy; may be given several times. Without
    /// it: each that the directory can have.
    #[arg(long = "backend", value_name = "BACKEND")]
    backends: Vec<String>,
    /// Make a btrfs on a loop device for the work to be done in, so that reflink can be shown on any
    /// host (needs root and btrfs-progs).
    #[arg(long)]
    loop_btrfs: bool,
}

/// The directory and what is to be shown in it.
#[derive(Debug)]
pub(crate) struct Place {
    // Dropped in this order: unmounted before the directory is removed.
    btrfs: Option<LoopBtrfs>,
    dir: TempDir,
    /// Unix socket paths are short: sockets have a directory of their own.
    sockets: TempDir,
    backends: Vec<String>,
}

impl PlaceArgs {
    /// The backends that were named, each once.
    fn named(&self) -> Vec<String> {
        let mut named: Vec<String> = Vec::new();
        for backend in &self.backends {
            if !named.contains(backend) {
                named.push(backend.clone());
            }
        }
        named
    }

    /// Makes the directory. `loop_bytes` is the size of the file system when one is asked for: it is sparse.
    pub(crate) fn prepare(&self, loop_bytes: u64) -> Result<Place, Failure> {
        let parent = self.dir.clone().unwrap_or_else(std::env::temp_dir);
        let within = || format!("cannot make a working directory in {}", parent.display());
        let builder = || {
            let mut builder = tempfile::Builder::new();
            builder.prefix("offshoot-");
            builder
        };
        let dir = builder().tempdir_in(&parent).context(within)?;
        let sockets = builder()
            .tempdir()
            .context(|| "cannot make a directory for sockets".into())?;
        let btrfs = self
            .loop_btrfs
            .then(|| LoopBtrfs::new(dir.path(), loop_bytes))
            .transpose()?;
        let mut place = Place {
            btrfs,
            dir,
            sockets,
            backends: self.named(),
        };
        let made = Leftovers {
            mounted: place.btrfs.as_ref().map(|btrfs| btrfs.mounted.clone()),
            directories: vec![place.dir.path().into(), place.sockets.path().into()],
        };
        made.remove_when_stopped()?;
        if place.backends.is_empty() {
            place.backends = place.able()?;
        }
        Ok(place)
    }
}

impl Place {
    fn able(&self) -> Result<Vec<String>, Failure> {
        let able: Vec<String> = probe(&self.path().join("probe"))
            .into_iter()
            .filter(|found| found.outcome.is_ok())
            .map(|found| found.kind.to_owned())
            .collect();
        if able.is_empty() {
            let path = self.path().display();
            return Err(Failure::new(format!(
                "no storage backend can work in {path}"
            )));
        }
        Ok(able)
    }

    /// The backends that are to be shown.
    pub(crate) fn backends(&self) -> &[String] {
        &self.backends
    }

    /// Opens a store of its own for a backend.
    pub(crate) fn store(&self, backend: &str) -> Result<Arc<dyn StorageBackend>, Failure> {
        open_backend(backend, &self.store_dir(backend))
            .context(|| format!("cannot use the backend {backend} here"))
    }

    /// The directory of a backend's store.
    pub(crate) fn store_dir(&self, backend: &str) -> PathBuf {
        self.path().join(backend.replace(':', "-"))
    }

    /// A new directory for snapshots.
    pub(crate) fn snapshots(&self, backend: &str) -> Result<PathBuf, Failure> {
        let name = format!("snapshots-{}", backend.replace(':', "-"));
        let dir = self.path().join(name);
        std::fs::create_dir(&dir).context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// A path for a Unix socket.
    pub(crate) fn socket(&self, name: impl fmt::Display) -> PathBuf {
        self.sockets.path().join(name.to_string())
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        match &self.btrfs {
            Some(btrfs) => &btrfs.mounted,
            None => self.dir.path(),
        }
    }
}

/// The space that the files of a directory take, in bytes.
pub(crate) fn allocated(dir: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

/// A btrfs in a sparse file, mounted until this is dropped.
#[derive(Debug)]
struct LoopBtrfs {
    mounted: PathBuf,
}

impl LoopBtrfs {
    fn new(dir: &Path, bytes: u64) -> Result<Self, Failure> {
        let what = || "cannot make a btrfs on a loop device".to_owned();
        let image = dir.join("btrfs.img");
        let mounted = dir.join("btrfs");
        File::create(&image)
            .and_then(|file| file.set_len(bytes))
            .and_then(|()| std::fs::create_dir(&mounted))
            .context(what)?;
        run(Command::new("mkfs.btrfs").args(["-q", "-f"]).arg(&image)).context(what)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "btrfs", "-o", "loop,noatime"]);
        run(mount.arg(&image).arg(&mounted)).context(what)?;
        Ok(Self { mounted })
    }
}

impl Drop for LoopBtrfs {
    fn drop(&mut self) {
        let umount = || Command::new("umount");
        // After a failure a guest's last threads may still have a file of it open.
        let done = run(umount().arg(&self.mounted))
            .or_else(|_| run(umount().arg("--lazy").arg(&self.mounted)));
        if let Err(failure) = done {
            eprintln!(
                "offshoot: {} stays mounted: {failure}",
                self.mounted.display()
            );
        }
    }
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .context(|| format!("cannot start {program}; is it installed?"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(said.trim().to_owned()).context(format!("{program}: {}", output.status)))
}
