//! A forked process: what it sheds of its parent, and what it becomes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use super::Backends;
use super::channel::Channel;
use super::message::{Told, WireError};
use super::plan::BindingSpec;
use super::process;
use super::serve::{Session, birth};
use super::writer::{self, WriterSeed};
use crate::error::Result;
use crate::kvm::Host;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::state::MachineState;

/// What a forked child becomes a machine from.
pub(super) struct ChildSeed {
    pub(super) channel: Channel,
    pub(super) bindings: BindingSpec,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) state: MachineState,
    pub(super) memory: Arc<Memory>,
    /// What each drive holds, by drive and layer.
    pub(super) disks: Vec<(String, String)>,
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
    pub(super) fn into_child(self, seed: ChildSeed) -> Self {
        let kept: Vec<&OwnedFd> = seed.fds.iter().collect();
        let (host, backends) = self.shed(&kept, &seed.channel);
        let mut session = Self::new(seed.channel, backends);
        session.host = host;
        let born = session.build(
            seed.state,
            &seed.memory,
            seed.bindings,
            seed.fds,
            &seed.disks,
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
        self.send(&Told::Made);
        let machine = Machine::build_checked(&host, &state, memory, opened)?;
        self.start(machine, bindings, made)
    }

    /// Becomes a writer; returns its exit status.
    pub(super) fn into_writer(self, seed: WriterSeed) -> i32 {
        let (_host, mut backends) = self.shed(&[], &seed.channel);
        writer::run(seed, &mut backends)
    }
}
