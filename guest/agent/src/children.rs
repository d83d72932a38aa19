//! Every child process of the agent, and the one place that reaps.
//!
//! As process 1 the agent inherits every orphan of the guest, so it waits for any child. The
//! table's lock is held while a child is started and while one is reaped: a pid in the table is
//! alive or a zombie of ours, and can't have come to mean another process.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{self, Command};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use offshoot_protocol::agent::EndState;
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{WaitOptions, WaitStatus};

use crate::lock::{lock, wait};
use crate::sys;

/// How a child ended.
pub(crate) type End = (EndState, i32);

/// A child process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: i32,
    end: Mutex<Option<End>>,
    changed: Condvar,
    event: OwnedFd,
}

impl Child {
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// How it ended, if it has.
    pub(crate) fn end(&self) -> Option<End> {
        *lock(&self.end)
    }

    /// Readable once it has ended.
    pub(crate) fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Waits for its end; `None` when the deadline passes first.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<End> {
        let mut end = lock(&self.end);
        loop {
            if end.is_some() {
                return *end;
            }
            let (next, in_time) = wait(&self.changed, end, deadline);
            end = next;
            if !in_time {
                return *end;
            }
        }
    }

    fn ended(&self, how: End) {
        *lock(&self.end) = Some(how);
        self.changed.notify_all();
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// All children.
#[derive(Debug, Default)]
pub(crate) struct Children(Mutex<HashMap<i32, Arc<Child>>>);

impl Children {
    /// Starts a child, with all signals as they come.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(process::Child, Arc<Child>)> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        sys::unblock(command);
        let mut table = lock(&self.0);
        let process = command.spawn()?;
        let pid = i32::try_from(process.id()).map_err(io::Error::other)?;
        let child = Arc::new(Child {
            pid,
            end: Mutex::new(None),
            changed: Condvar::new(),
            event,
        });
        table.insert(pid, Arc::clone(&child));
        Ok((process, child))
    }

    /// Reaps every child that has ended.
    pub(crate) fn reap(&self) {
        let mut table = lock(&self.0);
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let child = table.remove(&pid.as_raw_nonzero().get());
            if let (Some(child), Some(how)) = (child, end_of(status)) {
                child.ended(how);
            }
        }
    }

    /// Sends a signal to a child that has not ended, or to its process group.
    pub(crate) fn signal(&self, child: &Child, signal: i32, group: bool) -> io::Result<()> {
        let table = lock(&self.0);
        match table.contains_key(&child.pid) {
            true => sys::kill(child.pid, signal, group),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// Whether there is any child, orphans that were inherited included.
    pub(crate) fn any(&self) -> bool {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::All, options).is_ok()
    }
}

fn end_of(status: WaitStatus) -> Option<End> {
    let code = status.exit_status().map(|code| (EndState::Code, code));
    code.or(status
        .terminating_signal()
        .map(|signal| (EndState::Signal, signal)))
}
