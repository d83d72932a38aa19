//! A device's interrupt line.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// The device used a buffer (virtio 1.2, 4.2.2 `InterruptStatus` bit 0).
pub const USED_BUFFER: u32 = 1;
/// The device's configuration changed (virtio 1.2, 4.2.2 `InterruptStatus` bit 1).
pub const CONFIG_CHANGE: u32 = 2;

/// The interrupt of one virtio device: the status register that the driver reads and
/// acknowledges, and the eventfd that raises the line (an irqfd, where there is KVM).
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    generation: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt with `status` bits already pending, raised through `line`.
    #[must_use]
    pub fn new(line: Arc<EventFd>, status: u32) -> Self {
        Self {
            status: Arc::new(AtomicU32::new(status & (USED_BUFFER | CONFIG_CHANGE))),
            generation: Arc::new(AtomicU32::new(0)),
            line,
        }
    }

    /// The same interrupt, with the configuration at `generation`.
    #[must_use]
    pub fn with_generation(self, generation: u32) -> Self {
        self.generation.store(generation, Ordering::SeqCst);
        self
    }

    /// Tells the driver that buffers were used.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn used_buffer(&self) -> io::Result<()> {
        self.raise(USED_BUFFER)
    }

    /// Tells the driver that the configuration changed, or that the device needs a reset
    /// (virtio 1.2, 2.1.2), and moves the configuration to its next generation.
    ///
    /// Call it in the same hold of the device's lock in which the configuration was changed: so a
    /// driver that sees the same generation before and after reading the configuration has read it
    /// untorn (virtio 1.2, 2.5.1).
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn config_change(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE)
    }

    /// The generation of the configuration (virtio 1.2, 4.2.2 `ConfigGeneration`).
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The eventfd that raises the line.
    #[must_use]
    pub fn line(&self) -> &Arc<EventFd> {
        &self.line
    }

    /// The pending bits, as the driver reads them.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has handled `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Raises the line again when bits are pending: what was in flight to the guest when its
    /// state was captured arrives at least once in the machine that is built from it.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn raise_pending(&self) -> io::Result<()> {
        if self.status() == 0 {
            Ok(())
        } else {
            self.line.write(1)
        }
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.write(1)
    }
}
