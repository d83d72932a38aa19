//! What a drive's I/O thread does: it owns the queues while the drive is active.
//!
//! It sleeps in `epoll_wait` on the queues' eventfds, the engine's and the mailbox's. It alone
//! touches the rings, takes requests, writes status bytes and raises the interrupt; the engine
//! moves the data.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::engine::{Done, Engine};
use super::io_thread::Parts;
use super::mailbox::{Command, Mailbox, Reply};
use super::request::{self, Action, Op, Request, Rules, Status};
use crate::GuestRam;
use crate::virtio::{DeviceError, Interrupt};

/// Guest bytes that may be in flight at once (and one request more), and those that one round
/// fills by itself.
const MAX_BYTES_IN_FLIGHT: u64 = 64 << 20;

/// Epoll data of what is not a queue; queues have their index.
const COMMAND: u64 = u64::MAX;
const ENGINE: u64 = u64::MAX.wrapping_sub(1);

struct WorkerQueue {
    queue: Queue,
    /// In the epoll set for as long as it is open.
    _event: Arc<EventFd>,
    /// There may be requests in the ring that nobody will notify us of.
    look: bool,
    /// Entries were put into the used ring since the driver was last told.
    used: bool,
}

/// A request that an engine has.
struct Pending {
    queue: usize,
    request: Request,
    op: Arc<Op>,
}

enum Mode {
    Running,
    Quiescing,
    Stopping,
}

/// The thread's own.
pub(super) struct Worker {
    memory: Arc<GuestRam>,
    queues: Vec<WorkerQueue>,
    interrupt: Interrupt,
    rules: Rules,
    engine: Box<dyn Engine>,
    write_through: bool,
    pub(super) needs_reset: Arc<AtomicBool>,
    parked: bool,
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    mode: Mode,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    bytes_in_flight: u64,
    done: Vec<Done>,
    /// The queue that was looked at first in the last round.
    first: usize,
}

impl Worker {
    pub(super) fn new(parts: Parts, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, events: EventSet, data: u64| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
        };
        add(mailbox.command_fd(), EventSet::IN, COMMAND)?;
        // Edge-triggered: a write to an eventfd is an edge, so that its counter need not be read;
        // so is a new result in a ring, and all results are taken before each wait.
        for fd in parts.engine.wait_fd().into_iter().flatten() {
            add(fd, EventSet::IN | EventSet::EDGE_TRIGGERED, ENGINE)?;
        }
        for (index, (queue, event)) in parts.queues.iter().enumerate() {
            if queue.ready() {
                let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
                add(event.as_raw_fd(), events, index as u64)?;
            }
        }
        Ok(Self {
            memory: parts.memory,
            queues: parts
                .queues
                .into_iter()
                .map(|(queue, event)| WorkerQueue {
                    look: queue.ready(),
                    queue,
                    _event: event,
                    used: false,
                })
                .collect(),
            interrupt: parts.interrupt,
            rules: parts.rules,
            engine: parts.engine,
            write_through: parts.write_through,
            needs_reset: parts.needs_reset,
            parked: parts.parked,
            mailbox,
            epoll,
            mode: Mode::Running,
            pending: (0..parts.slots).map(|_| None).collect(),
            free: (0..parts.slots).rev().collect(),
            bytes_in_flight: 0,
            done: Vec::new(),
            first: 0,
        })
    }

    /// Runs until told to stop.
    pub(super) fn run(&mut self) {
        if self.parked {
            self.mode = Mode::Quiescing;
        }
        if let Err(error) = self.run_until_stopped() {
            tracing::error!(%error, "a drive's I/O thread fails");
            self.give_up();
        }
    }

    fn run_until_stopped(&mut self) -> io::Result<()> {
        let mut announce = !self.parked;
        loop {
            let soon = self.turn();
            match self.mode {
                Mode::Quiescing if self.is_idle() => {
                    self.park(announce)?;
                    announce = true;
                }
                Mode::Stopping if self.is_idle() => return Ok(()),
                _ => self.sleep(soon)?,
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.pending.len()
    }

    /// With nothing in flight: says so, and waits for commands until one is not to quiesce.
    fn park(&mut self, mut announce: bool) -> io::Result<()> {
        self.engine.park();
        loop {
            if announce {
                let states = self.queues.iter().map(|q| q.queue.state()).collect();
                self.mailbox.answer(Reply::Quiesced(states))?;
            }
            match self.mailbox.next_command()? {
                Command::Quiesce => announce = true,
                Command::Resume => {
                    self.mode = Mode::Running;
                    self.look_everywhere();
                    return Ok(());
                }
                Command::Stop => {
                    self.mode = Mode::Stopping;
                    return Ok(());
                }
            }
        }
    }

    fn look_everywhere(&mut self) {
        for queue in &mut self.queues {
            queue.look = queue.queue.ready();
        }
    }

    /// Waits for something to do.
    fn sleep(&mut self, soon: Soon) -> io::Result<()> {
        let timeout = match soon {
            Soon::Now => 0,
            Soon::Later => 1,
            Soon::WhenCalled => -1,
        };
        let mut events = [EpollEvent::default(); 8];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in events.iter().take(count) {
            match event.data() {
                ENGINE => {}
                COMMAND => match self.mailbox.next_command()? {
                    Command::Quiesce => self.mode = Mode::Quiescing,
                    Command::Stop => self.mode = Mode::Stopping,
                    Command::Resume => self.look_everywhere(),
                },
                index => {
                    let index = usize::try_from(index).unwrap_or(usize::MAX);
                    if let Some(queue) = self.queues.get_mut(index) {
                        queue.look = true;
                    }
                }
            }
        }
        Ok(())
    }

    /// One round: what has ended is used, what is available is begun, the driver is told.
    fn turn(&mut self) -> Soon {
        self.complete();
        let mut more = false;
        if matches!(self.mode, Mode::Running) && !self.needs_reset.load(Ordering::Acquire) {
            // Another one is first each time, for there may be places for some of them only.
            let count = self.queues.len();
            self.first = self.first.wrapping_add(1).checked_rem(count).unwrap_or(0);
            for index in (0..count).cycle().skip(self.first).take(count) {
                match self.take_requests(index) {
                    Ok(left) => more |= left,
                    Err(error) => self.fail(&error),
                }
            }
        }
        let mut again = self.engine.submit();
        // Much of what is in the page cache is done by now; what is not may go on.
        let ended = self.complete();
        again |= self.engine.submit();
        self.notify();
        let waits = ended && self.queues.iter().any(|q| q.look);
        if more || waits {
            Soon::Now
        } else if again {
            Soon::Later
        } else {
            Soon::WhenCalled
        }
    }

    /// Takes requests from one queue: at most as many as it has entries, so that commands and
    /// completions are seen to whatever the driver does. Returns whether more may be taken at
    /// once; what has to wait for a place leaves `look` set.
    fn take_requests(&mut self, index: usize) -> Result<bool, DeviceError> {
        let Some(this) = self.queues.get_mut(index) else {
            return Ok(false);
        };
        if !this.look {
            return Ok(false);
        }
        let memory = Arc::clone(&self.memory);
        let size = this.queue.size();
        this.queue.disable_notification(&*memory)?;
        let mut filled = 0_u64;
        for _ in 0..size {
            if filled >= MAX_BYTES_IN_FLIGHT {
                break;
            }
            if self.free.is_empty()
                || (self.bytes_in_flight >= MAX_BYTES_IN_FLIGHT && !self.is_idle())
            {
                return Ok(false);
            }
            let Some(this) = self.queues.get_mut(index) else {
                return Ok(false);
            };
            let Some(chain) = this.queue.iter(&*memory)?.next() else {
                // Virtio 1.2, 2.7.10: ask to be notified, then look once more.
                if this.queue.enable_notification(&*memory)? {
                    this.queue.disable_notification(&*memory)?;
                    continue;
                }
                this.look = false;
                return Ok(false);
            };
            let request = request::parse(chain, &memory, size, &self.rules)?;
            filled = self.begin(index, request)?.saturating_add(filled);
        }
        Ok(true)
    }

    /// Begins a request, or ends it when it needs no engine. Returns how many bytes it filled.
    fn begin(&mut self, queue: usize, mut request: Request) -> Result<u64, DeviceError> {
        request.surplus.fill(&self.memory, &[]).map_err(memory)?;
        let mut filled = request.surplus.len();
        match std::mem::replace(&mut request.action, Action::Refuse(Status::IoError, None)) {
            Action::Start(op) => {
                let Some(slot) = self.free.pop() else {
                    // The caller has looked.
                    self.finish(queue, &request, Status::IoError, None)?;
                    return Ok(filled);
                };
                let op = Arc::new(op);
                self.bytes_in_flight = self.bytes_in_flight.saturating_add(op.bytes());
                let durable = self.write_through && op.is_change();
                if matches!(*op, Op::Flush) && self.rules.read_only {
                    // Nothing was ever written.
                    self.done.push(Done {
                        slot,
                        result: Ok(()),
                    });
                } else {
                    self.engine.start(slot, Arc::clone(&op), durable);
                }
                if let Some(place) = self.pending.get_mut(slot) {
                    *place = Some(Pending { queue, request, op });
                }
            }
            Action::Answer(spans, bytes) => {
                spans.fill(&self.memory, &bytes).map_err(memory)?;
                filled = filled.saturating_add(spans.len());
                self.finish(queue, &request, Status::Ok, Some(spans.len()))?;
            }
            Action::Refuse(status, spans) => {
                if let Some(spans) = &spans {
                    spans.fill(&self.memory, &[]).map_err(memory)?;
                    filled = filled.saturating_add(spans.len());
                }
                self.finish(queue, &request, status, spans.map(|spans| spans.len()))?;
            }
        }
        Ok(filled)
    }

    /// Uses what the engine has ended. Returns whether there was anything.
    fn complete(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        let any = !done.is_empty();
        for Done { slot, result } in done.drain(..) {
            let Some(pending) = self.pending.get_mut(slot).and_then(Option::take) else {
                tracing::error!(slot, "an engine ended what was not begun");
                continue;
            };
            self.free.push(slot);
            self.bytes_in_flight = self.bytes_in_flight.saturating_sub(pending.op.bytes());
            if let Err(error) = self.use_result(&pending, result) {
                self.fail(&error);
            }
        }
        self.done = done;
        any
    }

    fn use_result(&mut self, pending: &Pending, result: io::Result<()>) -> Result<(), DeviceError> {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                tracing::warn!(%error, op = op_name(&pending.op), "block I/O failed");
                Status::IoError
            }
        };
        let filled = match &*pending.op {
            Op::Read { data, .. } => {
                if status != Status::Ok {
                    data.fill(&self.memory, &[]).map_err(memory)?;
                }
                data.len()
            }
            _ => 0,
        };
        self.finish(pending.queue, &pending.request, status, Some(filled))
    }

    /// Writes the status and puts the request into the used ring. `filled` is how many bytes were
    /// written before the surplus, `None` when none were and some should have been.
    fn finish(
        &mut self,
        queue: usize,
        request: &Request,
        status: Status,
        filled: Option<u64>,
    ) -> Result<(), DeviceError> {
        // Its driver must reset the device and get all buffers back by that.
        if self.needs_reset.load(Ordering::Acquire) {
            return Ok(());
        }
        self.memory
            .write_obj(status as u8, request.status)
            .map_err(memory)?;
        // Virtio 1.2, 2.7.8.2: no more is reported than what was written from the first byte on.
        let written = filled
            .and_then(|n| n.checked_add(request.surplus.len())?.checked_add(1))
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0);
        if let Some(this) = self.queues.get_mut(queue) {
            this.queue.add_used(&*self.memory, request.head, written)?;
            this.used = true;
        }
        Ok(())
    }

    /// Tells the driver of what was used, once for all of it and only if it wants to know
    /// (virtio 1.2, 2.7.7).
    fn notify(&mut self) {
        let mut wanted = false;
        for this in self.queues.iter_mut().filter(|q| q.used) {
            this.used = false;
            // Whoever cannot be asked is told.
            wanted |= this.queue.needs_notification(&*self.memory).unwrap_or(true);
        }
        if wanted {
            raise(self.interrupt.used_buffer());
        }
    }

    /// The driver broke the specification: from now on nothing is taken from its rings
    /// (virtio 1.2, 2.1.2).
    fn fail(&mut self, error: &DeviceError) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            // Not a warning: a guest can have it as often as it likes.
            tracing::info!(%error, "a drive needs a reset by its driver");
            raise(self.interrupt.config_change());
        }
    }

    /// The host's side failed: the device needs a reset, and so do those who wait for us.
    fn give_up(&mut self) {
        self.needs_reset.store(true, Ordering::Release);
        raise(self.interrupt.config_change());
    }
}

enum Soon {
    Now,
    Later,
    WhenCalled,
}

fn op_name(op: &Op) -> &'static str {
    match op {
        Op::Read { .. } => "read",
        Op::Write { .. } => "write",
        Op::Flush => "flush",
        Op::Discard { .. } => "discard",
        Op::WriteZeroes { .. } => "write zeroes",
    }
}

fn memory(source: vm_memory::GuestMemoryError) -> DeviceError {
    DeviceError::Queue(virtio_queue::Error::GuestMemory(source))
}

/// A full eventfd has been raised already.
fn raise(result: io::Result<()>) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::WouldBlock
    {
        tracing::error!(%error, "cannot raise a drive's interrupt");
    }
}
