//! The entropy device (virtio 1.2, 5.4): random bytes from the host's `getrandom(2)`.
//!
//! Nothing is kept between requests, so a copy of the machine never sees the bytes that another
//! one saw. A request is answered with at most [`MAX_REQUEST`] bytes, and all requests together with
//! at most the configured rate; what comes faster waits in its ring.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueState};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::ring::{self, MAX_SEGMENTS, Outcome};
use super::{Activation, DeviceError, VirtioDevice};
use crate::{Error, ErrorKind, GuestRam};

/// The virtio device id (virtio 1.2, 5.4.1).
pub const DEVICE_TYPE: u32 = 4;
/// The most bytes that one request is answered with.
pub const MAX_REQUEST: u32 = 4096;
/// The rate unless another one is configured: 1 MiB a second.
pub const DEFAULT_RATE: BytesPerSecond = BytesPerSecond(NonZeroU32::new(1 << 20).unwrap());

const QUEUE_SIZES: [u16; 1] = [64];
const OBJECT: &str = "virtio-rng";

/// A rate of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesPerSecond(pub NonZeroU32);

/// The device's saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// How fast the guest is given entropy.
    pub rate: BytesPerSecond,
}

impl Payload for RngState {
    const KIND: SectionKind = SectionKind(*b"vrng");
    const VERSION: u16 = 1;
}

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    rate: BytesPerSecond,
    budget: Budget,
    events: Vec<Arc<EventFd>>,
    timer: TimerFd,
    active: Option<Activation>,
    quiesced: bool,
    broken: bool,
}

impl Rng {
    /// A device that gives at most `rate`.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new(rate: BytesPerSecond) -> Result<Self, Error> {
        let io = |context| move |e| Error::because(ErrorKind::Io, OBJECT, context, e);
        Ok(Self {
            rate,
            budget: Budget::full(rate, Instant::now()),
            events: ring::queue_events(QUEUE_SIZES.len()).map_err(io("make an eventfd"))?,
            timer: TimerFd::new()
                .map_err(|e| Error::because(ErrorKind::Io, OBJECT, "make a timer", e))?,
            active: None,
            quiesced: false,
            broken: false,
        })
    }

    /// A device from saved state.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn restore(state: &RngState) -> Result<Self, Error> {
        Self::new(state.rate)
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> RngState {
        RngState { rate: self.rate }
    }

    fn work(&mut self) -> Result<(), DeviceError> {
        let (Some(active), [event]) = (self.active.as_mut(), self.events.as_slice()) else {
            return Ok(());
        };
        if self.quiesced || self.broken {
            return Ok(());
        }
        self.budget.refill(self.rate, Instant::now());
        let (budget, timer, rate) = (&mut self.budget, &mut self.timer, self.rate);
        let (memory, interrupt) = (&*active.memory, &active.interrupt);
        for queue in &mut active.queues {
            ring::serve(queue, memory, interrupt, event, |chain| {
                if budget.bytes == 0 {
                    arm(timer, Budget::time_for(rate, MAX_REQUEST))?;
                    return Ok(Outcome::Later);
                }
                let len = fill(chain, memory, budget.bytes.min(MAX_REQUEST))?;
                budget.bytes = budget.bytes.saturating_sub(len);
                Ok(Outcome::Used(len))
            })?;
        }
        Ok(())
    }

    fn work_or_break(&mut self) {
        if let Err(error) = self.work() {
            tracing::warn!(error = &error as &dyn std::error::Error, "virtio-rng stops");
            self.broken = true;
            if let Some(active) = &self.active
                && let Err(error) = active.interrupt.config_change()
            {
                tracing::warn!(%error, "virtio-rng cannot raise its interrupt");
            }
        }
    }
}

/// Fills up to `limit` bytes of the chain's writable buffers and returns how many. Readable ones, of
/// which a driver MUST NOT have any here (5.4.6.1), are passed over.
fn fill(
    chain: DescriptorChain<&GuestRam>,
    memory: &GuestRam,
    limit: u32,
) -> Result<u32, DeviceError> {
    let mut bytes = [0; MAX_REQUEST as usize];
    let mut filled: u32 = 0;
    for segment in chain.take(MAX_SEGMENTS).filter(|d| d.is_write_only()) {
        let len = segment.len().min(limit.saturating_sub(filled));
        let Some(part) = usize::try_from(len).ok().and_then(|n| bytes.get_mut(..n)) else {
            break;
        };
        if part.is_empty() {
            continue;
        }
        getrandom::fill(part).map_err(|e| DeviceError::Host {
            context: "the host has no entropy to give",
            source: e.into(),
        })?;
        memory
            .write_slice(part, segment.addr())
            .map_err(|_| DeviceError::Driver("a buffer is not in guest memory"))?;
        filled = filled.saturating_add(len);
    }
    Ok(filled)
}

fn arm(timer: &mut TimerFd, after: Duration) -> Result<(), DeviceError> {
    timer.reset(after, None).map_err(|e| DeviceError::Host {
        context: "cannot set the timer",
        source: e.into(),
    })
}

/// A token bucket of bytes: it holds one second's worth, and at least one request's.
#[derive(Debug)]
struct Budget {
    bytes: u32,
    at: Instant,
}

impl Budget {
    fn capacity(rate: BytesPerSecond) -> u32 {
        rate.0.get().max(MAX_REQUEST)
    }

    fn full(rate: BytesPerSecond, at: Instant) -> Self {
        Self {
            bytes: Self::capacity(rate),
            at,
        }
    }

    fn refill(&mut self, rate: BytesPerSecond, now: Instant) {
        let micros = now.saturating_duration_since(self.at).as_micros();
        let gained = micros.saturating_mul(rate.0.get().into()) / 1_000_000;
        let gained = u32::try_from(gained).unwrap_or(u32::MAX);
        // Less than a byte's time is not taken away, or frequent calls would gain nothing.
        if gained > 0 {
            self.at = now;
            self.bytes = self.bytes.saturating_add(gained).min(Self::capacity(rate));
        }
    }

    fn time_for(rate: BytesPerSecond, bytes: u32) -> Duration {
        let micros = u64::from(bytes).saturating_mul(1_000_000) / NonZeroU64::from(rate.0);
        Duration::from_micros(micros.max(1))
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        let fds = self
            .events
            .iter()
            .map(|e| Events::new(e.as_ref(), EventSet::IN));
        for event in fds.chain([Events::new(&self.timer, EventSet::IN)]) {
            if let Err(error) = ops.add(event) {
                tracing::error!(%error, "virtio-rng cannot be watched");
                self.broken = true;
            }
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        for event in &self.events {
            ring::drain(event);
        }
        // Setting a timer takes its expiry, too; reading it could block when it was set anew.
        if let Err(error) = self.timer.reset(Duration::ZERO, None) {
            tracing::warn!(%error, "virtio-rng cannot stop its timer");
        }
        self.work_or_break();
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.events
    }

    /// 5.4.4: there is no configuration.
    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.broken = false;
    }

    fn quiesce(&mut self) -> Result<Vec<QueueState>, DeviceError> {
        self.quiesced = true;
        let active = self.active.iter();
        Ok(active
            .flat_map(|a| a.queues.iter().map(Queue::state))
            .collect())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.quiesced = false;
        self.work_or_break();
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
mod tests;
