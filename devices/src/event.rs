//! Eventfds as everything here uses them.

use std::io;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An eventfd that nobody blocks on, and that a program which the embedder starts does not inherit.
pub(crate) fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)
}
