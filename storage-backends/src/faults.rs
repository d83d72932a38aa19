//! Storage that fails on purpose, for the tests of whatever is built on it.
//!
//! [`Faults`] stands between a user and a real backend, at the trait's boundary. It fails the
//! operations it is told to, and it can hold writes back as a disk's write cache does, so that
//! [`cut_power`](Faults::cut_power) loses what was never flushed.
//!
//! ```no_run
//! use offshoot_storage::faults::{Fault, Faults, Operation};
//!
//! # fn f(backend: std::sync::Arc<dyn offshoot_storage::StorageBackend>) {
//! let faults = Faults::new();
//! let backend = faults.wrap(backend);
//! faults.fail(Operation::Write, 3, Fault::StorageFull); // the fourth write from now
//! # }
//! ```

mod backend;
mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use backend::FaultyBackend;
use volume::FaultyVolume;

use crate::conformance::Rng;
use crate::{Error, LayerName, StorageBackend, Volume, VolumeName};

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Operation {
    /// [`Volume::read_vectored_at`].
    Read,
    /// [`Volume::write_vectored_at`]. One that fails has written the first half of its range.
    Write,
    /// [`Volume::flush`].
    Flush,
    /// [`Volume::discard`].
    Discard,
    /// [`Volume::write_zeroes`].
    WriteZeroes,
    /// [`StorageBackend::create`] and [`StorageBackend::create_filled`].
    Create,
    /// [`StorageBackend::open`] and [`StorageBackend::open_layer`].
    Open,
    /// [`StorageBackend::freeze`].
    Freeze,
    /// [`StorageBackend::sync_layer`].
    SyncLayer,
    /// [`StorageBackend::fork`].
    Fork,
    /// [`StorageBackend::flatten`].
    Flatten,
    /// [`StorageBackend::delete`] and [`StorageBackend::delete_layer`].
    Delete,
}

/// How it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The device reports an error (EIO).
    Io,
    /// No space is left (ENOSPC).
    StorageFull,
    /// The power goes off before the operation is done; this and every later one fails. Which
    /// unflushed sectors have reached the disk follows from the seed.
    PowerCut {
        /// Where chance comes from.
        seed: u64,
    },
}

impl Fault {
    fn error(self) -> io::Error {
        match self {
            Self::Io => io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()),
            Self::StorageFull => {
                io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error())
            }
            Self::PowerCut { .. } => PowerIsOff.into(),
        }
    }
}

/// Why everything fails after a power cut.
#[derive(Debug, thiserror::Error)]
#[error("the power is off")]
struct PowerIsOff;

impl From<PowerIsOff> for io::Error {
    fn from(e: PowerIsOff) -> Self {
        io::Error::other(e)
    }
}

/// The control over a backend's or a volume's faults. Clones control the same.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// For each operation: how many there were.
    counts: BTreeMap<Operation, u64>,
    /// What fails when that many have gone before.
    planned: BTreeMap<(Operation, u64), Fault>,
    write_back: bool,
    power_is_off: bool,
    /// Volumes that may hold writes back.
    open: Vec<Weak<FaultyVolume>>,
    /// Layers that were frozen but not synced, and where.
    unsynced: BTreeSet<LayerName>,
    stores: Vec<Weak<dyn StorageBackend>>,
}

impl Faults {
    /// No faults yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The backend, failing as told. Its volumes offer no [`Volume::raw_file`]: their I/O cannot
    /// go past the faults.
    pub fn wrap(&self, backend: Arc<dyn StorageBackend>) -> Arc<dyn StorageBackend> {
        self.state().stores.push(Arc::downgrade(&backend));
        Arc::new(FaultyBackend::new(backend, self.clone()))
    }

    /// One volume, failing as told.
    pub fn wrap_volume(&self, volume: Arc<dyn Volume>) -> Arc<dyn Volume> {
        let volume = Arc::new(FaultyVolume::new(volume, self.clone()));
        let mut state = self.state();
        state.open.retain(|open| open.strong_count() > 0);
        state.open.push(Arc::downgrade(&volume));
        volume
    }

    /// Makes one `operation` fail: the next one after `skip` more have gone well.
    pub fn fail(&self, operation: Operation, skip: u64, fault: Fault) {
        let mut state = self.state();
        let at = state.counts.get(&operation).copied().unwrap_or(0) + skip;
        state.planned.insert((operation, at), fault);
    }

    /// How many times `operation` has been tried.
    #[must_use]
    pub fn count(&self, operation: Operation) -> u64 {
        self.state().counts.get(&operation).copied().unwrap_or(0)
    }

    /// From now on writes are held back in memory until a flush, a freeze, or the volume's end.
    pub fn hold_writes_back(&self) {
        self.state().write_back = true;
    }

    /// Cuts the power now: of what is held back each sector reaches the disk or not, as `seed`
    /// has it, and so does each layer that was not synced; then everything fails. What is left can
    /// be looked at by opening the real backend once all handles are dropped.
    pub fn cut_power(&self, seed: u64) {
        let mut rng = Rng::new(seed);
        let (open, stores, unsynced) = {
            let mut state = self.state();
            if std::mem::replace(&mut state.power_is_off, true) {
                return;
            }
            (
                std::mem::take(&mut state.open),
                std::mem::take(&mut state.stores),
                std::mem::take(&mut state.unsynced),
            )
        };
        for volume in open.iter().filter_map(Weak::upgrade) {
            volume.lose(&mut rng);
        }
        for layer in unsynced {
            if rng.below(2) == 0 {
                for store in stores.iter().filter_map(Weak::upgrade) {
                    // One that a volume depends on already stays: whole is as good as absent.
                    if let Err(error) = store.delete_layer(&layer) {
                        tracing::debug!(%layer, %error, "an unsynced layer stays");
                    }
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an operation and says how it fails, if it is to.
    fn next(&self, operation: Operation) -> Result<(), Fault> {
        let fault = {
            let mut state = self.state();
            if state.power_is_off {
                return Err(Fault::PowerCut { seed: 0 });
            }
            let count = state.counts.entry(operation).or_default();
            let at = *count;
            *count += 1;
            state.planned.remove(&(operation, at))
        };
        match fault {
            None => Ok(()),
            Some(fault) => {
                if let Fault::PowerCut { seed } = fault {
                    self.cut_power(seed);
                }
                Err(fault)
            }
        }
    }

    /// The same for an operation of the backend.
    fn next_on(
        &self,
        operation: Operation,
        verb: &'static str,
        object: &dyn std::fmt::Display,
    ) -> Result<(), Error> {
        self.next(operation)
            .map_err(|fault| Error::io(verb, object, fault.error()))
    }

    fn holds_writes_back(&self) -> bool {
        self.state().write_back
    }

    fn is_off(&self) -> bool {
        self.state().power_is_off
    }

    /// Sends what is held back for a volume to the real one, as a backend must before a freeze.
    fn send(&self, volume: &VolumeName) -> io::Result<()> {
        let open: Vec<_> = self.state().open.iter().filter_map(Weak::upgrade).collect();
        for volume in open.iter().filter(|open| open.name() == volume) {
            volume.send()?;
        }
        Ok(())
    }
}
