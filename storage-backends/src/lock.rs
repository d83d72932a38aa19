//! Locks on the files of a store.
//!
//! A lock is an flock(2): it belongs to the open file description, so it excludes other processes
//! and other opens within this one alike, and it goes when the last descriptor is closed. It is
//! never released explicitly: after a fork(2) parent and child share it, and an unlock by one would
//! take it from the other.

use std::fs::File;
use std::io;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How many may hold a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// One alone.
    Exclusive,
    /// Any number, while nobody holds it exclusively.
    Shared,
}

/// Takes the lock on `file` without waiting, and tells whether it got it.
pub(crate) fn try_lock(file: &File, lock: Lock) -> io::Result<bool> {
    let operation = match lock {
        Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
        Lock::Shared => FlockOperation::NonBlockingLockShared,
    };
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
