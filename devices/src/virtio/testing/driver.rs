//! A driver that brings a device up through its MMIO transport, on one thread.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::{DriverQueue, TestRam, event};
use crate::virtio::{MmioTransport, TransportState, VirtioDevice};

/// A device, its transport, its event loop and the driver's queues, all on the caller's thread.
pub struct Driver {
    /// The transport; use it for anything that the driver does not do by itself.
    pub transport: MmioTransport,
    /// The driver's queues, in order.
    pub queues: Vec<DriverQueue>,
    line: Arc<EventFd>,
    manager: EventManager<Arc<Mutex<dyn VirtioDevice>>>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("transport", &self.transport)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// A driver that has done nothing yet.
    #[must_use]
    pub fn new(ram: &TestRam, device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let line = event();
        let transport = MmioTransport::new(
            Arc::clone(&device),
            Arc::clone(ram.memory()),
            Arc::clone(&line),
        )
        .expect("a transport");
        Self::around(transport, line, device, Vec::new())
    }

    /// A driver of a device that accepts of `features` what is offered (and always
    /// `VIRTIO_F_VERSION_1`), makes every queue as large as it can be, and sets `DRIVER_OK`.
    #[must_use]
    pub fn start(ram: &TestRam, device: Arc<Mutex<dyn VirtioDevice>>, features: u64) -> Self {
        let mut driver = Self::new(ram, device);
        let accepted = driver.negotiate(features);
        driver.set_up_queues(ram, accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        driver.set(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15, "the device is up");
        driver
    }

    /// A device restored from `state`, still quiesced, with the queues that its driver had.
    ///
    /// # Errors
    /// As [`MmioTransport::restore`].
    pub fn restore(
        ram: &TestRam,
        state: &TransportState,
        device: Arc<Mutex<dyn VirtioDevice>>,
        queues: Vec<DriverQueue>,
    ) -> Result<Self, crate::Error> {
        let line = event();
        let transport = MmioTransport::restore(
            state,
            Arc::clone(&device),
            Arc::clone(ram.memory()),
            Arc::clone(&line),
        )?;
        Ok(Self::around(transport, line, device, queues))
    }

    fn around(
        transport: MmioTransport,
        line: Arc<EventFd>,
        device: Arc<Mutex<dyn VirtioDevice>>,
        queues: Vec<DriverQueue>,
    ) -> Self {
        let mut manager = EventManager::new().expect("an event manager");
        manager.add_subscriber(device);
        Self {
            transport,
            queues,
            line,
            manager,
        }
    }

    /// Goes as far as `FEATURES_OK` (virtio 1.2, 3.1.1, steps 1 to 6) and returns what was accepted.
    pub fn negotiate(&mut self, features: u64) -> u64 {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, 1);
        self.set(VIRTIO_MMIO_STATUS, 3);
        let mut offered = 0;
        for half in [1, 0] {
            self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            offered = offered << 32 | u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES));
        }
        let accepted = (features | 1 << VIRTIO_F_VERSION_1) & offered;
        for (half, word) in halves(accepted) {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, word);
        }
        self.set(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(
            self.get(VIRTIO_MMIO_STATUS),
            11,
            "the features are accepted"
        );
        accepted
    }

    /// Makes all queues and tells the device of them (virtio 1.2, 4.2.3.2).
    pub fn set_up_queues(&mut self, ram: &TestRam, event_idx: bool) {
        for index in 0.. {
            self.set(VIRTIO_MMIO_QUEUE_SEL, index);
            let size = self.get(VIRTIO_MMIO_QUEUE_NUM_MAX);
            if size == 0 {
                break;
            }
            let size = u16::try_from(size).expect("a queue size");
            let queue = DriverQueue::new(ram, size, event_idx);
            self.tell_queue(index, &queue);
            self.queues.push(queue);
        }
    }

    /// Tells the device of queue `index` and makes it ready.
    pub fn tell_queue(&mut self, index: u32, queue: &DriverQueue) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, queue.size().into());
        let registers = [
            VIRTIO_MMIO_QUEUE_DESC_LOW,
            VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            VIRTIO_MMIO_QUEUE_USED_LOW,
        ];
        for (register, address) in registers.into_iter().zip(queue.addresses()) {
            for (half, word) in halves(address.0) {
                self.set(register + 4 * half, word);
            }
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Reads a register.
    #[must_use]
    pub fn get(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn set(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Reads bytes of the configuration space, one by one.
    #[must_use]
    pub fn config(&self, offset: u32, len: u32) -> Vec<u8> {
        (offset..offset + len)
            .map(|at| {
                let mut byte = [0];
                self.transport
                    .read(u64::from(VIRTIO_MMIO_CONFIG + at), &mut byte);
                byte[0]
            })
            .collect()
    }

    /// Notifies queue `index` through its register and lets the device work.
    pub fn kick(&mut self, index: u32) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, index);
        self.run();
    }

    /// Lets the device handle events until none is left.
    ///
    /// # Panics
    /// When the device never comes to rest.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if self.manager.run_with_timeout(0).expect("the event loop") == 0 {
                return;
            }
        }
        panic!("the device spins");
    }

    /// Lets the device handle events until `done`, for devices with threads of their own.
    ///
    /// # Panics
    /// When it is not done after ten seconds.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let limit = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < limit, "the device did not get done");
            self.manager.run_with_timeout(1).expect("the event loop");
        }
    }

    /// Reads and acknowledges the interrupt status, as an interrupt handler does.
    pub fn take_interrupt(&mut self) -> u32 {
        let status = self.get(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.set(VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    /// How often the interrupt line was raised since the last call.
    pub fn raised(&mut self) -> u64 {
        self.line.read().unwrap_or(0)
    }
}

fn halves(value: u64) -> [(u32, u32); 2] {
    let word = |v: u64| u32::try_from(v & 0xffff_ffff).expect("masked");
    [(0, word(value)), (1, word(value >> 32))]
}
