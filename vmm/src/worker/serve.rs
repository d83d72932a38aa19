//! The worker's side: one thread that does what it is told.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{LayerName, VolumeName};
use rustix::event::{PollFd, PollFlags, poll};

use super::channel::{Channel, Received};
use super::child::ChildSeed;
use super::fork::{Forking, Writing};
use super::handle::WORKER_ARGUMENT;
use super::jail::Jail;
use super::message::{Answer, Ask, Birth, Origin, Request, Status, Told, WireError};
use super::plan::{BindingSpec, MachineSpec, Made, Stored};
use super::process;
use super::writer::{self, WriterSeed};
use super::{Backends, OpenBackend};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::Host;
use crate::machine::{Machine, Running};
use crate::memory::Memory;
use crate::snapshot::storage;
use crate::state::MachineState;
use crate::template::Template;

/// How long the embedder may take to make room for a message.
const SEND: Duration = Duration::from_secs(10);

/// Serves as a worker and returns the exit status, when this process was started as one; returns
/// `None` at once otherwise. To be called first thing in `main`, before any thread is started.
#[must_use]
pub fn run_if_worker(open: OpenBackend) -> Option<ExitCode> {
    let asked = std::env::args_os().nth(1);
    if asked.as_deref() != Some(OsStr::new(WORKER_ARGUMENT)) {
        return None;
    }
    let channel = match process::take_stdin() {
        Ok(fd) => Channel::from_fd(fd),
        Err(error) => {
            tracing::error!(%error, "a worker is started by its embedder, with a channel as standard input");
            return Some(ExitCode::FAILURE);
        }
    };
    // What the embedder left open for its children by mistake is none of a worker's business.
    process::close_all_but(&mut vec![channel.as_fd().as_raw_fd()]);
    let mut session = Session::new(channel, Backends::new(open));
    loop {
        match session.serve() {
            // Nothing that is left is worth a wait.
            Next::Quit => process::exit(0),
            Next::Child(seed) => session = session.into_child(*seed),
            Next::Writer(seed) => process::exit(session.into_writer(*seed)),
            Next::Go => {}
        }
    }
}

/// What comes after a request.
enum Next {
    Go,
    Quit,
    /// This is a forked child now.
    Child(Box<ChildSeed>),
    /// This is a forked writer now.
    Writer(Box<WriterSeed>),
}

/// A snapshot that was loaded to be forked.
pub(super) struct Loaded {
    pub(super) state: MachineState,
    pub(super) memory: Arc<Memory>,
    /// What each drive holds, by drive and layer.
    pub(super) disks: Vec<(String, String)>,
}

pub(super) enum Life {
    Empty,
    Running(Running),
    Paused(Machine),
    Template(Box<Loaded>),
}

/// A process that this one forked.
pub(super) struct Child {
    pub(super) pid: i32,
    pub(super) ended: OwnedFd,
}

pub(super) struct Session {
    pub(super) channel: Channel,
    pub(super) backends: Backends,
    pub(super) host: Option<Arc<Host>>,
    pub(super) life: Life,
    pub(super) bindings: BindingSpec,
    pub(super) made: Made,
    pub(super) children: Vec<Child>,
    exit_told: bool,
}

impl Session {
    pub(super) fn new(channel: Channel, backends: Backends) -> Self {
        Self {
            channel,
            backends,
            host: None,
            life: Life::Empty,
            bindings: BindingSpec::default(),
            made: Made::default(),
            children: Vec::new(),
            exit_told: false,
        }
    }

    /// Waits for something to do and does it.
    fn serve(&mut self) -> Next {
        let readable = match self.wait() {
            Ok(readable) => readable,
            Err(error) => {
                tracing::error!(%error, "a worker cannot wait");
                return self.quit();
            }
        };
        self.tell_exit();
        self.tell_children();
        if !readable {
            return Next::Go;
        }
        match self.channel.try_receive::<Request>() {
            Ok(Some(received)) => self.handle(received),
            // The embedder is gone, or says what nobody understands.
            Ok(None) => self.quit(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Next::Go,
            Err(error) => {
                tracing::error!(%error, "a request cannot be read");
                self.quit()
            }
        }
    }

    /// Waits for a request, the end of the guest or of a child; whether it is (also) the first.
    fn wait(&self) -> io::Result<bool> {
        let exits = match &self.life {
            Life::Running(running) if !self.exit_told => Some(running.exits().event()),
            _ => None,
        };
        let exits = exits.map(process::borrow);
        let mut fds = vec![PollFd::new(&self.channel, PollFlags::IN)];
        fds.extend(exits.iter().map(|event| PollFd::new(event, PollFlags::IN)));
        fds.extend(
            self.children
                .iter()
                .map(|child| PollFd::new(&child.ended, PollFlags::IN)),
        );
        match poll(&mut fds, None) {
            Ok(_) => Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty())),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn send(&self, told: &Told) {
        if let Err(error) = self.channel.send(told, &[], SEND) {
            // It shows as an end of the channel when the embedder is gone.
            tracing::warn!(%error, "the embedder does not listen");
        }
    }

    fn tell_exit(&mut self) {
        let Life::Running(running) = &self.life else {
            return;
        };
        if !self.exit_told
            && let Some(reason) = running.exits().reason()
        {
            self.exit_told = true;
            self.send(&Told::Exited(reason));
        }
    }

    fn tell_children(&mut self) {
        let mut ended = Vec::new();
        self.children
            .retain(|child| match process::reap(child.pid) {
                Some(status) => {
                    ended.push((child.pid, status));
                    false
                }
                None => true,
            });
        for (pid, status) in ended {
            self.send(&Told::ChildEnded { pid, status });
        }
    }

    fn handle(&mut self, received: Received<Request>) -> Next {
        let Received { message, fds } = received;
        let tag = message.tag;
        let done = match message.ask {
            Ask::Boot(machine, bindings, jail) => self.boot(*machine, bindings, &jail, fds),
            Ask::Load {
                snapshot,
                verify,
                jail,
            } => self.load(&snapshot, verify, &jail),
            Ask::Fork { name, children } => match self.fork(&name, children, fds) {
                Ok(Forking::Parent(forked)) => Ok(Answer::Forked(forked)),
                Ok(Forking::Child(seed)) => return Next::Child(seed),
                Err(error) => Err(error),
            },
            Ask::Snapshot {
                store,
                id,
                metadata,
            } => match self.snapshot(
                writer::Order {
                    store,
                    id,
                    metadata,
                },
                fds,
            ) {
                Ok(Writing::Parent(forked)) => Ok(Answer::Forked(forked)),
                Ok(Writing::Writer(seed)) => return Next::Writer(seed),
                Err(error) => Err(error),
            },
            Ask::Drop { volumes, layers } => {
                self.drop_storage(&volumes, &layers);
                Ok(Answer::Done)
            }
            Ask::Pause => self.pause(),
            Ask::Resume => self.resume(),
            Ask::PressPowerButton => self
                .running()
                .and_then(|running| running.press_power_button())
                .map(|()| Answer::Done),
            Ask::Status => self.status(),
            Ask::Stop { discard } => {
                self.stop(discard);
                self.send(&Told::Reply(tag, Ok(Answer::Done)));
                return Next::Quit;
            }
        };
        let reply = done.map_err(|error| WireError::from(&error));
        self.send(&Told::Reply(tag, reply));
        Next::Go
    }

    /// Ends the machine: its devices let go of what they hold, what was made for it goes if asked for.
    fn stop(&mut self, discard: bool) {
        match std::mem::replace(&mut self.life, Life::Empty) {
            Life::Running(running) => drop(running.stop()),
            Life::Paused(machine) => drop(machine.stop()),
            Life::Template(_) | Life::Empty => {}
        }
        if discard {
            self.made.delete();
        }
    }

    fn quit(&mut self) -> Next {
        self.stop(false);
        Next::Quit
    }

    pub(super) fn host(&mut self) -> Result<Arc<Host>> {
        if let Some(host) = &self.host {
            return Ok(Arc::clone(host));
        }
        let host = Host::open()?;
        self.host = Some(Arc::clone(&host));
        Ok(host)
    }

    fn running(&mut self) -> Result<&mut Running> {
        match &mut self.life {
            Life::Running(running) => Ok(running),
            Life::Paused(_) => Err(Error::new(ErrorKind::Config, "the machine is paused")),
            Life::Template(_) => Err(Error::new(
                ErrorKind::Config,
                "a template does not run; fork it",
            )),
            Life::Empty => Err(Error::new(ErrorKind::Ended, "the worker has no machine")),
        }
    }

    fn must_be_empty(&self) -> Result<()> {
        match self.life {
            Life::Empty => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Config,
                "a worker has one machine, and this one has it already",
            )),
        }
    }

    fn boot(
        &mut self,
        spec: MachineSpec,
        bindings: BindingSpec,
        jail: &Jail,
        fds: Vec<OwnedFd>,
    ) -> Result<Answer> {
        self.must_be_empty()?;
        let host = self.host()?;
        for (_, backend, store) in bindings.stores() {
            self.backends.open(backend, store)?;
        }
        jail.enter(bindings.directories(), None)?;
        let mut fds = fds.into_iter();
        let missing = || Error::new(ErrorKind::Config, "the kernel's descriptor is missing");
        let kernel = fds.next().ok_or_else(missing)?;
        let initrd = spec
            .initrd
            .then(|| fds.next().ok_or_else(missing))
            .transpose()?;
        let config = spec.config(kernel, initrd)?;
        let (opened, made) = bindings
            .clone()
            .open(&mut self.backends, fds.collect(), &[])?;
        let machine = Machine::boot(&host, &config, opened)?;
        self.start(machine, bindings, made)?;
        Ok(Answer::Started(birth()))
    }

    /// Starts a machine that was just made.
    pub(super) fn start(
        &mut self,
        machine: Machine,
        bindings: BindingSpec,
        made: Made,
    ) -> Result<()> {
        self.life = Life::Running(machine.start()?);
        self.bindings = bindings;
        self.made = made.keep();
        Ok(())
    }

    fn load(&mut self, snapshot: &Path, verify: bool, jail: &Jail) -> Result<Answer> {
        self.must_be_empty()?;
        let host = self.host()?;
        jail.enter(std::iter::empty(), Some(snapshot))?;
        let raw = RawSnapshot::open(snapshot)
            .map_err(|e| Error::because(ErrorKind::BadState, "the snapshot cannot be used", e))?;
        let verify = if verify { Verify::Eager } else { Verify::None };
        let template = Template::load(&host, &raw, verify)?;
        let (state, memory, origin) = template.into_mapped()?;
        let origin = Origin {
            id: origin.id,
            metadata: origin.metadata,
            disks: origin.disks,
        };
        let disks = origin.disks.iter();
        let disks = disks
            .map(|disk| (disk.id.clone(), disk.layer.clone()))
            .collect();
        self.life = Life::Template(Box::new(Loaded {
            state,
            memory: Arc::new(memory),
            disks,
        }));
        Ok(Answer::Loaded(origin))
    }

    fn pause(&mut self) -> Result<Answer> {
        self.running()?;
        let Life::Running(running) = std::mem::replace(&mut self.life, Life::Empty) else {
            return Err(Error::new(ErrorKind::Ended, "the worker has no machine"));
        };
        match running.into_paused() {
            Ok(machine) => {
                self.life = Life::Paused(machine);
                Ok(Answer::Done)
            }
            Err((running, error)) => {
                self.life = Life::Running(running);
                Err(error)
            }
        }
    }

    fn resume(&mut self) -> Result<Answer> {
        match std::mem::replace(&mut self.life, Life::Empty) {
            Life::Paused(machine) => {
                self.life = Life::Running(machine.start()?);
                Ok(Answer::Done)
            }
            other => {
                self.life = other;
                Err(Error::new(ErrorKind::Config, "the machine is not paused"))
            }
        }
    }

    fn status(&mut self) -> Result<Answer> {
        let first_exit = match &self.life {
            Life::Running(running) => running.first_exit(),
            _ => None,
        };
        Ok(Answer::Status(Status {
            running: matches!(self.life, Life::Running(_)),
            first_exit_ns: first_exit.map(super::monotonic_ns),
        }))
    }

    /// Deletes what nothing depends on; what something does stays.
    pub(super) fn drop_storage(&mut self, volumes: &[Stored], layers: &[Stored]) {
        let mut delete = |item: &Stored, is_layer: bool| -> Result<()> {
            let what = || format!("cannot delete {}", item.name);
            let unnamed = |e| Error::because(ErrorKind::Config, what(), e);
            let backend = self.backends.open(&item.backend, &item.store)?;
            let deleted = if is_layer {
                backend.delete_layer(&LayerName::new(item.name.clone()).map_err(unnamed)?)
            } else {
                backend.delete(&VolumeName::new(item.name.clone()).map_err(unnamed)?)
            };
            deleted.map_err(|e| storage(what(), e))
        };
        for (items, is_layer) in [(volumes, false), (layers, true)] {
            for item in items {
                if let Err(error) = delete(item, is_layer) {
                    // Mostly: it is needed still, or was never made.
                    tracing::debug!(error = &error as &dyn std::error::Error, "it stays");
                }
            }
        }
    }
}

pub(super) fn birth() -> Birth {
    Birth {
        pid: i32::try_from(std::process::id()).unwrap_or(0),
    }
}
