//! A process with one machine: what forks like a process.
//!
//! ```text
//!  embedder ── Worker (a handle) ══ SOCK_SEQPACKET ══ worker process: control thread, vCPUs, devices
//!                  │ fork(n)                                │ pause, capture, freeze drives
//!                  │                                        ├─ fork(2) ─→ child: builds over the memory it inherited
//!                  ├── Worker ══════════════════════════════╪═══ its own channel
//!                  │                                        └─ resume
//! ```
//! - A worker is started as a program that calls [`run_if_worker`] first thing in `main`; the embedder
//!   names the program ([`Program`]), it is never guessed.
//! - A **fork** of a running machine stops it for as long as capturing it, freezing its drives and
//!   fork(2) take; the child then builds its machine with the same code as a restore, over memory that
//!   the kernel shares between the two until one writes.
//! - A **snapshot** is such a fork whose child writes the memory out and never runs the guest.
//! - A **template** is a worker that has loaded a snapshot, mapped its memory and never runs; each
//!   sandbox is a fork of it.
//! - A worker ends when its embedder's end of the channel closes. Children have channels of their own
//!   and do not depend on the process that they were forked from.

mod channel;
mod child;
mod fork;
mod handle;
mod message;
mod plan;
mod process;
mod serve;
mod writer;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_storage::StorageBackend;

pub use handle::{Children, Exit, Program, Snapshotting, TemplateInfo, Worker};
pub use plan::{DriveFrom, MachinePlan, WorkerBindings};
pub use serve::run_if_worker;

use crate::error::Result;

/// Opens the store of a backend: kind and directory. [`offshoot_storage::open_backend`] is one; an
/// embedder with backends of its own passes its own to [`run_if_worker`].
pub type OpenBackend =
    fn(&str, &Path) -> std::result::Result<Arc<dyn StorageBackend>, offshoot_storage::Error>;

/// An instant as nanoseconds of `CLOCK_MONOTONIC`, which all processes of a host share.
fn monotonic_ns(at: Instant) -> u64 {
    let then = monotonic().saturating_sub(at.elapsed());
    u64::try_from(then.as_nanos()).unwrap_or(u64::MAX)
}

/// The time since this host's boot (`CLOCK_MONOTONIC`), to compare with what workers tell.
#[must_use]
pub fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// The stores that this process has opened.
#[derive(Debug)]
pub(crate) struct Backends {
    open: OpenBackend,
    opened: BTreeMap<(String, PathBuf), Arc<dyn StorageBackend>>,
}

impl Backends {
    fn new(open: OpenBackend) -> Self {
        Self {
            open,
            opened: BTreeMap::new(),
        }
    }

    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.opened
            .values()
            .flat_map(|backend| backend.descriptors())
    }

    /// In a forked child: see [`StorageBackend::forget_open`].
    fn forget_open(&self) {
        self.opened
            .values()
            .for_each(|backend| backend.forget_open());
    }

    fn open(&mut self, kind: &str, dir: &Path) -> Result<Arc<dyn StorageBackend>> {
        let key = (kind.to_owned(), dir.to_owned());
        if let Some(backend) = self.opened.get(&key) {
            return Ok(Arc::clone(backend));
        }
        let what = || format!("cannot open the {kind} store {}", dir.display());
        let backend = (self.open)(kind, dir).map_err(|e| crate::snapshot::storage(what(), e))?;
        self.opened.insert(key, Arc::clone(&backend));
        Ok(backend)
    }
}
