//! The source's side of a fork: a moment of the machine, and processes made of it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::Channel;
use super::child::ChildSeed;
use super::message::{Forked, WireError};
use super::plan::{BindingSpec, FrozenLayer, Stored};
use super::process::{self, Side};
use super::serve::{Child, Life, Loaded, Session};
use super::writer::{self, WriterSeed};
use crate::error::{Error, ErrorKind, Result};
use crate::machine::Paused;
use crate::memory::Memory;
use crate::state::MachineState;

/// On which side of a fork into children.
pub(super) enum Forking {
    Parent(Forked),
    Child(Box<ChildSeed>),
}

/// On which side of a fork of a writer.
pub(super) enum Writing {
    Parent(Forked),
    Writer(Box<WriterSeed>),
}

/// A child's channel, bindings and descriptors.
struct Plan {
    channel: Channel,
    bindings: BindingSpec,
    fds: Vec<OwnedFd>,
}

/// What a machine is at one moment, for other processes to go on from.
struct Moment {
    state: MachineState,
    memory: Arc<Memory>,
    /// What each drive holds, by drive and layer.
    disks: Vec<(String, String)>,
    /// The layers that the drives were frozen to just now.
    frozen: Vec<FrozenLayer>,
}

/// What is held still while it is forked. A running machine goes on when this is released or dropped.
enum Held<'a> {
    Running(Paused<'a>),
    Paused(Paused<'a>),
    Template(&'a Loaded),
}

impl<'a> Held<'a> {
    fn of(life: &'a mut Life) -> Result<Self> {
        match life {
            Life::Running(running) => Ok(Self::Running(running.pause()?)),
            Life::Paused(machine) => Ok(Self::Paused(machine.paused())),
            Life::Template(loaded) => Ok(Self::Template(loaded)),
            Life::Empty => Err(Error::new(ErrorKind::Ended, "the worker has no machine")),
        }
    }

    /// Captures the machine and freezes its drives to layers of this name. A template was captured
    /// when its snapshot was taken.
    fn capture(&self, bindings: &BindingSpec, name: &str) -> Result<Moment> {
        match self {
            Self::Running(paused) | Self::Paused(paused) => capture(paused, bindings, name),
            Self::Template(loaded) => Ok(Moment {
                state: loaded.state.clone(),
                memory: Arc::clone(&loaded.memory),
                disks: loaded.disks.clone(),
                frozen: Vec::new(),
            }),
        }
    }

    /// Lets it go on. How long it was held, where somebody was stopped by that.
    fn release(self, began: Instant) -> Result<Duration> {
        match self {
            Self::Running(paused) => {
                paused.resume()?;
                Ok(began.elapsed())
            }
            Self::Paused(_) | Self::Template(_) => Ok(Duration::ZERO),
        }
    }

    /// In a forked process: the machine is the parent's.
    fn forget(self) {
        std::mem::forget(self);
    }
}

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
    let layers: Vec<FrozenLayer> = layers.collect();
    let disks = frozen.keep().into_iter();
    Ok(Moment {
        state,
        memory: Arc::clone(paused.memory()),
        disks: disks
            .map(|(drive, layer)| (drive, layer.to_string()))
            .collect(),
        frozen: layers,
    })
}

/// Those of the layers that were made for the occasion.
pub(super) fn made_layers(layers: &[FrozenLayer]) -> Vec<Stored> {
    let made = layers.iter().filter(|layer| layer.made);
    made.map(|layer| layer.layer.clone()).collect()
}

impl Session {
    /// Forks the machine into `children`. Descriptors: for each its channel, then those of its
    /// bindings.
    pub(super) fn fork(
        &mut self,
        name: &str,
        children: Vec<BindingSpec>,
        fds: Vec<OwnedFd>,
    ) -> Result<Forking> {
        let plans = plans(children, fds)?;
        // Here and once: to open a store takes longer than all the rest of a fork.
        for (_, backend, store) in plans.iter().flat_map(|plan| plan.bindings.stores()) {
            self.backends.open(backend, store)?;
        }
        self.flush()?;
        let bindings = &self.bindings;
        let began = Instant::now();
        let held = Held::of(&mut self.life)?;
        let moment = held.capture(bindings, name)?;
        match fork_each(plans, moment) {
            Split::Child(seed) => {
                held.forget();
                Ok(Forking::Child(seed))
            }
            Split::Parent(results, frozen) => {
                let released = held.release(began);
                // Whatever became of the source, its children are there.
                let mut forked = self.adopt(results, frozen);
                forked.pause_ns = nanos(released?);
                Ok(Forking::Parent(forked))
            }
        }
    }

    /// Forks a writer of a snapshot. Descriptor: its channel.
    pub(super) fn snapshot(&mut self, order: writer::Order, fds: Vec<OwnedFd>) -> Result<Writing> {
        let missing = || Error::new(ErrorKind::Config, "the writer's channel is missing");
        let channel = Channel::from_fd(fds.into_iter().next().ok_or_else(missing)?);
        if let Life::Template(_) = self.life {
            return Err(Error::new(
                ErrorKind::Config,
                "a template is a snapshot already",
            ));
        }
        self.flush()?;
        let bindings = &self.bindings;
        let began = Instant::now();
        let held = Held::of(&mut self.life)?;
        let moment = held.capture(bindings, &order.id.to_string())?;
        match process::fork() {
            Ok(Side::Child) => {
                held.forget();
                Ok(Writing::Writer(Box::new(WriterSeed {
                    channel,
                    order,
                    state: moment.state,
                    memory: moment.memory,
                    layers: moment.frozen,
                })))
            }
            Ok(Side::Parent(pid)) => {
                let released = held.release(began);
                let mut forked = self.adopt(vec![Ok(pid)], moment.frozen);
                forked.pause_ns = nanos(released?);
                Ok(Writing::Parent(forked))
            }
            Err(error) => {
                held.release(began)?;
                self.drop_storage(&[], &made_layers(&moment.frozen));
                Err(cannot_fork(error))
            }
        }
    }

    /// Takes from the pause what can be done before it.
    fn flush(&self) -> Result<()> {
        match &self.life {
            Life::Running(running) => running.flush_drives(),
            _ => Ok(()),
        }
    }

    /// Takes note of forked processes, so that they are waited for.
    fn adopt(&mut self, results: Vec<io::Result<i32>>, layers: Vec<FrozenLayer>) -> Forked {
        let children = results.into_iter().map(|result| {
            let pid = result.map_err(|error| WireError::from(&cannot_fork(error)))?;
            match process::pidfd(pid) {
                Ok(ended) => self.children.push(Child { pid, ended }),
                Err(error) => tracing::error!(%error, pid, "a child's end will not be seen"),
            }
            Ok(pid)
        });
        Forked {
            children: children.collect(),
            pause_ns: 0,
            layers,
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn cannot_fork(error: io::Error) -> Error {
    Error::io("the worker's process cannot be forked", error)
}

fn plans(children: Vec<BindingSpec>, fds: Vec<OwnedFd>) -> Result<Vec<Plan>> {
    let missing = || Error::new(ErrorKind::Bindings, "a child's descriptor is missing");
    let mut fds = fds.into_iter();
    let plans = children.into_iter().map(|bindings| {
        let channel = Channel::from_fd(fds.next().ok_or_else(missing)?);
        let own: Vec<OwnedFd> = fds.by_ref().take(bindings.fd_count()).collect();
        if own.len() == bindings.fd_count() {
            Ok(Plan {
                channel,
                bindings,
                fds: own,
            })
        } else {
            Err(missing())
        }
    });
    plans.collect()
}

/// On which side of several forks.
enum Split {
    Parent(Vec<io::Result<i32>>, Vec<FrozenLayer>),
    Child(Box<ChildSeed>),
}

/// Forks once for each plan.
fn fork_each(plans: Vec<Plan>, moment: Moment) -> Split {
    let mut results = Vec::with_capacity(plans.len());
    let mut plans = plans.into_iter();
    while let Some(plan) = plans.next() {
        match process::fork() {
            Ok(Side::Child) => {
                // Its brothers' descriptors are closed with all others.
                std::mem::forget(plans);
                return Split::Child(Box::new(ChildSeed {
                    channel: plan.channel,
                    bindings: plan.bindings,
                    fds: plan.fds,
                    state: moment.state,
                    memory: moment.memory,
                    disks: moment.disks,
                }));
            }
            Ok(Side::Parent(pid)) => results.push(Ok(pid)),
            Err(error) => results.push(Err(error)),
        }
    }
    Split::Parent(results, moment.frozen)
}
