//! Threads that take no signal, and the signal that brings a vCPU thread out of `KVM_RUN`.
//!
//! A library may install no signal handler. None is needed: vCPU threads have every signal
//! blocked, and only inside `KVM_RUN` is the kick signal let through (`KVM_SET_SIGNAL_MASK`).
//! There it ends the run with `EINTR` and stays pending, is blocked again before the thread is
//! back in user space, and is then taken off the queue. A kick that comes between two runs stays
//! pending and ends the next run at once, so none is lost.
//!
//! # Rules of the unsafe code here
//! Only calls that fill or read a `sigset_t` or change this thread's own mask.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::thread::{Builder, JoinHandle};

/// The kick signal: real-time, so that none of the usual meanings is touched. A signal of this
/// number that the embedder sends to the whole process may end up in a vCPU thread.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 7
}

fn set_of(signals: impl FnOnce(*mut libc::sigset_t) -> libc::c_int) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // Can only fail on a bad signal number; the set is initialised by the caller in any case.
    signals(set.as_mut_ptr());
    // SAFETY: `signals` initialised the set by sigemptyset or sigfillset.
    unsafe { set.assume_init() }
}

/// Every signal but the kick, as `KVM_SET_SIGNAL_MASK` takes it: the mask inside `KVM_RUN`.
pub(crate) fn run_mask() -> u64 {
    !(1 << (kick_signal() - 1))
}

/// Starts a thread that has every signal blocked from its first instruction on.
pub(crate) fn spawn(
    name: String,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    // SAFETY: sigfillset writes a set; the mask is inherited by the new thread and put back
    // whatever the outcome.
    let all = set_of(|set| unsafe { libc::sigfillset(set) });
    let mut before = MaybeUninit::uninit();
    // SAFETY: both pointers are to sets of ours; the call changes this thread's mask only.
    let done =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, before.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::from_raw_os_error(done));
    }
    let spawned = Builder::new().name(name).spawn(body);
    // SAFETY: `before` was filled by the successful call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    spawned
}

/// Brings the thread out of `KVM_RUN`, or out of its next one at once.
pub(crate) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle has not been joined, so its pthread id is valid even if the thread has
    // ended. The thread has the signal blocked, so no disposition is ever looked at.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

/// Takes pending kicks off this thread's queue.
pub(crate) fn take_kicks() {
    let kick = set_of(|set| {
        // SAFETY: a set of ours is emptied, then gets one valid signal.
        unsafe {
            libc::sigemptyset(set);
            libc::sigaddset(set, kick_signal())
        }
    });
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: set and time are ours; no information is asked for.
    while unsafe { libc::sigtimedwait(&raw const kick, ptr::null_mut(), &raw const now) } > 0 {}
}
