//! The worker's side: one thread that does what it is told.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{LayerName, VolumeName};
use rustix::event::{PollFd, PollFlags, poll};

use super::channel::{Channel, Received};
use super::handle::WORKER_ARGUMENT;
use super::message::{Answer, Ask, Birth, Forked, Origin, Request, Status, Told, WireError};
use super::plan::{BindingSpec, FrozenLayer, MachineSpec, Made, Stored};
use super::process::{self, Side};
use super::writer::{self, WriterSeed};
use super::{Backends, OpenBackend};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::Host;
use crate::machine::{Machine, Paused, Running};
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

/// What a forked child becomes a machine from.
struct ChildSeed {
    channel: Channel,
    bindings: BindingSpec,
    fds: Vec<OwnedFd>,
    state: MachineState,
    memory: Arc<Memory>,
    /// Drive and layer.
    layers: Vec<(String, String)>,
}

/// A snapshot that was loaded to be forked.
struct Loaded {
    state: MachineState,
    memory: Arc<Memory>,
    layers: Vec<(String, String)>,
}

enum Life {
    Empty,
    Running(Running),
    Paused(Machine),
    Template(Box<Loaded>),
}

/// A process that this one forked.
struct Child {
    pid: i32,
    ended: OwnedFd,
}

struct Session {
    channel: Channel,
    backends: Backends,
    host: Option<Arc<Host>>,
    life: Life,
    bindings: BindingSpec,
    made: Made,
    children: Vec<Child>,
    exit_told: bool,
}

impl Session {
    fn new(channel: Channel, backends: Backends) -> Self {
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

    fn send(&self, told: &Told) {
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
            Ask::Boot(machine, bindings) => self.boot(*machine, bindings, fds),
            Ask::Load { snapshot, verify } => self.load(&snapshot, verify),
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
                Ok(Snapshotting::Parent(forked)) => Ok(Answer::Forked(forked)),
                Ok(Snapshotting::Writer(seed)) => return Next::Writer(seed),
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

    fn host(&mut self) -> Result<Arc<Host>> {
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
        fds: Vec<OwnedFd>,
    ) -> Result<Answer> {
        self.must_be_empty()?;
        let host = self.host()?;
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
    fn start(&mut self, machine: Machine, bindings: BindingSpec, made: Made) -> Result<()> {
        self.life = Life::Running(machine.start()?);
        self.bindings = bindings;
        self.made = made.keep();
        Ok(())
    }

    fn load(&mut self, snapshot: &Path, verify: bool) -> Result<Answer> {
        self.must_be_empty()?;
        let host = self.host()?;
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
        let layers = disks
            .map(|disk| (disk.id.clone(), disk.layer.clone()))
            .collect();
        self.life = Life::Template(Box::new(Loaded {
            state,
            memory: Arc::new(memory),
            layers,
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
    fn drop_storage(&mut self, volumes: &[Stored], layers: &[Stored]) {
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

/// Those of the layers that were made for the occasion.
pub(super) fn made_layers(layers: &[FrozenLayer]) -> Vec<Stored> {
    let made = layers.iter().filter(|layer| layer.made);
    made.map(|layer| layer.layer.clone()).collect()
}

fn birth() -> Birth {
    Birth {
        pid: i32::try_from(std::process::id()).unwrap_or(0),
    }
}

enum Forking {
    Parent(Forked),
    Child(Box<ChildSeed>),
}

enum Snapshotting {
    Parent(Forked),
    Writer(Box<WriterSeed>),
}

/// What a machine is at one moment, for children to be made of.
struct Moment {
    state: MachineState,
    memory: Arc<Memory>,
    layers: Vec<FrozenLayer>,
}

impl Session {
    /// Forks the machine into `children`.
    fn fork(
        &mut self,
        name: &str,
        children: Vec<BindingSpec>,
        fds: Vec<OwnedFd>,
    ) -> Result<Forking> {
        let mut fds = fds.into_iter();
        let mut plans = Vec::new();
        for spec in children {
            let missing = || Error::new(ErrorKind::Bindings, "a child's descriptor is missing");
            let channel = Channel::from_fd(fds.next().ok_or_else(missing)?);
            let own: Vec<OwnedFd> = fds.by_ref().take(spec.fd_count()).collect();
            if own.len() != spec.fd_count() {
                return Err(missing());
            }
            plans.push((channel, spec, own));
        }
        if let Life::Template(loaded) = &self.life {
            let moment = Moment {
                state: loaded.state.clone(),
                memory: Arc::clone(&loaded.memory),
                layers: Vec::new(),
            };
            let layers = loaded.layers.clone();
            return self.fork_each(plans, moment, layers, None);
        }
        let began = Instant::now();
        let bindings = &self.bindings;
        let mut paused = Held::of(&mut self.life)?;
        let moment = capture(paused.get(), bindings, name)?;
        let layers = moment
            .layers
            .iter()
            .map(|l| (l.drive.clone(), l.layer.name.clone()))
            .collect();
        // From here on `self.life` is reached through `paused` only.
        match fork_all(plans, moment, layers) {
            Split::Child(seed) => {
                paused.forget();
                Ok(Forking::Child(seed))
            }
            Split::Parent(results, layers) => {
                paused.release()?;
                let pause = began.elapsed();
                Ok(Forking::Parent(self.adopt(results, layers, pause)))
            }
        }
    }

    fn fork_each(
        &mut self,
        plans: Vec<Plan>,
        moment: Moment,
        layers: Vec<(String, String)>,
        pause: Option<Duration>,
    ) -> Result<Forking> {
        match fork_all(plans, moment, layers) {
            Split::Child(seed) => Ok(Forking::Child(seed)),
            Split::Parent(results, layers) => {
                let pause = pause.unwrap_or_default();
                Ok(Forking::Parent(self.adopt(results, layers, pause)))
            }
        }
    }

    /// Takes note of forked children, so that they are waited for.
    fn adopt(
        &mut self,
        results: Vec<io::Result<i32>>,
        layers: Vec<FrozenLayer>,
        pause: Duration,
    ) -> Forked {
        let children = results.into_iter().map(|result| {
            let pid = result.map_err(|e| Error::io("the process cannot be forked", e));
            if let Ok(pid) = &pid {
                match process::pidfd(*pid) {
                    Ok(ended) => self.children.push(Child { pid: *pid, ended }),
                    Err(error) => tracing::error!(%error, pid, "a child's end will not be seen"),
                }
            }
            pid.map_err(|error| WireError::from(&error))
        });
        Forked {
            children: children.collect(),
            pause_ns: u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX),
            layers,
        }
    }

    /// Forks a writer.
    fn snapshot(&mut self, order: writer::Order, fds: Vec<OwnedFd>) -> Result<Snapshotting> {
        let missing = || Error::new(ErrorKind::Config, "the writer's channel is missing");
        let channel = Channel::from_fd(fds.into_iter().next().ok_or_else(missing)?);
        self.running()?;
        let began = Instant::now();
        let bindings = &self.bindings;
        let mut paused = Held::of(&mut self.life)?;
        let moment = capture(paused.get(), bindings, &order.id.to_string())?;
        let side = process::fork();
        match side {
            Ok(Side::Child) => {
                paused.forget();
                Ok(Snapshotting::Writer(Box::new(WriterSeed {
                    channel,
                    order,
                    state: moment.state,
                    memory: moment.memory,
                    layers: moment.layers,
                })))
            }
            Ok(Side::Parent(pid)) => {
                paused.release()?;
                let pause = began.elapsed();
                Ok(Snapshotting::Parent(self.adopt(
                    vec![Ok(pid)],
                    moment.layers,
                    pause,
                )))
            }
            Err(error) => {
                paused.release()?;
                self.drop_storage(&[], &made_layers(&moment.layers));
                Err(Error::io("the process cannot be forked", error))
            }
        }
    }
}

/// A machine that is held still: a running one goes on when this is let go.
enum Held<'a> {
    Running(Paused<'a>),
    Paused(Paused<'a>),
}

impl<'a> Held<'a> {
    fn of(life: &'a mut Life) -> Result<Self> {
        match life {
            Life::Running(running) => Ok(Self::Running(running.pause()?)),
            Life::Paused(machine) => Ok(Self::Paused(machine.paused())),
            Life::Template(_) | Life::Empty => {
                Err(Error::new(ErrorKind::Ended, "the worker has no machine"))
            }
        }
    }

    fn get(&mut self) -> &Paused<'a> {
        match self {
            Self::Running(paused) | Self::Paused(paused) => paused,
        }
    }

    fn release(self) -> Result<()> {
        match self {
            Self::Running(paused) => paused.resume(),
            Self::Paused(_) => Ok(()),
        }
    }

    /// In a forked child: the machine is the parent's.
    fn forget(self) {
        std::mem::forget(self);
    }
}

/// Captures a machine that is held still, and freezes its drives.
fn capture(paused: &Paused<'_>, bindings: &BindingSpec, name: &str) -> Result<Moment> {
    let state = paused.capture()?;
    let frozen = paused.freeze(name)?;
    let layers = frozen.drives.iter().filter_map(|drive| {
        let (_, backend, store) = bindings.stores().find(|(id, ..)| *id == drive.id)?;
        Some(FrozenLayer {
            drive: drive.id.clone(),
            made: drive.source.layer.is_none(),
            layer: Stored {
                backend: backend.to_owned(),
                store: store.clone(),
                name: drive.layer.to_string(),
            },
        })
    });
    let layers = layers.collect();
    frozen.keep();
    Ok(Moment {
        state,
        memory: Arc::clone(paused.memory()),
        layers,
    })
}

/// A child's channel, bindings and descriptors.
type Plan = (Channel, BindingSpec, Vec<OwnedFd>);

/// On which side of several forks.
enum Split {
    Parent(Vec<io::Result<i32>>, Vec<FrozenLayer>),
    Child(Box<ChildSeed>),
}

/// Forks once for each plan.
fn fork_all(plans: Vec<Plan>, moment: Moment, layers: Vec<(String, String)>) -> Split {
    let mut results = Vec::with_capacity(plans.len());
    let mut plans = plans.into_iter();
    while let Some((channel, bindings, fds)) = plans.next() {
        match process::fork() {
            Ok(Side::Child) => {
                // Its brothers' descriptors are closed with all others.
                std::mem::forget(plans);
                return Split::Child(Box::new(ChildSeed {
                    channel,
                    bindings,
                    fds,
                    state: moment.state,
                    memory: moment.memory,
                    layers,
                }));
            }
            Ok(Side::Parent(pid)) => results.push(Ok(pid)),
            Err(error) => results.push(Err(error)),
        }
    }
    Split::Parent(results, moment.layers)
}

impl Session {
    /// What of the parent may live on in its child: KVM's device, the stores, plain data. The rest is
    /// forgotten, and its descriptors are closed.
    fn shed(self, kept: &[&OwnedFd], channel: &Channel) -> (Option<Arc<Host>>, Backends) {
        let Self {
            channel: old,
            backends,
            host,
            life,
            made,
            children,
            ..
        } = self;
        std::mem::forget((old, life, made, children));
        let mut fds: Vec<_> = kept.iter().map(|fd| fd.as_raw_fd()).collect();
        fds.push(channel.as_fd().as_raw_fd());
        fds.extend(host.as_ref().map(|host| host.as_raw_fd()));
        fds.extend(backends.descriptors().map(|fd| fd.as_raw_fd()));
        process::close_all_but(&mut fds);
        backends.forget_open();
        (host, backends)
    }

    /// Becomes the child of a fork, with a running machine, or ends.
    fn into_child(self, seed: ChildSeed) -> Self {
        let kept: Vec<&OwnedFd> = seed.fds.iter().collect();
        let (host, backends) = self.shed(&kept, &seed.channel);
        let mut session = Self::new(seed.channel, backends);
        session.host = host;
        let born = session.build(
            seed.state,
            &seed.memory,
            seed.bindings,
            seed.fds,
            &seed.layers,
        );
        // The parent's mapping is this process's own, and ends with it.
        std::mem::forget(seed.memory);
        let failed = born.is_err();
        let told = born
            .map(|()| birth())
            .map_err(|error| WireError::from(&error));
        session.send(&Told::Born(told));
        if failed {
            process::exit(1);
        }
        session
    }

    fn build(
        &mut self,
        state: MachineState,
        memory: &Memory,
        bindings: BindingSpec,
        fds: Vec<OwnedFd>,
        layers: &[(String, String)],
    ) -> Result<()> {
        let host = self.host()?;
        let memory = Memory::inherited(memory)?;
        let (opened, made) = bindings.clone().open(&mut self.backends, fds, layers)?;
        self.send(&Told::Made(bindings.makes()));
        let machine = Machine::build_checked(&host, &state, memory, opened)?;
        self.start(machine, bindings, made)
    }

    /// Becomes a writer; returns its exit status.
    fn into_writer(self, seed: WriterSeed) -> i32 {
        let (_host, mut backends) = self.shed(&[], &seed.channel);
        writer::run(seed, &mut backends)
    }
}
