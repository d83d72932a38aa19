//! Requests and replies, from several threads over one channel.
//!
//! Whoever waits reads for all: one thread at a time takes messages off the channel, files them and
//! wakes the others. No thread of its own is needed, and a worker that never answers costs those that
//! wait for it their time-outs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::exits::ExitReason;
use crate::sync::lock;
use crate::worker::channel::Channel;
use crate::worker::message::{Answer, Ask, Request, Told, WireError};
use crate::worker::plan::Stored;

/// How long the worker may take to make room for a request.
const SEND: Duration = Duration::from_secs(10);
/// The most messages besides replies that are kept for whoever asks for them; older ones go first.
const MAX_KEPT: usize = 8;

#[derive(Debug)]
pub(super) struct Connection {
    channel: Channel,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a request is sent, so that tags go out in order.
    sending: Mutex<u32>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether some thread is reading.
    reading: bool,
    /// The channel is of no use any more.
    closed: bool,
    /// Replies that somebody waits for; `None` until they come.
    replies: BTreeMap<u32, Option<std::result::Result<Answer, WireError>>>,
    exit: Option<ExitReason>,
    /// Everything else.
    others: std::collections::VecDeque<Told>,
}

impl Connection {
    pub(super) fn new(channel: Channel) -> Self {
        Self {
            channel,
            state: Mutex::default(),
            changed: Condvar::new(),
            sending: Mutex::default(),
        }
    }

    /// Asks and waits for the answer.
    pub(super) fn call(
        &self,
        ask: Ask,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Answer> {
        let deadline = Instant::now() + timeout;
        let tag = self.send(ask, fds, true)?;
        let reply = self.wait_for(deadline, |state| {
            let ready = state.replies.get(&tag).is_some_and(Option::is_some);
            ready
                .then(|| state.replies.remove(&tag).flatten())
                .flatten()
        });
        if reply.is_err() {
            lock(&self.state).replies.remove(&tag);
        }
        reply?.map_err(Error::from)
    }

    /// Asks, and leaves the answer alone.
    pub(super) fn tell(&self, ask: Ask) -> Result<()> {
        self.send(ask, &[], false).map(drop)
    }

    fn send(&self, ask: Ask, fds: &[BorrowedFd<'_>], wanted: bool) -> Result<u32> {
        let mut last = lock(&self.sending);
        *last = last.wrapping_add(1);
        let tag = *last;
        if wanted {
            lock(&self.state).replies.insert(tag, None);
        }
        self.channel
            .send(&Request { tag, ask }, fds, SEND)
            .map_err(|error| {
                lock(&self.state).replies.remove(&tag);
                match error.kind() {
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => gone(),
                    io::ErrorKind::TimedOut => timed_out(),
                    _ => Error::io("cannot send a request to the worker", error),
                }
            })?;
        Ok(tag)
    }

    /// Waits for a forked child to run. When it died instead, and had made `makes` by then, they are
    /// added to `orphaned`; a child that fails cleans up by itself. (What it made is what it was told
    /// to make: a child has no say in what is deleted.)
    pub(super) fn wait_born(
        &self,
        deadline: Instant,
        makes: Vec<Stored>,
        orphaned: &mut Vec<Stored>,
    ) -> Result<()> {
        let mut made = false;
        loop {
            match self.next(deadline) {
                Ok(Told::Made) => made = true,
                Ok(Told::Born(Ok(_))) => return Ok(()),
                Ok(Told::Born(Err(error))) => return Err(error.into()),
                Ok(_) => {
                    return Err(Error::new(
                        ErrorKind::System,
                        "a forked child says something else than that it runs",
                    ));
                }
                Err(error) => {
                    if made {
                        orphaned.extend(makes);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Waits for the next message that is no reply.
    pub(super) fn next(&self, deadline: Instant) -> Result<Told> {
        self.wait_for(deadline, |state| state.others.pop_front())
    }

    /// Waits for the end of the guest, `Some(None)` being that of the worker.
    pub(super) fn wait_exit(&self, deadline: Instant) -> Option<Option<ExitReason>> {
        match self.wait_for(deadline, |state| state.exit.clone()) {
            Ok(reason) => Some(Some(reason)),
            Err(error) if error.kind() == ErrorKind::TimedOut => None,
            Err(_) => Some(None),
        }
    }

    /// Waits until `find` finds something.
    fn wait_for<T>(
        &self,
        deadline: Instant,
        mut find: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = find(&mut state) {
                return Ok(found);
            }
            if state.closed {
                return Err(gone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out());
            }
            if state.reading {
                (state, _) = self
                    .changed
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.reading = true;
            drop(state);
            let read = self.read(left);
            state = lock(&self.state);
            state.reading = false;
            match read {
                Ok(Some(told)) => state.file(told),
                Ok(None) => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::UnexpectedEof {
                        tracing::error!(%error, "a worker is given up");
                    }
                    state.closed = true;
                }
            }
            self.changed.notify_all();
        }
    }

    /// Takes one message; `None` when there was none for so long.
    fn read(&self, timeout: Duration) -> io::Result<Option<Told>> {
        if !self.channel.wait_readable(timeout)? {
            return Ok(None);
        }
        match self.channel.try_receive::<Told>() {
            Ok(Some(received)) => Ok(Some(received.message)),
            Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl State {
    fn file(&mut self, told: Told) {
        match told {
            Told::Reply(tag, reply) => {
                // One that nobody waits for (any more) is of no interest.
                if let Some(place) = self.replies.get_mut(&tag) {
                    *place = Some(reply);
                }
            }
            Told::Exited(reason) => {
                self.exit.get_or_insert(reason);
            }
            Told::ChildEnded { pid, status } => {
                tracing::debug!(pid, status, "a forked process has ended");
            }
            other => {
                if self.others.len() == MAX_KEPT {
                    self.others.pop_front();
                }
                self.others.push_back(other);
            }
        }
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Ended, "the worker is gone")
}

fn timed_out() -> Error {
    Error::new(ErrorKind::TimedOut, "the worker did not answer in time")
}
