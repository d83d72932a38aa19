//! How a drive's I/O is done: one small trait and its two implementations.

pub(super) mod threads;
pub(super) mod uring;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use offshoot_storage::Volume;

use super::BlkError;
use super::request::Op;

/// Which engine a drive is to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring where the volume is a raw file and the kernel lets us, worker threads otherwise.
    /// [`Blk::engine`](super::Blk::engine) tells which it became.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Worker threads.
    Threads,
}

/// The engine that a drive uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// The kernel reads and writes guest memory directly, many requests at a time.
    IoUring,
    /// Worker threads call the volume and copy to and from guest memory.
    Threads,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        })
    }
}

/// An operation that has ended.
#[derive(Debug)]
pub(super) struct Done {
    /// What its starter called it.
    pub(super) slot: usize,
    pub(super) result: io::Result<()>,
}

/// A way to do I/O. One thread owns it and is the only caller.
///
/// What is started ends in exactly one [`Done`], in any order. Dropping an engine waits for all
/// that it has begun: afterwards nothing of it touches guest memory.
pub(super) trait Engine: Send {
    /// Takes an operation, to be begun by the next [`submit`](Self::submit). At most as many are
    /// under way at a time as the engine was made for. With `durable`, a change is on stable
    /// storage before it is done.
    fn start(&mut self, slot: usize, op: Arc<Op>, durable: bool);

    /// Begins what was started. What cannot be begun ends with an error, or stays started when
    /// the reason will pass: then this returns `true` and wants to be called again soon.
    fn submit(&mut self) -> bool;

    /// Moves what has ended to `done`. Never waits. What goes on instead is begun by the next
    /// [`submit`](Self::submit).
    fn reap(&mut self, done: &mut Vec<Done>);

    /// Becomes readable when something has ended.
    fn wait_fd(&self) -> [Option<RawFd>; 2];

    /// With nothing under way: returns once no thread of the engine holds a lock or will take
    /// one before the next [`start`](Self::start).
    fn park(&mut self);
}

/// The engine for a volume, chosen and, where it needs the host's leave, opened.
#[derive(Debug)]
pub(super) enum Prepared {
    Threads,
    IoUring(Box<uring::Ring>),
}

impl Prepared {
    pub(super) fn kind(&self) -> EngineKind {
        match self {
            Self::Threads => EngineKind::Threads,
            Self::IoUring(_) => EngineKind::IoUring,
        }
    }
}

/// Chooses and opens the engine for `volume` with room for `slots` operations.
pub(super) fn prepare(
    choice: EngineChoice,
    volume: &Arc<dyn Volume>,
    slots: usize,
) -> Result<Prepared, BlkError> {
    let name = || volume.name().to_string();
    let file = match (choice, volume.raw_file()) {
        (EngineChoice::Threads, _) => return Ok(Prepared::Threads),
        (EngineChoice::IoUring, None) => return Err(BlkError::NotRaw { volume: name() }),
        (EngineChoice::Auto, None) => {
            tracing::debug!(volume = %volume.name(), "not a raw file: worker threads do its I/O");
            return Ok(Prepared::Threads);
        }
        (_, Some(file)) => file,
    };
    match (uring::Ring::open(file, slots), choice) {
        (Ok(ring), _) => Ok(Prepared::IoUring(Box::new(ring))),
        (Err(source), EngineChoice::Auto) => {
            tracing::info!(
                volume = %volume.name(),
                %source,
                "io_uring is not available: worker threads do this volume's I/O"
            );
            Ok(Prepared::Threads)
        }
        (Err(source), _) => Err(BlkError::Uring {
            volume: name(),
            source,
        }),
    }
}
