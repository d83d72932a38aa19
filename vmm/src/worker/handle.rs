//! The embedder's side: a handle on a worker process.

mod connection;

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use offshoot_snapshot_format::{Disk, Metadata, SnapshotId, Verify};
use offshoot_storage::LayerName;

use super::channel::Channel;
use super::fork::made_layers;
use super::jail::Jail;
use super::message::{Answer, Ask, Forked, Told};
use super::plan::{MachinePlan, WorkerBindings};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::exits::ExitReason;
use crate::snapshot::{SaveOptions, Saved};
use crate::threads;
use connection::Connection;

/// The first argument of a program that is started as a worker.
pub(super) const WORKER_ARGUMENT: &str = "offshoot-worker";

/// The program that is started as a worker: it calls [`run_if_worker`](super::run_if_worker) first
/// thing in `main`.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    stderr: Option<Arc<OwnedFd>>,
    jail: Jail,
}

impl Program {
    /// The program at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            stderr: None,
            jail: Jail(Some(Vec::new())),
        }
    }

    /// Lets workers and their children use the directory `path` and all beneath it, besides those that
    /// the first bindings (or a template's snapshot) name: where snapshots go, the stores and sockets of
    /// forks. Nothing else of the file system is within their reach.
    #[must_use]
    pub fn allowing(mut self, path: impl Into<PathBuf>) -> Self {
        if let Some(directories) = &mut self.jail.0 {
            directories.push(path.into());
        }
        self
    }

    /// Lets workers reach whatever their user may: for kernels without Landlock.
    #[must_use]
    pub fn unconfined(mut self) -> Self {
        self.jail = Jail(None);
        self
    }

    /// This very program, which must call [`run_if_worker`](super::run_if_worker).
    #[must_use]
    pub fn this() -> Self {
        Self::at("/proc/self/exe")
    }

    /// Where workers and their children write what they log: nowhere unless this is said.
    #[must_use]
    pub fn with_log(mut self, log: OwnedFd) -> Self {
        self.stderr = Some(Arc::new(log));
        self
    }

    /// Starts a worker and a thread that waits for its end, so that no zombie stays.
    fn start(&self) -> Result<Started> {
        const WHAT: &str = "cannot start a worker";
        let (ours, theirs) = Channel::pair().context(WHAT)?;
        let stderr = match &self.stderr {
            Some(log) => log.try_clone().context(WHAT)?.into(),
            None => Stdio::null(),
        };
        let arguments: [&OsStr; 1] = [OsStr::new(WORKER_ARGUMENT)];
        let mut child = Command::new(&self.path)
            .args(arguments)
            // Nothing of the embedder's secrets; only what finds the program's libraries.
            .env_clear()
            .envs(std::env::var_os("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH", path)))
            .stdin(Stdio::from(theirs.into_fd()))
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|e| {
                let program = OsString::from(&self.path);
                Error::io(format!("cannot start a worker: {}", program.display()), e)
            })?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let status = Arc::new(AtomicI32::new(NOT_ENDED));
        let ended = Arc::clone(&status);
        threads::spawn("worker-wait".into(), move || {
            use std::os::unix::process::ExitStatusExt;
            let raw = child.wait().map_or(0, ExitStatusExt::into_raw);
            ended.store(raw, Ordering::Release);
        })
        .context(WHAT)?;
        Ok(Started {
            channel: ours,
            pid,
            status,
        })
    }
}

/// No status that `waitpid` gives.
const NOT_ENDED: i32 = i32::MIN;

struct Started {
    channel: Channel,
    pid: i32,
    status: Arc<AtomicI32>,
}

/// How a worker's machine came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest ended; the worker is there still.
    Guest(ExitReason),
    /// The worker's process is gone.
    Gone {
        /// Its status as `waitpid` gives it, where that is known: of a worker that was started, not
        /// forked.
        status: Option<i32>,
    },
}

/// A machine in a process of its own.
///
/// The handle can be used from several threads at once; calls take turns in the worker. When it is
/// dropped the worker ends its machine and itself, which nobody waits for.
#[derive(Debug)]
pub struct Worker {
    connection: Connection,
    pid: i32,
    status: Option<Arc<AtomicI32>>,
}

/// What a template was loaded from.
#[derive(Debug, Clone)]
pub struct TemplateInfo {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// What was noted of it.
    pub metadata: Metadata,
    /// Its frozen disks: each child's drives are made of them by
    /// [`DriveFrom::Fork`](super::DriveFrom::Fork).
    pub disks: Vec<Disk>,
}

/// Forked children that run.
#[derive(Debug)]
pub struct Children {
    /// They, in the order of their bindings.
    pub workers: Vec<Worker>,
    /// For how long the source was stopped; zero for a template.
    pub source_pause: Duration,
}

/// A snapshot that is being written while its source runs.
#[derive(Debug)]
pub struct Snapshotting {
    writer: Connection,
    /// For how long the source was stopped.
    pub source_pause: Duration,
    id: SnapshotId,
    store: PathBuf,
}

impl Worker {
    /// Starts a worker that boots a machine, and waits until the guest runs.
    ///
    /// # Errors
    /// What the worker's machine could not be made of; `TimedOut`. Nothing is left behind.
    pub fn boot(
        program: &Program,
        machine: &MachinePlan,
        bindings: WorkerBindings,
        timeout: Duration,
    ) -> Result<Self> {
        let worker = Self::started(program.start()?);
        let files = std::iter::once(&machine.kernel).chain(&machine.initrd);
        let fds: Vec<BorrowedFd<'_>> = files
            .map(AsFd::as_fd)
            .chain(bindings.borrowed_fds())
            .collect();
        let jail = program.jail.clone();
        let ask = Ask::Boot(Box::new(machine.spec.clone()), bindings.spec.clone(), jail);
        match worker.connection.call(ask, &fds, timeout)? {
            Answer::Started(_) => Ok(worker),
            _ => Err(unexpected()),
        }
    }

    /// Starts a worker that loads a snapshot and is forked into copies of it. It never runs itself.
    ///
    /// # Errors
    /// Why the snapshot cannot be used here; `TimedOut`.
    pub fn template(
        program: &Program,
        snapshot: &Path,
        verify: Verify,
        timeout: Duration,
    ) -> Result<(Self, TemplateInfo)> {
        let worker = Self::started(program.start()?);
        let ask = Ask::Load {
            snapshot: snapshot.to_owned(),
            verify: verify == Verify::Eager,
            jail: program.jail.clone(),
        };
        match worker.connection.call(ask, &[], timeout)? {
            Answer::Loaded(origin) => Ok((
                worker,
                TemplateInfo {
                    id: origin.id,
                    metadata: origin.metadata,
                    disks: origin.disks,
                },
            )),
            _ => Err(unexpected()),
        }
    }

    fn started(started: Started) -> Self {
        Self {
            connection: Connection::new(started.channel),
            pid: started.pid,
            status: Some(started.status),
        }
    }

    /// Forks the machine: one running child for each of `children`, or none and an account of what
    /// failed. The source goes on in every case, and was stopped only briefly.
    ///
    /// # Errors
    /// What failed, for the first child that failed; the others are ended, and what was made for any of
    /// them is deleted.
    pub fn fork(&self, children: Vec<WorkerBindings>, timeout: Duration) -> Result<Children> {
        let deadline = Instant::now() + timeout;
        let name = SnapshotId::generate().context("the host has no random bytes for a name")?;
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in &children {
            let (our_end, their_end) = Channel::pair().context("cannot make a child's channel")?;
            ours.push(Connection::new(our_end));
            theirs.push(their_end);
        }
        let fds: Vec<BorrowedFd<'_>> = theirs
            .iter()
            .zip(&children)
            .flat_map(|(channel, bindings)| {
                std::iter::once(channel.as_fd()).chain(bindings.borrowed_fds())
            })
            .collect();
        let ask = Ask::Fork {
            name: format!("fork-{}", name.to_string().trim_start_matches("snap-")),
            children: children.iter().map(|child| child.spec.clone()).collect(),
        };
        let forked = match self.connection.call(ask, &fds, timeout)? {
            Answer::Forked(forked) if forked.children.len() == children.len() => forked,
            _ => return Err(unexpected()),
        };
        drop(theirs);
        self.gather(forked, ours, children, deadline)
    }

    /// Waits for the children of a fork to say that they run.
    fn gather(
        &self,
        forked: Forked,
        connections: Vec<Connection>,
        bindings: Vec<WorkerBindings>,
        deadline: Instant,
    ) -> Result<Children> {
        let mut workers = Vec::new();
        let mut failure = None;
        let mut orphaned = Vec::new();
        let children = forked.children.into_iter().zip(connections).zip(bindings);
        for ((pid, connection), bindings) in children {
            let makes = bindings.spec.makes();
            let born = pid.map_err(Error::from).and_then(|pid| {
                connection
                    .wait_born(deadline, makes, &mut orphaned)
                    .map(|()| pid)
            });
            match born {
                Ok(pid) => workers.push(Self {
                    connection,
                    pid,
                    status: None,
                }),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        let layers = made_layers(&forked.layers);
        if let Some(error) = failure {
            for worker in workers {
                // It lets go of its disk before it answers.
                let _ = worker.end(true, Duration::from_secs(10));
            }
            self.connection.tell(Ask::Drop {
                volumes: orphaned,
                layers,
            })?;
            return Err(error);
        }
        if !layers.is_empty() {
            // Needed no more, unless the children's disks stand on them: then they stay.
            self.connection.tell(Ask::Drop {
                volumes: Vec::new(),
                layers,
            })?;
        }
        Ok(Children {
            workers,
            source_pause: Duration::from_nanos(forked.pause_ns),
        })
    }

    /// Starts to write the machine into a snapshot in the directory `store`, and returns as soon as the
    /// machine goes on: it is stopped only for a fork.
    ///
    /// # Errors
    /// When it could not be captured or forked; there is no snapshot then.
    pub fn snapshot(
        &self,
        store: &Path,
        options: SaveOptions,
        timeout: Duration,
    ) -> Result<Snapshotting> {
        let (ours, theirs) = Channel::pair().context("cannot make a writer's channel")?;
        let ask = Ask::Snapshot {
            store: store.to_owned(),
            id: options.id,
            metadata: options.metadata,
        };
        let fds = [theirs.as_fd()];
        match self.connection.call(ask, &fds, timeout)? {
            Answer::Forked(forked) => Ok(Snapshotting {
                writer: Connection::new(ours),
                source_pause: Duration::from_nanos(forked.pause_ns),
                id: options.id,
                store: store.to_owned(),
            }),
            _ => Err(unexpected()),
        }
    }

    fn done(&self, ask: Ask, timeout: Duration) -> Result<()> {
        match self.connection.call(ask, &[], timeout)? {
            Answer::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Stops the guest until [`resume`](Self::resume).
    ///
    /// # Errors
    /// When it does not run, or a device could not come to rest; it then runs on.
    pub fn pause(&self, timeout: Duration) -> Result<()> {
        self.done(Ask::Pause, timeout)
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    /// When it is not paused, or a device cannot go on.
    pub fn resume(&self, timeout: Duration) -> Result<()> {
        self.done(Ask::Resume, timeout)
    }

    /// Presses the power button: asks the guest to switch itself off.
    ///
    /// # Errors
    /// When the guest does not run.
    pub fn press_power_button(&self, timeout: Duration) -> Result<()> {
        self.done(Ask::PressPowerButton, timeout)
    }

    /// When an instruction of the guest first caused an exit after its start or last resume, as time
    /// since this host's boot (`CLOCK_MONOTONIC`); `None` while it has not.
    ///
    /// # Errors
    /// When the worker is gone or does not answer.
    pub fn first_exit(&self, timeout: Duration) -> Result<Option<Duration>> {
        match self.connection.call(Ask::Status, &[], timeout)? {
            Answer::Status(status) => Ok(status.first_exit_ns.map(Duration::from_nanos)),
            _ => Err(unexpected()),
        }
    }

    /// Waits until the guest has ended or the worker is gone, for at most `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Exit> {
        let exit = self.connection.wait_exit(Instant::now() + timeout)?;
        Some(match exit {
            Some(reason) => Exit::Guest(reason),
            None => Exit::Gone {
                status: self.exit_status(),
            },
        })
    }

    fn exit_status(&self) -> Option<i32> {
        let status = self.status.as_ref()?;
        // The thread that waits for it notices at about the same time as we do.
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match status.load(Ordering::Acquire) {
                NOT_ENDED if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                NOT_ENDED => return None,
                status => return Some(status),
            }
        }
    }

    /// The worker's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends the machine and its process. On return its disks are free.
    ///
    /// # Errors
    /// When the worker does not answer; it ends all the same, when the handle is gone.
    pub fn stop(self, timeout: Duration) -> Result<()> {
        self.end(false, timeout)
    }

    /// As [`stop`](Self::stop), and the volumes that were made for the machine are deleted.
    ///
    /// # Errors
    /// As for `stop`.
    pub fn discard(self, timeout: Duration) -> Result<()> {
        self.end(true, timeout)
    }

    fn end(self, discard: bool, timeout: Duration) -> Result<()> {
        self.done(Ask::Stop { discard }, timeout)
    }

    /// Ends the process at once, whatever it is doing.
    ///
    /// # Errors
    /// When it is gone already or may not be signalled.
    pub fn kill(&self) -> Result<()> {
        // The number of a forked worker is what its source told: never a group, everybody or init.
        let pid = Some(self.pid).filter(|pid| *pid > 1);
        let pid = pid
            .and_then(rustix::process::Pid::from_raw)
            .ok_or_else(|| Error::new(ErrorKind::Ended, "the worker is gone"))?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            .map_err(std::io::Error::from)
            .context("cannot kill the worker")
    }
}

impl Snapshotting {
    /// Waits until the snapshot is published. `progress` is told of bytes done and bytes in all.
    ///
    /// # Errors
    /// Why there is no snapshot. A writer that fails takes the layers away where the backend lets it; one
    /// that was killed leaves them, named after the snapshot.
    pub fn wait(&self, mut progress: impl FnMut(u64, u64), timeout: Duration) -> Result<Saved> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.writer.next(deadline)? {
                Told::Progress { done, total } => progress(done, total),
                Told::Written(written) => {
                    let written = written.map_err(Error::from)?;
                    let layers = written.layers.into_iter().map(|(drive, layer)| {
                        let layer = LayerName::new(layer).map_err(|e| {
                            Error::because(ErrorKind::System, "a drive was frozen to no layer", e)
                        })?;
                        Ok((drive, layer))
                    });
                    return Ok(Saved {
                        // Where it was to be: a writer has no say in that.
                        path: self.store.join(self.id.to_string()),
                        id: self.id,
                        layers: layers.collect::<Result<_>>()?,
                    });
                }
                _ => return Err(unexpected()),
            }
        }
    }
}

fn unexpected() -> Error {
    Error::new(
        ErrorKind::System,
        "the worker answers something else than it was asked",
    )
}
