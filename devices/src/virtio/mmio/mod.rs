//! The virtio-mmio transport: virtio 1.2, 4.2.2, the version-2 register layout, without the legacy
//! interface.
//!
//! # Who owns what
//! The transport owns every register: status, features, selectors, queue addresses and sizes,
//! interrupt status. From `DRIVER_OK` to the next reset the queues' *indices* (`next_avail`,
//! `next_used`) are the device's, and come back to the transport when the device is quiesced.
//! The device owns its configuration space.
//!
//! # Hostile drivers
//! A write that the specification does not allow at that moment (or of that width, or to that
//! offset) is ignored, a read of it gives zeros. What only shows at `DRIVER_OK` (a queue that is not
//! in guest memory, an impossible size, a misaligned ring) leads to `DEVICE_NEEDS_RESET`.
//! A single queue cannot be stopped while the device runs: a 0 written to `QueueReady` then is
//! ignored and reads back as 1 (`VIRTIO_F_RING_RESET`, which is meant for that, is not offered).
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod state;
mod status;
#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed"
)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

pub use self::state::{SavedQueue, TransportState};
use self::status::{DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, STEPS, Status};
use super::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use super::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::{Error, ErrorKind, GuestRam};

/// The size of a transport's register window, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Where in the window a queue is notified: the address of an ioeventfd, 4 bytes wide, that matches
/// the queue's index.
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "OFSH", little-endian.
const VENDOR: u32 = 0x4853_464f;

/// What the transport offers for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The bits that belong to device types (virtio 1.2, 2.2).
const DEVICE_FEATURES: u64 = 0x00ff_ffff | !0 << 50;

const OBJECT: &str = "virtio-mmio transport";

/// A virtio device's register window.
///
/// The machine calls [`read`](Self::read) and [`write`](Self::write) from vCPU threads, under a lock
/// of the transport's own; the order of locks is transport, then device.
#[derive(Debug)]
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    device_type: u32,
    offered: u64,
    queue_events: Vec<Arc<EventFd>>,
    memory: Arc<GuestRam>,
    interrupt: Interrupt,
    status: Status,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueState>,
    /// The device holds the queues.
    active: bool,
    quiesced: bool,
}

impl MmioTransport {
    /// A transport as after a reset, whose interrupt raises `line`.
    ///
    /// # Errors
    /// When the device's queues make no sense: sizes are powers of two up to 32768, and each queue
    /// has its eventfd.
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: Arc<GuestRam>,
        line: Arc<EventFd>,
    ) -> Result<Self, Error> {
        let (device_type, offered, queue_events, queues) = {
            let guard = lock(&device);
            let queues = guard
                .queue_max_sizes()
                .iter()
                .map(|size| Queue::new(*size).map(|q| q.state()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| {
                    Error::because(
                        ErrorKind::InvalidConfig,
                        OBJECT,
                        "a queue's largest size",
                        e,
                    )
                })?;
            (
                guard.device_type(),
                guard.features() & DEVICE_FEATURES | TRANSPORT_FEATURES,
                guard.queue_events().to_vec(),
                queues,
            )
        };
        if queue_events.len() != queues.len() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                OBJECT,
                "the device has not one eventfd for each queue",
            ));
        }
        Ok(Self {
            device,
            device_type,
            offered,
            queue_events,
            memory,
            interrupt: Interrupt::new(line, 0),
            status: Status::default(),
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            active: false,
            quiesced: false,
        })
    }

    /// A transport from saved state, its device active when it was active then. Transport and
    /// device are quiesced: nothing moves before [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidState`] when the state contradicts itself, the device or the memory;
    /// [`ErrorKind::Device`] when the device cannot take the queues.
    pub fn restore(
        state: &TransportState,
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: Arc<GuestRam>,
        line: Arc<EventFd>,
    ) -> Result<Self, Error> {
        let invalid = |context| Error::new(ErrorKind::InvalidState, OBJECT, context);
        let mut transport = Self::new(device, memory, Arc::clone(&line))?;
        if state.device_type != transport.device_type {
            return Err(invalid("the state is of another type of device"));
        }
        let status = Status::from_saved(state.status)
            .ok_or_else(|| invalid("no driver can have reached this device status"))?;
        if state.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0
            || (state.interrupt_status != 0 && !status.has(DRIVER_OK))
        {
            return Err(invalid("the interrupt status cannot be"));
        }
        if status.has(FEATURES_OK) && !transport.acceptable(state.driver_features) {
            return Err(invalid("the driver's features were not offered"));
        }
        if state.queues.len() != transport.queues.len() {
            return Err(invalid("the device has another number of queues"));
        }
        let event_idx = event_idx(state.driver_features);
        let active = status.has(DRIVER_OK) && !status.has(NEEDS_RESET);
        for (queue, saved) in transport.queues.iter_mut().zip(&state.queues) {
            if saved.max_size != queue.max_size {
                return Err(invalid("a queue has another largest size"));
            }
            if saved.size != 0 && usable_size(saved.size.into(), saved.max_size).is_none() {
                return Err(invalid("a queue's size is impossible"));
            }
            let fresh = !saved.event_idx && saved.next_avail == 0 && saved.next_used == 0;
            let ran = status.has(DRIVER_OK) && saved.ready;
            // A queue that was ready stays fresh when the device was never activated.
            let unused = fresh && !(ran && active);
            let used = ran && saved.event_idx == event_idx;
            if !unused && !used {
                return Err(invalid("a queue has indices that it cannot have"));
            }
            if saved.ready && !status.has(FEATURES_OK) {
                return Err(invalid(
                    "a queue is ready before the features are agreed on",
                ));
            }
            *queue = QueueState::from(saved);
        }
        transport.status = status;
        transport.device_features_select = state.device_features_select;
        transport.driver_features_select = state.driver_features_select;
        transport.driver_features = state.driver_features;
        transport.queue_select = state.queue_select;
        transport.interrupt =
            Interrupt::new(line, state.interrupt_status).with_generation(state.config_generation);

        lock(&transport.device)
            .quiesce()
            .map_err(|e| Error::because(ErrorKind::Device, OBJECT, "quiesce the device", e))?;
        transport.quiesced = true;
        if active {
            transport.hand_over().map_err(|e| match e {
                DeviceError::Queue(_) | DeviceError::Driver(_) => {
                    Error::because(ErrorKind::InvalidState, OBJECT, "a queue cannot be used", e)
                }
                DeviceError::Host { .. } => {
                    Error::because(ErrorKind::Device, OBJECT, "activate the device", e)
                }
            })?;
        }
        Ok(transport)
    }

    /// The device behind the transport.
    #[must_use]
    pub fn device(&self) -> &Arc<Mutex<dyn VirtioDevice>> {
        &self.device
    }

    /// The virtio device id.
    #[must_use]
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// The eventfd of each queue, in order, for ioeventfds at [`QUEUE_NOTIFY_OFFSET`].
    #[must_use]
    pub fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.queue_events
    }

    /// The eventfd that raises the interrupt line.
    #[must_use]
    pub fn interrupt_line(&self) -> &Arc<EventFd> {
        self.interrupt.line()
    }

    /// Quiesces the device and takes back its queues' indices. Idempotent. The vCPUs have stopped
    /// before, so that no register changes until [`resume`](Self::resume).
    ///
    /// # Errors
    /// When the device could not quiesce; all runs on.
    pub fn quiesce(&mut self) -> Result<(), Error> {
        let failed = |e| Error::because(ErrorKind::Device, OBJECT, "quiesce the device", e);
        let (states, needs_reset) = {
            let mut device = lock(&self.device);
            (device.quiesce().map_err(failed)?, device.needs_reset())
        };
        if self.active {
            if states.len() != self.queues.len() {
                return Err(Error::new(
                    ErrorKind::Device,
                    OBJECT,
                    "the device lost some of its queues",
                ));
            }
            for (queue, device) in self.queues.iter_mut().zip(states) {
                // What the driver wrote to the registers of a queue that it left unused stays here.
                if queue.ready {
                    queue.next_avail = device.next_avail;
                    queue.next_used = device.next_used;
                    queue.event_idx_enabled = device.event_idx_enabled;
                }
            }
            if needs_reset {
                self.status.set(NEEDS_RESET);
            }
        }
        self.quiesced = true;
        Ok(())
    }

    /// Lets the device run, and raises the interrupt again when one was pending.
    ///
    /// # Errors
    /// When the device cannot run again or its interrupt cannot be raised.
    pub fn resume(&mut self) -> Result<(), Error> {
        lock(&self.device)
            .resume()
            .map_err(|e| Error::because(ErrorKind::Device, OBJECT, "resume the device", e))?;
        self.quiesced = false;
        self.interrupt
            .raise_pending()
            .map_err(|e| Error::because(ErrorKind::Io, OBJECT, "raise the interrupt", e))
    }

    /// The transport's state.
    ///
    /// # Errors
    /// [`ErrorKind::WrongMoment`] when the transport is not quiesced.
    pub fn save(&self) -> Result<TransportState, Error> {
        if !self.quiesced {
            return Err(Error::new(
                ErrorKind::WrongMoment,
                OBJECT,
                "only a quiesced device can be saved",
            ));
        }
        Ok(TransportState {
            device_type: self.device_type,
            status: self.status.bits(),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            queues: self.queues.iter().map(SavedQueue::from).collect(),
        })
    }

    /// A vCPU reads `data.len()` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = config_access(offset, data.len()) {
            lock(&self.device).read_config(offset, data);
            return;
        }
        // 4.2.2.2: control registers are read and written in aligned words only.
        if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// A vCPU writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = config_access(offset, data.len()) {
            if self.status.has(DRIVER) && !self.status.has(FAILED) {
                lock(&self.device).write_config(offset, data);
            }
            return;
        }
        if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => word_of(self.offered, self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |q| q.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |q| q.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status_now().bits(),
            VIRTIO_MMIO_CONFIG_GENERATION => {
                // Under the device's lock, as every change of the configuration is.
                let _device = lock(&self.device);
                self.interrupt.generation()
            }
            // There is no shared memory region: its length is said to be -1 (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status.negotiating() => {
                match self.driver_features_select {
                    0 => set_low(&mut self.driver_features, value),
                    1 => set_high(&mut self.driver_features, value),
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) {
        if !self.status.configuring() {
            return;
        }
        let Some(queue) = usize::try_from(self.queue_select)
            .ok()
            .and_then(|i| self.queues.get_mut(i))
        else {
            return;
        };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        // 4.2.2.2: a driver does not touch these once the queue is ready.
        if queue.ready {
            return;
        }
        match offset {
            // An impossible size is kept as 0, with which the device is not activated.
            VIRTIO_MMIO_QUEUE_NUM => {
                queue.size = usable_size(value, queue.max_size).unwrap_or(0);
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// A notification that no ioeventfd has caught.
    fn notify(&self, queue: u32) {
        let event = usize::try_from(queue)
            .ok()
            .and_then(|i| self.queue_events.get(i));
        if let (true, Some(event)) = (self.active, event)
            && let Err(error) = event.write(1)
        {
            // A counter that is full is a notification that is pending already.
            tracing::debug!(queue, %error, "a queue notification was not written");
        }
    }

    /// Virtio 1.2, 3.1.1 and 2.1.1. Bits are never cleared but by a reset; of the bits asked for,
    /// those are set whose turn it is.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if value & FAILED != 0 {
            self.status.set(FAILED);
            return;
        }
        for step in STEPS {
            if value & step == 0 || !self.status.is_next(step) {
                continue;
            }
            if step == FEATURES_OK && !self.acceptable(self.driver_features) {
                // 2.2.1: the driver reads the status back and finds that it was refused.
                return;
            }
            self.status.set(step);
            if step == DRIVER_OK {
                self.activate();
            }
        }
    }

    fn activate(&mut self) {
        if let Err(error) = self.hand_over() {
            tracing::warn!(
                device_type = self.device_type,
                error = &error as &dyn std::error::Error,
                "a virtio device could not be activated"
            );
            self.status.set(NEEDS_RESET);
            if let Err(error) = self.interrupt.config_change() {
                tracing::warn!(%error, "a virtio interrupt could not be raised");
            }
        }
    }

    /// Gives the queues to the device.
    fn hand_over(&mut self) -> Result<(), DeviceError> {
        let event_idx = event_idx(self.driver_features);
        let mut queues = Vec::with_capacity(self.queues.len());
        for registers in &mut self.queues {
            queues.push(if registers.ready {
                registers.event_idx_enabled = event_idx;
                let queue = Queue::try_from(*registers)?;
                if !queue.is_valid(&*self.memory) {
                    return Err(DeviceError::Driver("a queue is not in guest memory"));
                }
                queue
            } else {
                Queue::new(registers.max_size)?
            });
        }
        lock(&self.device).activate(Activation {
            memory: Arc::clone(&self.memory),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        })?;
        self.active = true;
        Ok(())
    }

    /// Virtio 1.2, 2.1: everything is as it was in the beginning.
    fn reset(&mut self) {
        lock(&self.device).reset();
        self.active = false;
        self.status = Status::default();
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.interrupt.acknowledge(u32::MAX);
        for queue in &mut self.queues {
            // The sizes were proven when the transport was made.
            if let Ok(fresh) = Queue::new(queue.max_size) {
                *queue = fresh.state();
            }
        }
    }

    fn status_now(&self) -> Status {
        let mut status = self.status;
        if self.active && lock(&self.device).needs_reset() {
            status.set(NEEDS_RESET);
        }
        status
    }

    /// Virtio 1.2, 2.2 and 6: nothing that was not offered, and no legacy driver.
    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }
}

/// The offset into the configuration space, when this is an access to it: of 1, 2, 4 or 8 bytes,
/// aligned (virtio 1.2, 4.2.2.2; 8 bytes are two words at once).
fn config_access(offset: u64, len: usize) -> Option<u64> {
    let offset = offset.checked_sub(VIRTIO_MMIO_CONFIG.into())?;
    let aligned = matches!(len, 1 | 2 | 4 | 8) && offset.trailing_zeros() >= len.trailing_zeros();
    let inside = offset < WINDOW_SIZE.saturating_sub(VIRTIO_MMIO_CONFIG.into());
    (aligned && inside).then_some(offset)
}

fn usable_size(size: u32, max_size: u16) -> Option<u16> {
    u16::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two() && *size <= max_size)
}

fn event_idx(features: u64) -> bool {
    features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
}

fn word_of(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & 0xffff_ffff_0000_0000 | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0x0000_0000_ffff_ffff | u64::from(high) << 32;
}

/// A device whose model panicked keeps its registers readable; the thread that panicked is gone
/// with its loop, which the machine notices.
fn lock(device: &Mutex<dyn VirtioDevice>) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
