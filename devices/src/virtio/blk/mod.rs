//! The block device (virtio 1.2, 5.2).
//!
//! # Threads
//! While it is active a drive has one I/O thread, which owns its queues, and an engine
//! ([`EngineKind`]) that moves the data: io_uring, or worker threads. vCPU threads and the device
//! loop never do I/O; notifications go from the queue's eventfd straight to the I/O thread.
//!
//! # Forking the process
//! After [`quiesce`](crate::virtio::VirtioDevice::quiesce) nothing is in flight, the ring is idle,
//! and every thread of the drive waits in the kernel holding no lock, until `resume`. In a forked
//! child none of these threads exists: the inherited [`Blk`] must be leaked (`mem::forget`), never
//! dropped or called, for it would wait for them, and its descriptors (queue eventfds, epoll, ring,
//! mailbox) closed. The child builds a drive of its own by [`Blk::restore`]; its ring, epoll
//! instance, eventfds and threads are then new ones.
//!
//! # Hostile drivers
//! A request that has a status byte is answered in it, whatever else is wrong with it. A chain
//! that cannot be answered makes the device `NEEDS_RESET` (virtio 1.2, 2.1.2): it takes nothing
//! more from its rings and answers nothing any more, waits for what is in flight, and needs a reset.

mod config;
mod engine;
mod error;
mod io_thread;
mod mailbox;
mod request;
mod spans;
mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, Events, MutEventSubscriber};
use offshoot_storage::Volume;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

pub use config::{BlkConfig, BlkHost, BlkLimits, feature};
pub use engine::{EngineChoice, EngineKind};
pub use error::BlkError;
pub use state::BlkState;

use self::config::{ConfigSpace, SECTOR, are_valid_queues, is_valid_id, supported_features};
use self::engine::threads::Pool;
use self::engine::uring::Uring;
use self::engine::{Engine, Prepared, prepare};
use self::io_thread::{IoThread, Parts};
use self::request::Rules;
use super::{Activation, DeviceError, VirtioDevice};
use crate::Error;
use crate::event::event;

/// The most requests in flight, over all queues.
const MAX_IN_FLIGHT: usize = 1024;

/// A drive.
#[derive(Debug)]
pub struct Blk {
    /// All that is saved; `needs_reset` in it is as it was at the restore.
    state: BlkState,
    config_space: ConfigSpace,
    queue_sizes: Vec<u16>,
    queue_events: Vec<Arc<EventFd>>,
    host: BlkHost,
    engine: EngineKind,
    /// Opened ahead for the first activation.
    prepared: Option<Prepared>,
    needs_reset: Arc<AtomicBool>,
    quiesced: bool,
    io: Option<IoThread>,
}

impl Blk {
    /// A new drive on a volume.
    ///
    /// # Errors
    /// [`BlkError`] is the source: the configuration is out of range, the volume does not fit it, or
    /// the engine that was asked for cannot be had.
    pub fn new(config: BlkConfig, host: BlkHost) -> Result<Self, Error> {
        Self::from_config(config, host).map_err(BlkError::in_config)
    }

    fn from_config(config: BlkConfig, host: BlkHost) -> Result<Self, BlkError> {
        if !is_valid_id(&config.id) {
            return Err(BlkError::Id);
        }
        let (queues, queue_size) = (config.queues, config.queue_size);
        if !are_valid_queues(queues, queue_size) {
            return Err(BlkError::Queues {
                drive: config.id,
                queues,
                size: queue_size,
            });
        }
        let state = BlkState {
            capacity_sectors: sectors_of(&*host.volume)?,
            features: supported_features(config.read_only, usize::from(queues)),
            limits: BlkLimits::for_queue_size(queue_size),
            id: config.id,
            serial: config.serial,
            read_only: config.read_only,
            queues,
            queue_size,
            needs_reset: false,
        };
        Self::build(state, host, false)
    }

    /// The drive that `state` was saved from, on a volume with the same content. It is quiesced.
    ///
    /// # Errors
    /// [`BlkError`] is the source: the state could not be a drive's, the volume is not of the size
    /// that the guest knows or is read-only when the drive is not, or the engine cannot be had.
    pub fn restore(state: BlkState, host: BlkHost) -> Result<Self, Error> {
        Self::from_state(state, host).map_err(BlkError::in_state)
    }

    fn from_state(state: BlkState, host: BlkHost) -> Result<Self, BlkError> {
        state.check()?;
        let found = sectors_of(&*host.volume)?;
        if found != state.capacity_sectors {
            return Err(BlkError::SizeMismatch {
                drive: state.id,
                saved: state.capacity_sectors.saturating_mul(SECTOR),
                volume: host.volume.name().to_string(),
                found: host.volume.size(),
            });
        }
        Self::build(state, host, true)
    }

    fn build(state: BlkState, host: BlkHost, quiesced: bool) -> Result<Self, BlkError> {
        if host.volume.is_read_only() && !state.read_only {
            return Err(BlkError::ReadOnlyVolume {
                drive: state.id,
                volume: host.volume.name().to_string(),
            });
        }
        if !(1..=16).contains(&host.threads) {
            return Err(BlkError::Threads {
                drive: state.id,
                threads: host.threads,
            });
        }
        let prepared = prepare(host.engine, &host.volume, slots(&state))?;
        let queue_events = (0..state.queues)
            .map(|_| event().map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(|source| BlkError::Host {
                context: "cannot make a drive's queue events",
                source,
            })?;
        Ok(Self {
            config_space: ConfigSpace::new(state.capacity_sectors, state.queues, &state.limits),
            queue_sizes: vec![state.queue_size; usize::from(state.queues)],
            queue_events,
            engine: prepared.kind(),
            prepared: Some(prepared),
            needs_reset: Arc::new(AtomicBool::new(state.needs_reset)),
            quiesced,
            io: None,
            state,
            host,
        })
    }

    /// The drive's id within its machine.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.state.id
    }

    /// The engine that does this drive's I/O.
    #[must_use]
    pub fn engine(&self) -> EngineKind {
        self.engine
    }

    /// The volume behind the drive.
    #[must_use]
    pub fn volume(&self) -> &Arc<dyn Volume> {
        &self.host.volume
    }

    /// The drive's state. Together with the queues' state that
    /// [`quiesce`](VirtioDevice::quiesce) returned it is complete for as long as the drive stays
    /// quiesced.
    #[must_use]
    pub fn save(&self) -> BlkState {
        BlkState {
            needs_reset: self.needs_reset(),
            ..self.state.clone()
        }
    }

    fn make_engine(&mut self, activation: &Activation) -> Result<Box<dyn Engine>, DeviceError> {
        let slots = slots(&self.state);
        // After a reset the engine is made anew, of the same kind.
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => {
                let choice = match self.engine {
                    EngineKind::IoUring => EngineChoice::IoUring,
                    EngineKind::Threads => EngineChoice::Threads,
                };
                prepare(choice, &self.host.volume, slots).map_err(|error| DeviceError::Host {
                    context: "cannot open a drive's I/O engine again",
                    source: std::io::Error::other(error),
                })?
            }
        };
        let volume = Arc::clone(&self.host.volume);
        let memory = Arc::clone(&activation.memory);
        let engine: std::io::Result<Box<dyn Engine>> = match prepared {
            Prepared::IoUring(ring) => {
                Uring::new(*ring, volume, memory, slots).map(|e| Box::new(e) as _)
            }
            Prepared::Threads => {
                Pool::new(volume, memory, self.host.threads).map(|e| Box::new(e) as _)
            }
        };
        engine.map_err(|source| DeviceError::Host {
            context: "cannot make a drive's I/O engine",
            source,
        })
    }
}

/// How many requests may be in flight.
fn slots(state: &BlkState) -> usize {
    (usize::from(state.queues) * usize::from(state.queue_size)).min(MAX_IN_FLIGHT)
}

fn sectors_of(volume: &dyn Volume) -> Result<u64, BlkError> {
    let size = volume.size();
    if size.is_multiple_of(SECTOR) {
        Ok(size / SECTOR)
    } else {
        Err(BlkError::Unaligned {
            volume: volume.name().to_string(),
            size,
        })
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.state.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.queue_events
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config_space.read(offset, data);
    }

    /// Nothing in it is writable, for `VIRTIO_BLK_F_CONFIG_WCE` is not offered.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        if self.io.is_some() {
            return Err(DeviceError::Driver("the drive is active already"));
        }
        if activation.queues.len() != self.queue_sizes.len() {
            return Err(DeviceError::Driver(
                "the drive has another number of queues",
            ));
        }
        if activation.features & feature::OF_DEVICE_TYPE & !self.state.features != 0 {
            return Err(DeviceError::Driver(
                "a feature was accepted but not offered",
            ));
        }
        let queues = std::mem::take(&mut activation.queues);
        for queue in queues.iter().filter(|queue| queue.ready()) {
            if queue.max_size() > self.state.queue_size || !queue.is_valid(&*activation.memory) {
                return Err(DeviceError::Driver("a queue is not in guest memory"));
            }
        }
        let engine = self.make_engine(&activation)?;
        let event_idx = activation.features & feature::RING_EVENT_IDX != 0;
        let parts = Parts {
            queues: queues
                .into_iter()
                .map(|mut queue| {
                    queue.set_event_idx(event_idx);
                    queue
                })
                .zip(self.queue_events.iter().cloned())
                .collect(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            rules: Rules {
                capacity_sectors: self.state.capacity_sectors,
                read_only: self.state.read_only,
                serial: self.state.serial,
                features: activation.features,
                limits: self.state.limits,
            },
            engine,
            slots: slots(&self.state),
            // Virtio 1.2, 5.2.6.2: for a driver that cannot flush, a write is stable when it is
            // completed.
            write_through: activation.features & feature::FLUSH == 0,
            needs_reset: Arc::clone(&self.needs_reset),
            parked: self.quiesced,
        };
        let io = IoThread::spawn(&self.state.id, parts).map_err(|source| DeviceError::Host {
            context: "cannot start a drive's I/O thread",
            source,
        })?;
        self.io = Some(io);
        Ok(())
    }

    fn reset(&mut self) {
        self.io = None;
        self.needs_reset.store(false, Ordering::Release);
    }

    fn quiesce(&mut self) -> Result<Vec<QueueState>, DeviceError> {
        let states = match &self.io {
            Some(io) => io.quiesce()?,
            None => Vec::new(),
        };
        self.quiesced = true;
        Ok(states)
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        if let Some(io) = &self.io {
            io.resume()?;
        }
        self.quiesced = false;
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }
}

/// The drive has a thread of its own; the device loop has nothing to do for it.
impl MutEventSubscriber for Blk {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}
