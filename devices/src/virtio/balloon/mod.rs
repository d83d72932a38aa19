//! The balloon (virtio 1.2, 5.5): memory that the guest gives back, by inflating when the host asks
//! for it, or by reporting pages that it does not use.
//!
//! # What is offered
//! - `VIRTIO_BALLOON_F_STATS_VQ`, `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`, `VIRTIO_BALLOON_F_PAGE_REPORTING`,
//!   each when configured.
//! - `VIRTIO_BALLOON_F_MUST_TELL_HOST` is not: a page that was given back is there again when the
//!   guest touches it, so there is nothing to tell the host first. What comes through the
//!   deflate queue is acknowledged and means nothing.
//! - `VIRTIO_BALLOON_F_FREE_PAGE_HINT` and `VIRTIO_BALLOON_F_PAGE_POISON` are not. A Linux guest that
//!   poisons free pages then does not report them, by itself.
//!
//! # Queue numbers
//! The specification numbers the queues 0 inflate, 1 deflate, 2 statistics, 3 free page hints, 4
//! reporting (5.5.2), but Linux leaves no gaps for those that it does not use. The device
//! understands both: queue 2 is for statistics when these were agreed on, and all further ones
//! are for reports.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod pages;
mod stats;
#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed"
)]
mod tests;

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes};
use vmm_sys_util::eventfd::EventFd;

pub use self::pages::{GuestRange, PAGE_SIZE, PageReclaim};
pub use self::stats::GuestStats;
use super::ring::{self, MAX_SEGMENTS, Outcome};
use super::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::{Error, ErrorKind, GuestRam};

/// The virtio device id (virtio 1.2, 5.5.1).
pub const DEVICE_TYPE: u32 = 5;
/// The most page numbers of one inflate request that are looked at; the rest keeps its memory. Linux
/// sends 256.
pub const MAX_FRAMES: usize = 1024;

const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const QUEUE_SIZES: [u16; 5] = [64; 5];

const OBJECT: &str = "virtio-balloon";

/// A number of pages of [`PAGE_SIZE`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Pages(pub u32);

/// Which of its abilities a balloon offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest tells figures of its memory.
    pub statistics: bool,
    /// The guest reports pages that it does not use.
    pub page_reporting: bool,
}

/// The device's saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// What the device offers.
    pub config: BalloonConfig,
    /// How large the host wants the balloon (the configuration's `num_pages`).
    pub target: Pages,
    /// How large the guest says that it is (the configuration's `actual`).
    pub actual: Pages,
}

impl Payload for BalloonState {
    const KIND: SectionKind = SectionKind(*b"vbal");
    const VERSION: u16 = 1;
}

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    config: BalloonConfig,
    target: Pages,
    actual: Pages,
    stats: Option<GuestStats>,
    reclaim: Box<dyn PageReclaim>,
    events: Vec<Arc<EventFd>>,
    active: Option<Activation>,
    quiesced: bool,
    broken: bool,
}

impl Balloon {
    /// A balloon of no size that gives memory back through `reclaim`.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new(config: BalloonConfig, reclaim: Box<dyn PageReclaim>) -> Result<Self, Error> {
        let queues = match config {
            BalloonConfig {
                page_reporting: true,
                ..
            } => 5,
            BalloonConfig {
                statistics: true, ..
            } => 3,
            _ => 2,
        };
        Ok(Self {
            config,
            target: Pages::default(),
            actual: Pages::default(),
            stats: None,
            reclaim,
            events: ring::queue_events(queues)
                .map_err(|e| Error::because(ErrorKind::Io, OBJECT, "make an eventfd", e))?,
            active: None,
            quiesced: false,
            broken: false,
        })
    }

    /// A balloon from saved state. Any state is a possible one: the figures in it are a host's wish
    /// and a guest's claim.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn restore(state: &BalloonState, reclaim: Box<dyn PageReclaim>) -> Result<Self, Error> {
        Ok(Self {
            target: state.target,
            actual: state.actual,
            ..Self::new(state.config, reclaim)?
        })
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> BalloonState {
        BalloonState {
            config: self.config,
            target: self.target,
            actual: self.actual,
        }
    }

    /// Asks the guest for a balloon of `target`; it comes to that in its own time, or never.
    ///
    /// # Errors
    /// When the guest cannot be told.
    pub fn set_target(&mut self, target: Pages) -> Result<(), Error> {
        self.target = target;
        match &self.active {
            Some(active) => active
                .interrupt
                .config_change()
                .map_err(|e| Error::because(ErrorKind::Io, OBJECT, "raise the interrupt", e)),
            None => Ok(()),
        }
    }

    /// How large the host wants the balloon.
    #[must_use]
    pub fn target(&self) -> Pages {
        self.target
    }

    /// How large the guest says that the balloon is.
    #[must_use]
    pub fn actual(&self) -> Pages {
        self.actual
    }

    /// The latest figures that the guest has sent, if it ever did.
    #[must_use]
    pub fn stats(&self) -> Option<GuestStats> {
        self.stats
    }

    /// Asks the guest for new figures by giving its buffer back (5.5.6.4.1). They come through
    /// [`stats`](Self::stats) when the guest has sent them. Returns whether there was a buffer; there
    /// is none while the guest has not answered the last request, does not know of statistics, or the
    /// device is quiesced.
    pub fn request_stats(&mut self) -> bool {
        let asked = self.give_stats_back();
        self.or_break(asked).unwrap_or(false)
    }

    fn give_stats_back(&mut self) -> Result<bool, DeviceError> {
        if self.quiesced || self.broken {
            return Ok(false);
        }
        let Some((queue, memory, interrupt, event)) = self.stats_queue() else {
            return Ok(false);
        };
        let Some(head) = queue.iter(memory)?.next().map(|chain| chain.head_index()) else {
            return Ok(false);
        };
        queue.add_used(memory, head, 0)?;
        if queue.needs_notification(memory)? {
            interrupt.used_buffer().map_err(ring::cannot_interrupt)?;
        }
        if queue.enable_notification(memory)? {
            ring::wake(event)?;
        }
        Ok(true)
    }

    /// Reads the figures in the stats buffer. It stays in the available ring until the next request:
    /// so no buffer is ever held by the device alone, and none is lost in a saved state.
    fn look_at_stats(&mut self) -> Result<(), DeviceError> {
        let Some((queue, memory, _, _)) = self.stats_queue() else {
            return Ok(());
        };
        let Some(chain) = queue.iter(memory)?.next() else {
            queue.enable_notification(memory)?;
            return Ok(());
        };
        queue.go_to_previous_position();
        self.stats = Some(GuestStats::parse(&read(chain, stats::MAX_BYTES)?));
        Ok(())
    }

    fn stats_queue(&mut self) -> Option<(&mut Queue, &GuestRam, &Interrupt, &EventFd)> {
        let active = self.active.as_mut()?;
        if active.features & STATS_VQ == 0 {
            return None;
        }
        let queue = active.queues.get_mut(STATS).filter(|q| q.ready())?;
        let event = self.events.get(STATS)?;
        Some((queue, &active.memory, &active.interrupt, event))
    }

    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        if self.quiesced || self.broken {
            return Ok(());
        }
        let has_stats = active.features & STATS_VQ != 0;
        let reports = active.features & PAGE_REPORTING != 0;
        let (memory, interrupt) = (&*active.memory, &active.interrupt);
        let reclaim = &*self.reclaim;
        for (index, (queue, event)) in active.queues.iter_mut().zip(&self.events).enumerate() {
            match index {
                INFLATE => ring::serve(queue, memory, interrupt, event, |chain| {
                    inflate(chain, memory, reclaim)
                })?,
                DEFLATE => ring::serve(queue, memory, interrupt, event, |_| Ok(Outcome::Used(0)))?,
                STATS if has_stats => {}
                _ if reports => ring::serve(queue, memory, interrupt, event, |chain| {
                    report(chain, memory, reclaim);
                    Ok(Outcome::Used(0))
                })?,
                _ => {}
            }
        }
        self.look_at_stats()
    }

    fn work_or_break(&mut self) {
        let worked = self.work();
        self.or_break(worked);
    }

    fn or_break<T>(&mut self, result: Result<T, DeviceError>) -> Option<T> {
        result
            .inspect_err(|error| {
                tracing::warn!(
                    error = error as &dyn std::error::Error,
                    "virtio-balloon stops"
                );
                self.broken = true;
                if let Some(active) = &self.active
                    && let Err(error) = active.interrupt.config_change()
                {
                    tracing::warn!(%error, "virtio-balloon cannot raise its interrupt");
                }
            })
            .ok()
    }

    fn config_space(&self) -> [u8; 8] {
        let mut space = [0; 8];
        let (num_pages, actual) = space.split_at_mut(4);
        num_pages.copy_from_slice(&self.target.0.to_le_bytes());
        actual.copy_from_slice(&self.actual.0.to_le_bytes());
        space
    }
}

/// 5.5.6.1: an array of page frame numbers, of pages that the guest does not use any more.
fn inflate(
    chain: DescriptorChain<&GuestRam>,
    memory: &GuestRam,
    reclaim: &dyn PageReclaim,
) -> Result<Outcome, DeviceError> {
    let bytes = read(chain, MAX_FRAMES.saturating_mul(4))?;
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut frames = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
    pages::of_frames(memory, &mut frames, |range| give_back(reclaim, range));
    Ok(Outcome::Used(0))
}

/// 5.5.6.7: the chain's own buffers are what the guest does not use. They are not touched here.
fn report(chain: DescriptorChain<&GuestRam>, memory: &GuestRam, reclaim: &dyn PageReclaim) {
    for segment in chain.take(MAX_SEGMENTS).filter(|d| d.is_write_only()) {
        let start = segment.addr().raw_value();
        let end = start.saturating_add(segment.len().into());
        pages::of_bytes(memory, start, end, |range| give_back(reclaim, range));
    }
}

fn give_back(reclaim: &dyn PageReclaim, range: GuestRange) {
    if let Err(error) = reclaim.reclaim(range) {
        // The guest has lost nothing, the host has gained nothing.
        tracing::warn!(?range, %error, "guest memory cannot be given back");
    }
}

/// What the driver wrote, up to `limit` bytes.
fn read(chain: DescriptorChain<&GuestRam>, limit: usize) -> Result<Vec<u8>, DeviceError> {
    let memory = chain.memory();
    let mut bytes = vec![0; limit];
    let mut rest = bytes.as_mut_slice();
    for segment in chain
        .clone()
        .take(MAX_SEGMENTS)
        .filter(|d| !d.is_write_only())
    {
        let len = usize::try_from(segment.len())
            .unwrap_or(usize::MAX)
            .min(rest.len());
        let (part, behind) = rest.split_at_mut_checked(len).unwrap_or_default();
        memory
            .read_slice(part, segment.addr())
            .map_err(|_| DeviceError::Driver("a buffer is not in guest memory"))?;
        rest = behind;
    }
    let len = limit.saturating_sub(rest.len());
    bytes.truncate(len);
    Ok(bytes)
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        for event in &self.events {
            if let Err(error) = ops.add(Events::new(event.as_ref(), EventSet::IN)) {
                tracing::error!(%error, "virtio-balloon cannot be watched");
                self.broken = true;
            }
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        for event in &self.events {
            ring::drain(event);
        }
        self.work_or_break();
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        [
            (self.config.statistics, STATS_VQ),
            (self.config.deflate_on_oom, DEFLATE_ON_OOM),
            (self.config.page_reporting, PAGE_REPORTING),
        ]
        .into_iter()
        .filter_map(|(offered, feature)| offered.then_some(feature))
        .fold(0, |features, feature| features | feature)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        QUEUE_SIZES.get(..self.events.len()).unwrap_or_default()
    }

    fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.events
    }

    /// 5.5.4: `num_pages` and `actual`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let space = self.config_space();
        let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    /// Only `actual` is the driver's to write.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.actual = Pages(u32::from_le_bytes(actual));
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(activation);
        Ok(())
    }

    /// The host's wish stays; the guest's balloon is gone with its driver.
    fn reset(&mut self) {
        self.active = None;
        self.broken = false;
        self.actual = Pages::default();
        self.stats = None;
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
