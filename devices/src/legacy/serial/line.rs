//! The UART's interrupt line, which can be held back while the machine is paused.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

#[derive(Debug)]
pub(super) struct Line {
    event: Arc<EventFd>,
    held: AtomicBool,
    missed: AtomicBool,
}

impl Line {
    pub(super) fn open(event: Arc<EventFd>) -> Self {
        Self {
            event,
            held: AtomicBool::new(false),
            missed: AtomicBool::new(false),
        }
    }

    pub(super) fn held(event: Arc<EventFd>) -> Self {
        let line = Self::open(event);
        line.hold();
        line
    }

    pub(super) fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub(super) fn release(&self) -> io::Result<()> {
        self.held.store(false, Ordering::SeqCst);
        if self.missed.swap(false, Ordering::SeqCst) {
            self.event.write(1)
        } else {
            Ok(())
        }
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.held.load(Ordering::SeqCst) {
            self.missed.store(true, Ordering::SeqCst);
            Ok(())
        } else {
            self.event.write(1)
        }
    }
}
