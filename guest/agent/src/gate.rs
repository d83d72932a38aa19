//! Which generation this guest is, and that nobody is answered in the name of another.
//!
//! A guest can't see by itself that it is a copy: Linux shows the VM generation id to nobody, and
//! its notice of a change carries no number that could be compared. So every connection says which
//! generation it means. A copy wakes up with its source's generation, and refuses all that is
//! meant for the copy until the identity has been taken.

use std::sync::{Condvar, Mutex};

use offshoot_protocol::agent::{ErrorCode, Generation, Refusal, Report};

use crate::failure::refusal;
use crate::lock::{lock, wait};

#[derive(Debug, Default)]
struct State {
    generation: Generation,
    taking: bool,
    report: Option<Report>,
}

/// The gate.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// What is to be done about an identity.
#[derive(Debug)]
pub(crate) enum Take<'a> {
    /// Nothing: it has been taken before, with this report.
    Already(Report),
    /// Everything. The gate is shut until this is finished or dropped.
    Now(Taking<'a>),
}

/// An identity that is being taken.
#[derive(Debug)]
pub(crate) struct Taking<'a>(&'a Gate);

impl Gate {
    /// The generation now.
    pub(crate) fn generation(&self) -> Generation {
        lock(&self.state).generation
    }

    /// Waits for an identity that is being taken, and refuses what is meant for another
    /// generation.
    pub(crate) fn enter(&self, meant: Generation) -> Result<(), Refusal> {
        let mut state = lock(&self.state);
        while state.taking {
            state = wait(&self.changed, state, None).0;
        }
        match meant == Generation::NONE || meant == state.generation {
            true => Ok(()),
            false => Err(refusal(
                ErrorCode::NotReady,
                &format!("this is generation {}", state.generation),
            )),
        }
    }

    /// Shuts the gate for an identity, unless it has been taken already.
    pub(crate) fn take(&self, generation: Generation) -> Take<'_> {
        let mut state = lock(&self.state);
        while state.taking {
            state = wait(&self.changed, state, None).0;
        }
        match &state.report {
            Some(report) if state.generation == generation => Take::Already(report.clone()),
            _ => {
                state.taking = true;
                Take::Now(Taking(self))
            }
        }
    }
}

impl Taking<'_> {
    /// Opens the gate to the new generation.
    pub(crate) fn finish(self, report: &Report) {
        let mut state = lock(&self.0.state);
        state.generation = report.generation;
        state.report = Some(report.clone());
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).taking = false;
        self.0.changed.notify_all();
    }
}
