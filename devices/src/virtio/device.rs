//! What a virtio device model is to its transport and to the machine.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use event_manager::MutEventSubscriber;
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::GuestRam;

/// Why a device cannot go on. The transport answers with `DEVICE_NEEDS_RESET`; nothing else
/// in the host is affected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver's rings, descriptors or requests break the specification.
    #[error("the guest's driver broke the virtio specification: {0}")]
    Driver(&'static str),
    /// A ring could not be used.
    #[error("a virtqueue cannot be used")]
    Queue(#[from] virtio_queue::Error),
    /// The host's side failed.
    #[error("{context}")]
    Host {
        /// What was being done.
        context: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// What a device gets when the driver sets `DRIVER_OK`, or when it is built from saved state
/// that was taken after that.
#[derive(Debug)]
pub struct Activation {
    /// The guest's RAM.
    pub memory: Arc<GuestRam>,
    /// The features that both sides agreed on, `VIRTIO_F_VERSION_1` among them.
    pub features: u64,
    /// The queues, in order; each is ready and valid in `memory` or was left unused (not ready).
    pub queues: Vec<Queue>,
    /// The device's interrupt.
    pub interrupt: Interrupt,
}

/// A virtio device model.
///
/// # Life
/// `new(config)` or `restore(state, host resources)` → [`activate`](Self::activate) →
/// any number of [`quiesce`](Self::quiesce) / save / [`resume`](Self::resume) →
/// [`reset`](Self::reset) → … A device built from saved state is activated by the transport with
/// the restored queues and stays quiesced until `resume`. A quiesce holds for a device that is not
/// active, too: activated later, it does not start before `resume`; `reset` does not end it either.
///
/// Between `activate` and `reset` the queues' indices live in the device, and only
/// [`quiesce`](Self::quiesce) tells them to the transport; all other registers live in the
/// transport.
///
/// # Threads
/// The machine keeps the device in an `Arc<Mutex<_>>`. vCPU threads call the register-side
/// methods; the machine's device loop calls the [`MutEventSubscriber`] side, with the events that
/// the device itself registered (its queue eventfds among them, unless it has threads of its own
/// that wait for them). No call blocks for longer than the I/O that is in flight, and what a call
/// waits for never needs the device's lock, for the caller holds it.
///
/// # Hostile drivers
/// Ring content, descriptors, requests and config writes are arbitrary. They lead to an error
/// status in the request, an ignored request, or `DEVICE_NEEDS_RESET`: never to a panic, to an
/// unbounded loop or allocation, or to an access outside guest memory. One call handles at most
/// one queue's worth of requests before it lets others run.
pub trait VirtioDevice: MutEventSubscriber + Send + Debug {
    /// The virtio device id (virtio 1.2, 5).
    fn device_type(&self) -> u32;

    /// The features of this device type that are offered (virtio 1.2, 2.2: bits 0 to 23 and from 50);
    /// the same on every call. The transport adds `VIRTIO_F_VERSION_1`, `VIRTIO_F_RING_EVENT_IDX`
    /// and `VIRTIO_F_INDIRECT_DESC` for every device, for `virtio-queue` does both: so a model asks
    /// `needs_notification` before it raises an interrupt, and leaves its loop over a queue only
    /// when `enable_notification` has said that nothing more is available.
    fn features(&self) -> u64;

    /// The largest size of each queue; the same on every call.
    fn queue_max_sizes(&self) -> &[u16];

    /// The eventfd that says "queue `i` was notified", one for each queue. It may be written while
    /// the device is not active, which means nothing.
    fn queue_events(&self) -> &[Arc<EventFd>];

    /// Reads the device configuration space. Bytes outside it read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration space. What is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Takes over the queues and starts (or, when quiesced, gets ready to start).
    ///
    /// # Errors
    /// When the device cannot run; it is then as it was before the call.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Lets go of the queues and forgets the driver: afterwards the device touches no guest
    /// memory and raises no interrupt until it is activated again. Waits for I/O in flight.
    /// Called in any state, active or not.
    fn reset(&mut self);

    /// Stops taking requests, waits until none is in flight (each is completed in its used ring
    /// or still in its available ring), and returns the queues' state, empty when not active.
    /// Idempotent.
    ///
    /// # Errors
    /// When requests in flight could not be ended; the device is then running as before.
    fn quiesce(&mut self) -> Result<Vec<QueueState>, DeviceError>;

    /// Ends a quiesce: looks at every queue as if it had just been notified, for a notification
    /// may have come while nobody listened.
    ///
    /// # Errors
    /// When the device cannot run again.
    fn resume(&mut self) -> Result<(), DeviceError>;

    /// Whether the device has met something it cannot recover from but by a reset
    /// (virtio 1.2, 2.1 `DEVICE_NEEDS_RESET`). It stays so until [`reset`](Self::reset). A device
    /// that gets into this state calls [`Interrupt::config_change`] at once, so that the driver
    /// looks at the status (2.1.2), and touches its queues no more.
    fn needs_reset(&self) -> bool;
}
