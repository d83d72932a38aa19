//! A drive's I/O thread, as the device holds it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use super::engine::Engine;
use super::mailbox::{Command, Mailbox, Reply};
use super::request::Rules;
use super::worker::Worker;
use crate::GuestRam;
use crate::virtio::{DeviceError, Interrupt};

/// What the thread is made of.
pub(super) struct Parts {
    pub(super) memory: Arc<GuestRam>,
    pub(super) queues: Vec<(Queue, Arc<EventFd>)>,
    pub(super) interrupt: Interrupt,
    pub(super) rules: Rules,
    pub(super) engine: Box<dyn Engine>,
    /// The most requests in flight.
    pub(super) slots: usize,
    /// Whether a change is to be durable before it is done.
    pub(super) write_through: bool,
    /// Set when the driver broke the specification.
    pub(super) needs_reset: Arc<AtomicBool>,
    /// Whether it starts quiesced.
    pub(super) parked: bool,
}

/// The device's handle on the thread.
#[derive(Debug)]
pub(super) struct IoThread {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    pub(super) fn spawn(name: &str, parts: Parts) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let mut worker = Worker::new(parts, Arc::clone(&mailbox))?;
        let at_end = SayGone {
            mailbox: Arc::clone(&mailbox),
            needs_reset: Arc::clone(&worker.needs_reset),
        };
        // The kernel keeps 15 bytes of it.
        let name: String = format!("blk-{name}").chars().take(15).collect();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _at_end = at_end;
            worker.run();
        })?;
        Ok(Self {
            mailbox,
            thread: Some(thread),
        })
    }

    /// Returns the queues' state once nothing is in flight and the thread waits for a command.
    pub(super) fn quiesce(&self) -> Result<Vec<QueueState>, DeviceError> {
        match self.mailbox.ask(Command::Quiesce).map_err(host)? {
            Reply::Quiesced(states) => Ok(states),
            Reply::Gone => Err(gone()),
        }
    }

    /// Has the thread go on; that takes effect a moment later, as a notification would.
    pub(super) fn resume(&self) -> Result<(), DeviceError> {
        self.mailbox.tell(Command::Resume).map_err(host)
    }
}

fn host(source: io::Error) -> DeviceError {
    DeviceError::Host {
        context: "cannot speak to a drive's I/O thread",
        source,
    }
}

fn gone() -> DeviceError {
    host(io::ErrorKind::BrokenPipe.into())
}

impl Drop for IoThread {
    /// Waits until the thread has ended, and with it every access to guest memory.
    fn drop(&mut self) {
        if let Err(error) = self.mailbox.tell(Command::Stop) {
            tracing::error!(%error, "cannot stop a drive's I/O thread");
            return;
        }
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("a drive's I/O thread panicked");
        }
    }
}

/// However the thread ends, nobody waits for its answer in vain.
struct SayGone {
    mailbox: Arc<Mailbox>,
    needs_reset: Arc<AtomicBool>,
}

impl Drop for SayGone {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.needs_reset.store(true, Ordering::Release);
        }
        // Should the write fail, the other side waits: it cannot, for the counter is small.
        let _ = self.mailbox.answer(Reply::Gone);
    }
}
