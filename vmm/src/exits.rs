//! How a guest's run ends, and who is told.

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::device_loop::eventfd;
use crate::error::Result;
use crate::sync::lock;

/// Why the guest does not run any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest faulted while it handled a fault's fault.
    TripleFault,
    /// KVM could not go on: an instruction that it cannot emulate, or a state it cannot enter.
    KvmError(Box<KvmError>),
    /// A thread of the machine has died; this is a bug of ours.
    ThreadLost,
}

/// What KVM could not do, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmError {
    /// The vCPU.
    pub vcpu: u8,
    /// What happened.
    pub what: Cow<'static, str>,
    /// The exit's own number for it.
    pub code: u64,
    /// Registers, for a report.
    pub registers: Registers,
}

/// The registers that a report of a dead guest shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they bear the processor's names")]
pub struct Registers {
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub rax: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cs: u16,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::TripleFault => f.write_str("the guest ended in a triple fault"),
            Self::ThreadLost => f.write_str("a thread of the machine died"),
            Self::KvmError(error) => {
                let r = &error.registers;
                write!(
                    f,
                    "KVM cannot go on with vCPU {}: {} ({:#x}) at rip {:#x}, cs {:#x}, rsp {:#x}, \
                     cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}",
                    error.vcpu,
                    error.what,
                    error.code,
                    r.rip,
                    r.cs,
                    r.rsp,
                    r.cr0,
                    r.cr2,
                    r.cr3,
                    r.cr4
                )
            }
        }
    }
}

/// Where the end of the guest is told: the first reason counts.
#[derive(Debug)]
pub struct Exits {
    first: Mutex<Option<ExitReason>>,
    changed: Condvar,
    event: EventFd,
}

impl Exits {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            first: Mutex::new(None),
            changed: Condvar::new(),
            event: eventfd("cannot make an eventfd")?,
        }))
    }

    pub(crate) fn post(&self, reason: ExitReason) {
        let mut first = lock(&self.first);
        if first.is_none() {
            tracing::info!(%reason, "the guest has ended");
            *first = Some(reason);
            // Can only fail when the counter is full, and then it is readable already.
            let _ = self.event.write(1);
            self.changed.notify_all();
        }
    }

    /// The reason, when the guest has ended.
    #[must_use]
    pub fn reason(&self) -> Option<ExitReason> {
        lock(&self.first).clone()
    }

    /// Waits until the guest has ended, for at most `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<ExitReason> {
        let first = lock(&self.first);
        let (first, _) = self
            .changed
            .wait_timeout_while(first, timeout, |reason| reason.is_none())
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        first.clone()
    }

    /// Becomes readable when the guest has ended, for use in an event loop.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// When the guest's own instructions first caused an exit after a start.
#[derive(Debug)]
pub(crate) struct FirstExit {
    base: Instant,
    wanted: AtomicBool,
    nanos: AtomicU64,
}

impl FirstExit {
    pub(crate) fn new() -> Self {
        Self {
            base: Instant::now(),
            wanted: AtomicBool::new(false),
            nanos: AtomicU64::new(0),
        }
    }

    /// Looks for the next one.
    pub(crate) fn arm(&self) {
        self.nanos.store(0, Ordering::Relaxed);
        self.wanted.store(true, Ordering::Release);
    }

    /// Called on every exit; costs one load after the first.
    pub(crate) fn note(&self) {
        if self.wanted.load(Ordering::Acquire) && self.wanted.swap(false, Ordering::AcqRel) {
            let nanos = self.base.elapsed().as_nanos();
            let nanos = u64::try_from(nanos).unwrap_or(u64::MAX).max(1);
            self.nanos.store(nanos, Ordering::Release);
        }
    }

    /// When it was, if it has been.
    pub(crate) fn at(&self) -> Option<Instant> {
        match self.nanos.load(Ordering::Acquire) {
            0 => None,
            nanos => self.base.checked_add(Duration::from_nanos(nanos)),
        }
    }
}
