//! The host's side of the agent in a Linux guest.
//!
//! Every call blocks until its answer or its deadline, whichever comes first. Nothing that the
//! guest says is believed: lengths are bounded before anything is allocated, names in listings are
//! plain names, and a guest that says nothing, or lies, costs the caller its deadline. Each
//! operation has a connection of its own, so a handle may be used from any number of threads, and
//! one that waits holds up no other.
//!
//! ```no_run
//! use std::time::{Duration, Instant};
//! use offshoot::agent::{Agent, Command};
//!
//! # fn main() -> Result<(), offshoot::Error> {
//! let agent = Agent::at_vsock("/run/sandbox/vsock.sock");
//! let soon = Instant::now() + Duration::from_secs(10);
//! let output = agent.run(&Command::shell("uname -r; id -u"), b"", 1 << 20, soon)?;
//! assert!(output.exit.success());
//! agent.write_file("/tmp/greeting", b"hello\n", soon)?;
//! # Ok(()) }
//! ```

mod channel;
mod command;
mod connect;
mod files;
mod process;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::{OLDEST_VERSION, Reply, Request, VERSION};

pub use command::{Command, Exit, Output};
pub use connect::Connect;
pub use files::WriteOptions;
pub use offshoot_protocol::agent::{
    Address, Disk, Entry, EntryKind, EnvVar, Generation, Identity, JobId, JobInfo, Link, Memory,
    Metrics, PORT, PowerAction, Report, Route, Settings, Step, StepKind, StepResult, User,
    WindowSize, WriteMode,
};
pub use offshoot_protocol::{Id, Mac};
pub use process::{Event, Input, Process};

use crate::{Error, ErrorKind};
use channel::Channel;

/// A handle to a guest's agent. Cheap to clone; no connection is held between calls.
#[derive(Clone)]
pub struct Agent {
    way: Arc<dyn Connect>,
    generation: Generation,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// The agent behind the host side of a vsock: the Unix socket of the virtual machine. While
    /// nobody listens in the guest, calls try again until their deadline.
    pub fn at_vsock(path: impl Into<PathBuf>) -> Self {
        Self::over(connect::ByVsock { path: path.into() })
    }

    /// An agent that listens on a Unix socket itself.
    pub fn at_socket(path: impl Into<PathBuf>) -> Self {
        Self::over(connect::BySocket { path: path.into() })
    }

    /// An agent that is reached in another way.
    pub fn over(way: impl Connect + 'static) -> Self {
        Self {
            way: Arc::new(way),
            generation: Generation::NONE,
        }
    }

    /// A handle to the guest as this generation: the agent answers it only once it has taken that
    /// generation's identity. A handle without one is answered at any time, by a copy that does
    /// not know yet that it is one too.
    #[must_use]
    pub fn of_generation(&self, generation: Generation) -> Self {
        Self {
            way: Arc::clone(&self.way),
            generation,
        }
    }

    /// Connects and settles the version. An agent that listens anew after a fork loses the
    /// connections that it has not accepted, so what ends before the answer is tried again.
    fn open(
        &self,
        operation: &'static str,
        generation: Generation,
        deadline: Instant,
    ) -> Result<Channel, Error> {
        const PAUSE: Duration = Duration::from_millis(1);
        loop {
            match self.try_open(operation, generation, deadline) {
                Err(error)
                    if error.kind() == ErrorKind::Disconnected
                        && Instant::now() + PAUSE < deadline =>
                {
                    thread::sleep(PAUSE);
                }
                result => return result,
            }
        }
    }

    fn try_open(
        &self,
        operation: &'static str,
        generation: Generation,
        deadline: Instant,
    ) -> Result<Channel, Error> {
        // Whoever makes the stream has tried until the deadline.
        let failed = |error| Error::because(ErrorKind::TimedOut, operation, error);
        let stream = self.way.connect(deadline).map_err(failed)?;
        let channel = Channel::new(operation, stream);
        let hello = Request::Hello {
            oldest: OLDEST_VERSION,
            newest: VERSION,
            generation,
        };
        channel.request(&hello, deadline)?;
        match channel.reply(deadline)? {
            Reply::Hello { version, .. } if (OLDEST_VERSION..=VERSION).contains(&version) => {
                Ok(channel)
            }
            _ => Err(channel.error(ErrorKind::Untrustworthy)),
        }
    }

    /// Starts an operation.
    fn begin(
        &self,
        operation: &'static str,
        request: &Request,
        deadline: Instant,
    ) -> Result<Channel, Error> {
        let channel = self.open(operation, self.generation, deadline)?;
        channel.request(request, deadline)?;
        Ok(channel)
    }

    /// A request with one answer.
    fn ask<T>(
        &self,
        operation: &'static str,
        request: &Request,
        deadline: Instant,
        take: impl FnOnce(Reply) -> Option<T>,
    ) -> Result<T, Error> {
        let channel = self.begin(operation, request, deadline)?;
        let reply = channel.reply(deadline)?;
        take(reply).ok_or_else(|| channel.error(ErrorKind::Untrustworthy))
    }

    /// A request that is only done or not.
    fn order(
        &self,
        operation: &'static str,
        request: &Request,
        deadline: Instant,
    ) -> Result<(), Error> {
        let done = |reply| matches!(reply, Reply::Done {}).then_some(());
        self.ask(operation, request, deadline, done)
    }

    /// Gives the guest its identity and waits until it is ready. Done again for the same
    /// generation it returns the report of the first time. Steps that failed stand in the report
    /// and are no error.
    ///
    /// # Errors
    /// `Invalid` for an identity without generation or with too long a seed.
    pub fn identify(&self, identity: &Identity, deadline: Instant) -> Result<Report, Error> {
        let operation = "give the guest its identity";
        let channel = self.open(operation, identity.generation, deadline)?;
        let request = Request::Identify {
            identity: identity.clone(),
        };
        channel.request(&request, deadline)?;
        match channel.reply(deadline)? {
            Reply::Ready { report } if report.generation == identity.generation => Ok(report),
            _ => Err(channel.error(ErrorKind::Untrustworthy)),
        }
    }

    /// Changes settings outside of a fork. Steps that failed stand in the report.
    ///
    /// # Errors
    /// Those of any call.
    pub fn configure(&self, settings: &Settings, deadline: Instant) -> Result<Report, Error> {
        let settings = settings.clone();
        let request = Request::Configure { settings };
        self.ask(
            "change the guest's settings",
            &request,
            deadline,
            |reply| match reply {
                Reply::Ready { report } => Some(report),
                _ => None,
            },
        )
    }

    /// Figures of the guest, with the file systems that the paths lie on; `/` for none.
    ///
    /// # Errors
    /// `NotFound` for a path that is not there.
    pub fn metrics(&self, paths: &[&str], deadline: Instant) -> Result<Metrics, Error> {
        let paths = paths.iter().map(|path| path.as_bytes().to_vec()).collect();
        let request = Request::Metrics { paths };
        self.ask(
            "read the guest's figures",
            &request,
            deadline,
            |reply| match reply {
                Reply::Metrics { metrics } => Some(metrics),
                _ => None,
            },
        )
    }

    /// Sets the guest's wall clock, in nanoseconds since 1970.
    ///
    /// # Errors
    /// `Denied` where the agent may not.
    pub fn set_clock(&self, unix_ns: u64, deadline: Instant) -> Result<(), Error> {
        self.order(
            "set the guest's clock",
            &Request::SetClock { unix_ns },
            deadline,
        )
    }

    /// Has the guest write everything to its disks.
    ///
    /// # Errors
    /// Those of any call.
    pub fn sync(&self, deadline: Instant) -> Result<(), Error> {
        self.order("flush the guest's disks", &Request::Sync {}, deadline)
    }

    /// Has the guest stop. It may take some seconds more to end its processes.
    ///
    /// # Errors
    /// `WrongState` where the agent can't stop the guest.
    pub fn power(&self, action: PowerAction, deadline: Instant) -> Result<(), Error> {
        self.order("stop the guest", &Request::Power { action }, deadline)
    }

    /// Sees whether the agent is there.
    ///
    /// # Errors
    /// Those of any call.
    pub fn ping(&self, deadline: Instant) -> Result<(), Error> {
        self.order("reach the guest", &Request::Ping {}, deadline)
    }
}
