//! The device: rings, features and life cycle around the muxer.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::mux::Mux;
use super::packet::{HEADER_LEN, Header};
use super::reset::Gate;
use super::state::{GuestCid, VsockBinding, VsockState};
use crate::GuestRam;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Activation, DeviceError, Interrupt, SetupError, VirtioDevice, ring};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Stream sockets are what a device without feature bits has, too (virtio 1.2, 5.10.3).
const VIRTIO_VSOCK_F_STREAM: u32 = 0;
const FEATURES: u64 = 1 << VIRTIO_VSOCK_F_STREAM;

/// `data` of the events in the device loop: a queue's index, or the muxer.
const MUX_EVENT: u32 = 3;

/// Turns of one call: what is left after them waits for the next one, so that other devices get
/// theirs.
const MAX_TURNS: usize = 4;

#[derive(Debug)]
struct Active {
    memory: Arc<GuestRam>,
    rx: Queue,
    tx: Queue,
    event: Option<Queue>,
    interrupt: Interrupt,
}

/// A virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    mux: Mux,
    gate: Gate,
    active: Option<Active>,
    quiesced: bool,
    broken: bool,
    queue_events: Vec<Arc<EventFd>>,
    buffers: Buffers,
}

impl Vsock {
    /// A device for a guest that boots. It listens from now on.
    ///
    /// # Errors
    /// When the socket path cannot be listened on (too long, in use, stale) or the host lacks
    /// descriptors.
    pub fn new(cid: GuestCid, binding: VsockBinding) -> Result<Self, SetupError> {
        Self::build(Mux::new(cid, binding, 0)?, Gate::Open, false)
    }

    /// A device from saved state, quiesced, with the CID saved or with a new one, which the guest
    /// reads when it handles the transport reset.
    ///
    /// # Errors
    /// As for [`new`](Self::new), and when the state is not one that a device has written.
    pub fn restore(
        state: &VsockState,
        cid: Option<GuestCid>,
        binding: VsockBinding,
    ) -> Result<Self, SetupError> {
        let saved = GuestCid::new(u64::from(state.cid)).map_err(|_| SetupError::State {
            device: "vsock",
            what: "its CID is a reserved one",
        })?;
        let mux = Mux::new(cid.unwrap_or(saved), binding, state.last_host_port)?;
        let goal = state.reset_goal;
        Self::build(mux, Gate::Due { goal }, true)
    }

    fn build(mux: Mux, gate: Gate, quiesced: bool) -> Result<Self, SetupError> {
        let queue_events = ring::queue_events(QUEUE_SIZES.len())
            .map_err(SetupError::host("cannot create the vsock queue events"))?;
        Ok(Self {
            mux,
            gate,
            active: None,
            quiesced,
            broken: false,
            queue_events,
            buffers: Buffers::default(),
        })
    }

    /// What is to be saved of the device; meaningful while it is quiesced.
    #[must_use]
    pub fn save(&self) -> VsockState {
        VsockState {
            // A `GuestCid` fits.
            cid: u32::try_from(self.mux.cid().get()).unwrap_or(u32::MAX),
            last_host_port: self.mux.last_host_port(),
            reset_goal: self.gate.goal(),
        }
    }

    /// The guest's CID.
    #[must_use]
    pub fn cid(&self) -> GuestCid {
        self.mux.cid()
    }

    /// Moves packets both ways, as far as the guest and the host allow.
    fn run(&mut self) {
        if self.quiesced || self.broken {
            return;
        }
        if let Err(error) = self.turns() {
            tracing::warn!(%error, "the vsock device needs a reset");
            self.broken = true;
            if let Some(active) = &self.active {
                // virtio 1.2, 2.1.2: the driver is told that the device needs a reset.
                if let Err(error) = active.interrupt.config_change() {
                    tracing::warn!(%error, "the vsock interrupt cannot be raised");
                }
            }
        }
    }

    fn turns(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if self.gate != Gate::Open {
            let limit = self.mux.binding().reset_timeout;
            let (gate, sent) = self
                .gate
                .advance(active.event.as_mut(), &active.memory, limit)?;
            if gate != self.gate {
                self.gate = gate;
                self.mux.set_alarm(gate.alarm());
            }
            if sent {
                signal(&active.interrupt)?;
            }
            if gate != Gate::Open {
                return Ok(());
            }
        }
        let mut more = true;
        for _ in 0..MAX_TURNS {
            let tx = active.take(&mut self.mux, &mut self.buffers)?;
            let rx = active.give(&mut self.mux, &mut self.buffers)?;
            more = tx || rx;
            if !more {
                break;
            }
        }
        if more {
            self.mux.kick();
        }
        Ok(())
    }
}

impl Active {
    /// Takes the guest's packets. True when there may be more to take now.
    fn take(&mut self, mux: &mut Mux, buffers: &mut Buffers) -> Result<bool, DeviceError> {
        let memory: &GuestRam = &self.memory;
        let mut used = false;
        let mut left = self.tx.size();
        self.tx.disable_notification(memory)?;
        let more = loop {
            if !mux.takes_packets() {
                // Resets wait for receive buffers, whose arrival brings us back here.
                break false;
            }
            if left == 0 {
                break true;
            }
            let Some(chain) = ring::pop(&mut self.tx, memory)? else {
                break self.tx.enable_notification(memory)?;
            };
            left = left.saturating_sub(1);
            let head = chain.head_index();
            receive(mux, buffers, memory, chain);
            self.tx.add_used(memory, head, 0)?;
            used = true;
        };
        if used && self.tx.needs_notification(memory)? {
            signal(&self.interrupt)?;
        }
        Ok(more)
    }

    /// Gives the guest what there is for it. True when there is more and the guest has room.
    fn give(&mut self, mux: &mut Mux, buffers: &mut Buffers) -> Result<bool, DeviceError> {
        let memory: &GuestRam = &self.memory;
        let mut used = false;
        let mut left = self.rx.size();
        self.rx.disable_notification(memory)?;
        let throttled = !mux.takes_packets();
        let mut more = loop {
            if !mux.has_packets() {
                break false;
            }
            if left == 0 {
                break true;
            }
            let Some(chain) = ring::pop(&mut self.rx, memory)? else {
                if self.rx.enable_notification(memory)? {
                    self.rx.disable_notification(memory)?;
                    continue;
                }
                break false;
            };
            left = left.saturating_sub(1);
            let head = chain.head_index();
            let room = buffers
                .load(chain, true)
                .map_or(0, |()| buffers.len().saturating_sub(HEADER_LEN));
            let written = if room == 0 {
                // virtio 1.2, 5.10.6.1.1: a receive buffer holds a header and some data.
                0
            } else {
                let Some(header) = mux.next_packet(room) else {
                    self.rx.go_to_previous_position();
                    continue;
                };
                let data = mux.payload(&header);
                buffers
                    .write(memory, 0, &header.encode())
                    .and_then(|()| buffers.write(memory, HEADER_LEN, data))
                    .map_err(|_| DeviceError::Driver("a vsock buffer is outside guest memory"))?;
                HEADER_LEN.saturating_add(data.len())
            };
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            self.rx.add_used(memory, head, written)?;
            used = true;
        };
        if used && self.rx.needs_notification(memory)? {
            signal(&self.interrupt)?;
        }
        // The guest's packets were kept back for want of room that is there now.
        more |= throttled && mux.takes_packets();
        Ok(more)
    }
}

/// Hands one packet of the guest's to the muxer. One that is no packet is dropped.
fn receive(
    mux: &mut Mux,
    buffers: &mut Buffers,
    memory: &GuestRam,
    chain: virtio_queue::DescriptorChain<&GuestRam>,
) {
    let mut raw = [0; HEADER_LEN];
    let read = buffers
        .load(chain, false)
        .and_then(|()| buffers.read(memory, 0, &mut raw));
    match read {
        Ok(()) => mux.receive(&Header::decode(&raw), &mut |data| {
            buffers.read(memory, HEADER_LEN, data).is_ok()
        }),
        Err(fault) => tracing::debug!(?fault, "the guest sent a vsock packet that is none"),
    }
}

fn signal(interrupt: &Interrupt) -> Result<(), DeviceError> {
    interrupt.used_buffer().map_err(ring::cannot_interrupt)
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.queue_events
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // virtio 1.2, 5.10.4: `guest_cid`, le64, is all there is.
        let config = self.mux.cid().get().to_le_bytes();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
            return Err(DeviceError::Driver("a vsock device has three queues"));
        };
        if !rx.ready() || !tx.ready() {
            return Err(DeviceError::Driver(
                "a vsock device needs its receive and transmit queues",
            ));
        }
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            event: queues.next(),
            interrupt: activation.interrupt,
        });
        // Host programs may have asked for connections already; the device loop sees to them.
        self.mux.kick();
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.broken = false;
        self.gate = Gate::Open;
        self.mux.set_alarm(None);
        self.mux.forget_guest();
    }

    fn quiesce(&mut self) -> Result<Vec<QueueState>, DeviceError> {
        // Every packet is moved within one call: none is ever in flight between calls.
        self.quiesced = true;
        Ok(self.active.as_ref().map_or_else(Vec::new, |active| {
            let mut states = vec![active.rx.state(), active.tx.state()];
            states.extend(active.event.as_ref().map(Queue::state));
            states
        }))
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.quiesced = false;
        if self.active.is_none() {
            // No driver, so no connections that it could still believe in.
            self.gate = Gate::Open;
        }
        self.run();
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

impl MutEventSubscriber for Vsock {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match usize::try_from(events.data()) {
            Ok(index @ (RX | TX | EVENT)) => {
                if let Some(event) = self.queue_events.get(index) {
                    ring::drain(event);
                }
            }
            _ => self.mux.on_events(),
        }
        self.run();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let queues = (0u32..).zip(&self.queue_events);
        let all = queues
            .map(|(data, event)| Events::with_data(event.as_ref(), data, EventSet::IN))
            .chain([Events::with_data_raw(
                self.mux.event_fd(),
                MUX_EVENT,
                EventSet::IN,
            )]);
        for events in all {
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "the vsock device cannot be watched");
                self.broken = true;
            }
        }
    }
}
