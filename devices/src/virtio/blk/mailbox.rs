//! How the device speaks to its I/O thread, such that the process may be forked.
//!
//! Commands are a locked queue and an eventfd that counts them, replies a locked cell and an eventfd,
//! and the eventfd is written after the lock was let go: when a reply has been heard, the I/O thread holds no lock and takes none until it gets
//! the next command, for it goes straight back to waiting in the kernel. (A channel would not do:
//! its sender may still hold the channel's lock when the receiver goes on.)

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

/// What the I/O thread is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Take no more requests, end those in flight, answer with the queues' state, then wait for
    /// the next command.
    Quiesce,
    /// Go on, and look at every queue.
    Resume,
    /// End those in flight and leave.
    Stop,
}

/// What it answers to [`Command::Quiesce`]; nobody waits for an answer to the others.
#[derive(Debug)]
pub(super) enum Reply {
    Quiesced(Vec<QueueState>),
    /// The thread has ended. It says so whenever it ends.
    Gone,
}

#[derive(Debug)]
pub(super) struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    command_event: EventFd,
    reply: Mutex<Option<Reply>>,
    reply_event: EventFd,
}

fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for the event. It is a blocking eventfd with one reader.
fn wait(event: &EventFd) -> io::Result<()> {
    loop {
        match event.read() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            // At most a resume and the quiesce or stop after it wait at a time.
            commands: Mutex::new(VecDeque::with_capacity(4)),
            command_event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_SEMAPHORE)?,
            reply: Mutex::default(),
            reply_event: EventFd::new(libc::EFD_CLOEXEC)?,
        })
    }

    /// Tells the thread something, without waiting.
    pub(super) fn tell(&self, command: Command) -> io::Result<()> {
        lock(&self.commands).push_back(command);
        self.command_event.write(1)
    }

    /// Tells the thread something and waits for its answer.
    pub(super) fn ask(&self, command: Command) -> io::Result<Reply> {
        self.tell(command)?;
        wait(&self.reply_event)?;
        let reply = lock(&self.reply).take().unwrap_or(Reply::Gone);
        if matches!(reply, Reply::Gone) {
            // For whoever asks again.
            self.answer(Reply::Gone)?;
        }
        Ok(reply)
    }

    /// Readable when there is a command.
    pub(super) fn command_fd(&self) -> RawFd {
        self.command_event.as_raw_fd()
    }

    /// Waits for a command; the I/O thread's side.
    pub(super) fn next_command(&self) -> io::Result<Command> {
        wait(&self.command_event)?;
        Ok(lock(&self.commands).pop_front().unwrap_or(Command::Stop))
    }

    /// Answers; the I/O thread's side.
    pub(super) fn answer(&self, reply: Reply) -> io::Result<()> {
        // Nothing may be freed after the write, which the other side takes as "holds no lock".
        let old = lock(&self.reply).replace(reply);
        drop(old);
        self.reply_event.write(1)
    }
}
