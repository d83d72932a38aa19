//! The register window of a virtio device (virtio 1.2, 4.2).

use crate::cpu;
use crate::interrupts::Interrupts;
use crate::memory::Allocator;
use crate::virtio::queue::{Queue, SIZE};

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// Bit of the interrupt status: configuration or device status changed.
const CONFIG_CHANGED: u32 = 2;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_FAILED: u32 = 128;

/// `VIRTIO_F_INDIRECT_DESC`.
pub(crate) const INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const VERSION_1: u64 = 1 << 32;

/// A device's window and interrupt.
pub(crate) struct Transport {
    window: u64,
    pub(crate) gsi: u32,
    vector: Option<u8>,
    /// What both sides agreed on.
    pub(crate) features: u64,
    /// The device told that it can't go on (virtio 1.2, 2.1.2).
    pub(crate) needs_reset: bool,
}

/// A window with a device in it.
pub(crate) struct Found {
    pub(crate) window: u64,
    pub(crate) gsi: u32,
    /// The device's number (virtio 1.2, 5).
    pub(crate) id: u32,
}

/// Looks for a device of version 2 at `window`.
pub(crate) fn probe(window: u64, gsi: u32) -> Option<Found> {
    if window == 0 || !window.is_multiple_of(4) || window >= (4 << 30) - 0x1000 {
        return None;
    }
    // SAFETY: inside the low 4 GiB, which are mapped; a read where nothing is gives all ones.
    let read = |register| unsafe { ((window + register) as *const u32).read_volatile() };
    if read(MAGIC) != u32::from_le_bytes(*b"virt") || read(VERSION) != 2 {
        return None;
    }
    Some(Found {
        window,
        gsi,
        id: read(DEVICE_ID),
    })
    .filter(|found| found.id != 0)
}

impl Transport {
    fn write(&self, register: u64, value: u32) {
        // SAFETY: `probe` found a device here; no memory of Rust lies in its window.
        unsafe { ((self.window + register) as *mut u32).write_volatile(value) }
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: as for `write`.
        unsafe { ((self.window + register) as *const u32).read_volatile() }
    }

    /// Resets the device and agrees on those of `wanted` that it offers (virtio 1.2, 3.1.1, steps
    /// 1 to 6); `None` when it refuses.
    pub(crate) fn start(found: &Found, wanted: u64) -> Option<Self> {
        let mut this = Self {
            window: found.window,
            gsi: found.gsi,
            vector: None,
            features: 0,
            needs_reset: false,
        };
        this.write(STATUS, 0);
        (0..1_000_000).find(|_| this.read(STATUS) == 0)?;
        this.write(STATUS, STATUS_ACKNOWLEDGE);
        this.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        let mut offered = 0;
        for half in [1, 0] {
            this.write(DEVICE_FEATURES_SEL, half);
            offered = offered << 32 | u64::from(this.read(DEVICE_FEATURES));
        }
        this.features = offered & (wanted | VERSION_1 | EVENT_IDX | INDIRECT);
        for half in [0, 1] {
            this.write(DRIVER_FEATURES_SEL, half);
            this.write(DRIVER_FEATURES, (this.features >> (32 * half)) as u32);
        }
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        this.write(STATUS, status);
        if offered & VERSION_1 == 0 || this.read(STATUS) & STATUS_FEATURES_OK == 0 {
            this.write(STATUS, STATUS_FAILED);
            return None;
        }
        Some(this)
    }

    /// Whether a feature was agreed on.
    pub(crate) fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// Makes queue `index` (4.2.3.2); `None` when the device has none or memory is short.
    pub(crate) fn queue(&self, index: u16, allocator: &mut Allocator) -> Option<Queue> {
        self.write(QUEUE_SEL, u32::from(index));
        if self.read(QUEUE_READY) != 0 || self.read(QUEUE_NUM_MAX) < u32::from(SIZE) {
            return None;
        }
        let queue = Queue::new(index, self.features, allocator)?;
        self.write(QUEUE_NUM, u32::from(SIZE));
        for (register, address) in [
            (QUEUE_DESC, queue.descriptors()),
            (QUEUE_DRIVER, queue.available()),
            (QUEUE_DEVICE, queue.used()),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        Some(queue)
    }

    /// The device may begin (3.1.1, step 8).
    pub(crate) fn begin(&mut self, interrupts: &mut Interrupts) {
        self.vector = interrupts.route(self.gsi);
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        self.write(STATUS, status);
    }

    /// Gives up on the device.
    pub(crate) fn fail(&self) {
        self.write(STATUS, STATUS_FAILED);
    }

    /// Tells the device that queue `index` has something new.
    pub(crate) fn notify(&self, index: u16) {
        self.write(QUEUE_NOTIFY, u32::from(index));
    }

    /// Acknowledges an interrupt, if one came; to be called before the queues are looked at for
    /// the last time.
    pub(crate) fn take_interrupt(&mut self) {
        if !self.vector.is_some_and(cpu::take_pending) {
            return;
        }
        let status = self.read(INTERRUPT_STATUS);
        if status & 3 != 0 {
            self.write(INTERRUPT_ACK, status & 3);
        }
        if status & CONFIG_CHANGED != 0 {
            self.needs_reset |= self.read(STATUS) & STATUS_NEEDS_RESET != 0;
        }
    }

    /// Reads `N` bytes of the configuration from `offset`, all of one generation (4.2.2.1).
    pub(crate) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        loop {
            let generation = self.read(CONFIG_GENERATION);
            let mut bytes = [0; N];
            for (at, byte) in (offset..).zip(&mut bytes) {
                // SAFETY: the configuration space of a device's window; bytes may be read anywhere.
                *byte = unsafe { ((self.window + CONFIG + at) as *const u8).read_volatile() };
            }
            if self.read(CONFIG_GENERATION) == generation {
                return bytes;
            }
        }
    }

    /// Reads a 32-bit field of the configuration.
    pub(crate) fn config_u32(&self, offset: u64) -> u32 {
        // Fields are read in their own width (4.2.2.2).
        self.read(CONFIG + offset)
    }

    /// Writes a 32-bit field of the configuration.
    pub(crate) fn set_config_u32(&self, offset: u64, value: u32) {
        self.write(CONFIG + offset, value);
    }

    /// Reads a 64-bit field of the configuration, both halves of one generation.
    pub(crate) fn config_u64(&self, offset: u64) -> u64 {
        loop {
            let generation = self.read(CONFIG_GENERATION);
            let low = self.config_u32(offset);
            let high = self.config_u32(offset + 4);
            if self.read(CONFIG_GENERATION) == generation {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }

    /// The window's address.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }
}
