//! fork(2), and what a child does before anything else.
//!
//! # Rules of the unsafe code here
//! [`fork`] is called by the worker's control thread while every other thread of the machine is
//! parked and holds no lock (see `machine.rs`, the table of a pause), so that no lock that the
//! child may take was held at the fork; glibc's own (its allocator's, its I/O's) are kept by
//! glibc's `fork`. In the child only the forking thread exists. What belongs to the others is never
//! used and never dropped there: the caller forgets the inherited machine, backends and channels,
//! and [`close_all_but`] closes their descriptors, which no living object owns any more.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

/// On which side of a fork.
#[derive(Debug)]
pub(super) enum Side {
    /// In the process that forked: the child's number.
    Parent(i32),
    /// In the child.
    Child,
}

/// Forks this process. All that the module says holds.
pub(super) fn fork() -> io::Result<Side> {
    // SAFETY: the caller keeps the rules above: the child uses nothing that another thread may have
    // left half-done.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child),
        pid if pid > 0 => Ok(Side::Parent(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Closes every descriptor but standard ones and `kept`.
pub(super) fn close_all_but(kept: &mut Vec<RawFd>) {
    kept.extend([0, 1, 2]);
    kept.sort_unstable();
    kept.dedup();
    let mut first: libc::c_uint = 0;
    let close = |from: libc::c_uint, to: libc::c_uint| {
        if from <= to {
            // SAFETY: by the rules above nobody owns these descriptors any more. A kernel that does
            // not know the call closes nothing, which costs descriptors and locks, not memory.
            let done = unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
            if done != 0 {
                tracing::error!(error = %io::Error::last_os_error(), "inherited descriptors stay open");
            }
        }
    };
    for fd in kept
        .iter()
        .filter_map(|fd| libc::c_uint::try_from(*fd).ok())
    {
        if fd > 0 {
            close(first, fd - 1);
        }
        first = fd.saturating_add(1);
    }
    close(first, libc::c_uint::MAX);
}

/// Takes the channel that a worker is started with: standard input, which is replaced by nothing.
pub(super) fn take_stdin() -> io::Result<OwnedFd> {
    // SAFETY: descriptor 0 is open for as long as it is borrowed here.
    let stdin = unsafe { BorrowedFd::borrow_raw(0) };
    let channel = stdin.try_clone_to_owned()?;
    let nothing = File::open("/dev/null")?;
    // SAFETY: plain numbers of open descriptors; nothing reads standard input in a worker.
    let done = unsafe { libc::dup2(nothing.as_raw_fd(), 0) };
    if done == 0 {
        Ok(channel)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An eventfd as what can be polled.
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A descriptor that tells of the end of the child `pid`.
pub(super) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the child is ours and was not waited for, so the number is its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: a new descriptor that nobody else knows.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The status of the child `pid` when it has ended.
pub(super) fn reap(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a place for it.
    let done = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    (done == pid).then_some(status)
}

/// Ends this process at once, without destructors: nothing of it is worth a wait, and the kernel
/// takes everything back.
pub(super) fn exit(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}
