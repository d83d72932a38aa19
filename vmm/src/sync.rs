//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a holder's panic: what is behind the locks here stays consistent at every
/// point where code that could panic runs, and a machine must be able to end whatever happens.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
