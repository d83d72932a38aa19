//! Commands that run: their output as it comes, their input, and those that were started before.

use std::sync::Arc;
use std::time::Instant;

use offshoot_protocol::agent::frame::MAX_RAW;
use offshoot_protocol::agent::{JobId, JobInfo, RawKind, Reply, Request, WindowSize};

use super::channel::{Channel, Incoming};
use super::{Agent, Command, Exit};
use crate::{Error, ErrorKind};

/// What comes from a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Of its standard output, or what its terminal shows.
    Stdout(Vec<u8>),
    /// Of its standard error.
    Stderr(Vec<u8>),
    /// It has ended, and all that it wrote has come.
    Exited(Exit),
}

/// A connection to a command. Dropped, it kills a command that was started through it, unless
/// that is detached.
#[derive(Debug)]
pub struct Process {
    channel: Arc<Channel>,
    job: JobId,
    pid: u32,
    from: u64,
}

impl Process {
    /// The command's number, for [`Agent::signal`] and [`Agent::attach`].
    #[must_use]
    pub fn job(&self) -> JobId {
        self.job
    }

    /// Its first process in the guest, which is also its process group.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The place in its output that the first event starts at.
    #[must_use]
    pub fn from(&self) -> u64 {
        self.from
    }

    /// Waits for what comes next. As long as this is not called the command waits too, once what
    /// lies between is full. May be called again after `TimedOut`.
    ///
    /// # Errors
    /// `TimedOut` when nothing comes until the deadline.
    pub fn next(&self, deadline: Instant) -> Result<Event, Error> {
        match self.channel.next(deadline)? {
            Incoming::Raw(RawKind::Stdout, bytes) => Ok(Event::Stdout(bytes)),
            Incoming::Raw(RawKind::Stderr, bytes) => Ok(Event::Stderr(bytes)),
            Incoming::Reply(Reply::Exited { exit }) => Ok(Event::Exited(exit.into())),
            _ => Err(self.channel.error(ErrorKind::Untrustworthy)),
        }
    }

    /// Its standard input, to be used from any thread. Whoever attaches to a command can write to
    /// it too.
    #[must_use]
    pub fn input(&self) -> Input {
        Input {
            channel: Arc::clone(&self.channel),
            broken: false,
        }
    }

    /// Ends the connection, whoever else uses it.
    pub(super) fn hang_up(&self) {
        self.channel.close();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// A command's standard input.
#[derive(Debug)]
pub struct Input {
    channel: Arc<Channel>,
    broken: bool,
}

impl Input {
    fn send(&mut self, kind: RawKind, bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        if self.broken {
            return Err(self.channel.error(ErrorKind::Disconnected));
        }
        let sent = self.channel.raw(kind, bytes, deadline);
        self.broken = sent.is_err();
        sent
    }

    /// Writes all bytes. Waits while the command does not take them. After an error nothing more
    /// can be written: it is not known how much has been.
    ///
    /// # Errors
    /// `TimedOut`, or `Disconnected` when the command has ended.
    pub fn write(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        bytes
            .chunks(MAX_RAW)
            .try_for_each(|part| self.send(RawKind::Data, part, deadline))
    }

    /// Ends the input: the command reads its end, a terminal gets Control-D.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn end(mut self, deadline: Instant) -> Result<(), Error> {
        self.send(RawKind::End, &[], deadline)
    }
}

impl Agent {
    /// Starts a command.
    ///
    /// # Errors
    /// `NotFound` when there is no such program, directory or user.
    pub fn start(&self, command: &Command, deadline: Instant) -> Result<Process, Error> {
        let request = Request::Exec {
            command: command.exec.clone(),
        };
        let channel = self.begin("run a command", &request, deadline)?;
        match channel.reply(deadline)? {
            Reply::Started { job, pid } => Ok(Process {
                channel: Arc::new(channel),
                job,
                pid,
                from: 0,
            }),
            _ => Err(channel.error(ErrorKind::Untrustworthy)),
        }
    }

    /// Joins a command from a place in its output on (0 for all that is kept, `u64::MAX` for what
    /// comes from now on), and says what is known of it. Of a command that has ended comes what
    /// is kept, and its end.
    ///
    /// # Errors
    /// `NotFound` when there is no such command, or no longer.
    pub fn attach(
        &self,
        job: JobId,
        from: u64,
        deadline: Instant,
    ) -> Result<(Process, JobInfo), Error> {
        let request = Request::Attach { job, from };
        let channel = self.begin("attach to a command", &request, deadline)?;
        match channel.reply(deadline)? {
            Reply::Attached { info, from } if info.job == job => {
                let process = Process {
                    channel: Arc::new(channel),
                    job,
                    pid: info.pid,
                    from,
                };
                Ok((process, info))
            }
            _ => Err(channel.error(ErrorKind::Untrustworthy)),
        }
    }

    /// All commands that the agent knows, the oldest first.
    ///
    /// # Errors
    /// Those of any call.
    pub fn jobs(&self, deadline: Instant) -> Result<Vec<JobInfo>, Error> {
        self.ask(
            "list the commands",
            &Request::Jobs {},
            deadline,
            |reply| match reply {
                Reply::Jobs { jobs } => Some(jobs),
                _ => None,
            },
        )
    }

    /// Sends a signal to a command's first process, or to its whole process group.
    ///
    /// # Errors
    /// `WrongState` when it has ended, `NotFound` when there is none.
    pub fn signal(
        &self,
        job: JobId,
        signal: u8,
        group: bool,
        deadline: Instant,
    ) -> Result<(), Error> {
        let request = Request::Signal { job, signal, group };
        self.order("send a signal", &request, deadline)
    }

    /// Kills a command's process group.
    ///
    /// # Errors
    /// As [`signal`](Self::signal).
    pub fn kill(&self, job: JobId, deadline: Instant) -> Result<(), Error> {
        self.signal(job, 9, true, deadline)
    }

    /// Changes the size of a command's terminal.
    ///
    /// # Errors
    /// `Invalid` when it has none.
    pub fn resize(&self, job: JobId, size: WindowSize, deadline: Instant) -> Result<(), Error> {
        self.order(
            "resize a terminal",
            &Request::Resize { job, size },
            deadline,
        )
    }

    /// Forgets a command that has ended.
    ///
    /// # Errors
    /// `WrongState` while it runs.
    pub fn forget(&self, job: JobId, deadline: Instant) -> Result<(), Error> {
        self.order("forget a command", &Request::Forget { job }, deadline)
    }
}
