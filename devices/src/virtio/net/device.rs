//! The device: rings, features and life cycle around the peer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::{NetBackend, OFFLOADS, Sent};
use super::header::{self, MAX_PACKET};
use super::peer::Peer;
use super::receive::{Delivery, deliver};
use super::state::{Mac, NetConfig, NetState};
use crate::GuestRam;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Activation, DeviceError, Interrupt, SetupError, VirtioDevice, ring};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// `data` of the events in the device loop: a queue's index, or the peer.
const PEER_EVENT: u32 = 2;

/// Bytes of the configuration space up to and with `mtu` (virtio 1.2, 5.1.4).
const CONFIG_LEN: usize = 12;

#[derive(Debug)]
struct Active {
    memory: Arc<GuestRam>,
    features: u64,
    rx: Queue,
    tx: Queue,
    interrupt: Interrupt,
}

/// A virtio-net device.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    offered_offloads: u64,
    peer: Peer,
    /// What the guest was told of the link.
    link_told: bool,
    active: Option<Active>,
    quiesced: bool,
    broken: bool,
    queue_events: Vec<Arc<EventFd>>,
    buffers: Buffers,
    rx_packet: Vec<u8>,
    /// Bytes in `rx_packet` that wait for receive buffers, 0 for none.
    rx_waiting: usize,
    tx_packet: Vec<u8>,
}

impl Net {
    /// A device for a guest that boots.
    ///
    /// # Errors
    /// When the configuration makes no sense or the host lacks descriptors.
    pub fn new(config: NetConfig, backend: Box<dyn NetBackend>) -> Result<Self, SetupError> {
        config.check()?;
        let offloads = backend.offload_features() & OFFLOADS;
        Self::build(config, backend, offloads, true, false)
    }

    /// A device from saved state, quiesced, with a new peer and, when `mac` is given, another
    /// Ethernet address (which a running driver only looks at when it starts).
    ///
    /// # Errors
    /// When the guest uses an offload that the new peer does not have, or the state is not one
    /// that a device has written.
    pub fn restore(
        state: &NetState,
        mac: Option<Mac>,
        backend: Box<dyn NetBackend>,
    ) -> Result<Self, SetupError> {
        let invalid = |what| SetupError::State {
            device: "network",
            what,
        };
        if !state.mac.is_valid() {
            return Err(invalid("its Ethernet address is not one of a station"));
        }
        if state.offered_offloads & !OFFLOADS != 0 {
            return Err(invalid("it offered what no device offers"));
        }
        // A driver that had not decided yet may still take whatever it was offered.
        let used = state.negotiated.unwrap_or(state.offered_offloads) & OFFLOADS;
        if used & !state.offered_offloads != 0 {
            return Err(invalid("the driver took what was not offered"));
        }
        let missing = used & !backend.offload_features();
        if let Some(&(_, feature)) = OFFLOAD_NAMES
            .iter()
            .find(|(bit, _)| missing & (1 << bit) != 0)
        {
            return Err(SetupError::MissingOffload { feature });
        }
        let config = NetConfig {
            mac: mac.unwrap_or(state.mac),
            mtu: state.mtu,
        };
        config.check()?;
        Self::build(config, backend, state.offered_offloads, state.link_up, true)
    }

    fn build(
        config: NetConfig,
        backend: Box<dyn NetBackend>,
        offered_offloads: u64,
        link_told: bool,
        quiesced: bool,
    ) -> Result<Self, SetupError> {
        let failed = SetupError::host("cannot set up the network event sources");
        Ok(Self {
            config,
            offered_offloads,
            peer: Peer::new(backend).map_err(&failed)?,
            link_told,
            active: None,
            quiesced,
            broken: false,
            queue_events: ring::queue_events(QUEUE_SIZES.len()).map_err(&failed)?,
            buffers: Buffers::default(),
            rx_packet: vec![0; MAX_PACKET],
            rx_waiting: 0,
            tx_packet: vec![0; MAX_PACKET],
        })
    }

    /// What is to be saved of the device; meaningful while it is quiesced.
    #[must_use]
    pub fn save(&self) -> NetState {
        NetState {
            mac: self.config.mac,
            mtu: self.config.mtu,
            offered_offloads: self.offered_offloads,
            negotiated: self.active.as_ref().map(|active| active.features),
            link_up: self.link_told,
        }
    }

    /// Whether the peer is there. Once gone it does not come back; build the device anew.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.peer.link_up()
    }

    /// Moves packets both ways, as far as the guest and the peer allow.
    fn run(&mut self) {
        if self.quiesced || self.broken {
            return;
        }
        if let Err(error) = self.turn() {
            tracing::warn!(%error, "the network device needs a reset");
            self.broken = true;
            if let Some(active) = &self.active
                && let Err(error) = active.interrupt.config_change()
            {
                tracing::warn!(%error, "the network interrupt cannot be raised");
            }
        }
    }

    fn turn(&mut self) -> Result<(), DeviceError> {
        if self.active.is_none() {
            return Ok(());
        }
        let more_tx = self.transmit()?;
        let more_rx = self.receive()?;
        if let Some(active) = &self.active
            && self.link_told != self.peer.link_up()
        {
            self.link_told = self.peer.link_up();
            active
                .interrupt
                .config_change()
                .map_err(ring::cannot_interrupt)?;
        }
        if more_tx || more_rx {
            self.peer.kick();
        }
        Ok(())
    }

    /// Sends the guest's packets, at most a queue of them. True when there may be more.
    fn transmit(&mut self) -> Result<bool, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let memory: &GuestRam = &active.memory;
        let mut used = false;
        let mut left = active.tx.size();
        active.tx.disable_notification(memory)?;
        let more = loop {
            if !self.peer.takes_packets() {
                // The peer's room brings us back here.
                break false;
            }
            if left == 0 {
                break true;
            }
            let Some(chain) = ring::pop(&mut active.tx, memory)? else {
                if active.tx.enable_notification(memory)? {
                    active.tx.disable_notification(memory)?;
                    continue;
                }
                break false;
            };
            left = left.saturating_sub(1);
            let head = chain.head_index();
            let packet = gather(&mut self.buffers, memory, chain, &mut self.tx_packet)
                .filter(|&len| {
                    let packet = self.tx_packet.get_mut(..len).unwrap_or_default();
                    header::admit(packet, active.features)
                })
                .and_then(|len| self.tx_packet.get(..len));
            match packet {
                Some(packet) => {
                    if self.peer.send(packet) == Sent::Blocked {
                        active.tx.go_to_previous_position();
                        break false;
                    }
                }
                None => tracing::debug!("the guest sent a frame that is none"),
            }
            active.tx.add_used(memory, head, 0)?;
            used = true;
        };
        self.peer.settle();
        if used && active.tx.needs_notification(memory)? {
            active
                .interrupt
                .used_buffer()
                .map_err(ring::cannot_interrupt)?;
        }
        Ok(more)
    }

    /// Gives the guest what the peer has, at most a queue of packets. True when there is more.
    fn receive(&mut self) -> Result<bool, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let memory: &GuestRam = &active.memory;
        let mergeable = active.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let mut used = false;
        let mut forced = false;
        let mut left = active.rx.size();
        active.rx.disable_notification(memory)?;
        let more = loop {
            if self.rx_waiting == 0 && !self.peer.has_packets() {
                break false;
            }
            if left == 0 {
                break true;
            }
            // Nothing is read from the peer that the guest has no buffer for.
            let posted = active.rx.avail_idx(memory, Ordering::Acquire)?.0;
            let empty = posted == active.rx.next_avail();
            if !empty && self.rx_waiting == 0 {
                match self.peer.receive(&mut self.rx_packet) {
                    Some(len) => self.rx_waiting = len,
                    None => break false,
                }
            }
            let waiting = self.rx_waiting;
            let packet = self.rx_packet.get_mut(..waiting).unwrap_or_default();
            let delivery = if empty {
                Delivery::NoRoom
            } else {
                deliver(&mut active.rx, memory, &mut self.buffers, packet, mergeable)?
            };
            match delivery {
                Delivery::Done { chains } => {
                    used = true;
                    forced |= chains > 1;
                    self.rx_waiting = 0;
                    left = left.saturating_sub(1);
                }
                Delivery::Dropped => {
                    tracing::debug!("the guest's receive buffers are too small for a frame");
                    // A chain that is no buffer may have been given back.
                    used = true;
                    self.rx_waiting = 0;
                    left = left.saturating_sub(1);
                }
                Delivery::NoRoom => {
                    ring::notify_after(&mut active.rx, memory, posted)?;
                    if active.rx.avail_idx(memory, Ordering::Acquire)?.0 != posted {
                        active.rx.disable_notification(memory)?;
                        continue;
                    }
                    break false;
                }
            }
        };
        // Several used entries became visible at once, of which the queue counted one.
        if used && (active.rx.needs_notification(memory)? || forced) {
            active
                .interrupt
                .used_buffer()
                .map_err(ring::cannot_interrupt)?;
        }
        Ok(more)
    }
}

/// Reads a packet of the guest's into `packet`: its length, or `None` when it is none.
fn gather(
    buffers: &mut Buffers,
    memory: &GuestRam,
    chain: DescriptorChain<&GuestRam>,
    packet: &mut [u8],
) -> Option<usize> {
    buffers.load(chain, false).ok()?;
    let place = packet.get_mut(..buffers.len())?;
    buffers.read(memory, 0, place).ok()?;
    Some(place.len())
}

const OFFLOAD_NAMES: [(u32, &str); 6] = [
    (VIRTIO_NET_F_CSUM, "VIRTIO_NET_F_CSUM"),
    (VIRTIO_NET_F_GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM"),
    (VIRTIO_NET_F_GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
    (VIRTIO_NET_F_GUEST_TSO6, "VIRTIO_NET_F_GUEST_TSO6"),
    (VIRTIO_NET_F_HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
    (VIRTIO_NET_F_HOST_TSO6, "VIRTIO_NET_F_HOST_TSO6"),
];

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let mtu = u64::from(self.config.mtu.is_some()) << VIRTIO_NET_F_MTU;
        1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | mtu
            | self.offered_offloads
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.queue_events
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // virtio 1.2, 5.1.4: mac, status, max_virtqueue_pairs, mtu.
        let status = if self.peer.link_up() {
            VIRTIO_NET_S_LINK_UP.to_le_bytes()
        } else {
            [0; 4]
        };
        let mut config = [0; CONFIG_LEN];
        let fields = self
            .config
            .mac
            .bytes()
            .into_iter()
            .chain(status.into_iter().take(2))
            .chain(1u16.to_le_bytes())
            .chain(self.config.mtu.unwrap_or(0).to_le_bytes());
        for (to, from) in config.iter_mut().zip(fields) {
            *to = from;
        }
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
            return Err(DeviceError::Driver("a network device has two queues"));
        };
        if !rx.ready() || !tx.ready() {
            return Err(DeviceError::Driver(
                "a network device needs both its queues",
            ));
        }
        self.peer
            .set_offloads(activation.features & OFFLOADS)
            .map_err(|source| DeviceError::Host {
                context: "the network peer refuses the offloads",
                source,
            })?;
        self.active = Some(Active {
            memory: activation.memory,
            features: activation.features,
            rx,
            tx,
            interrupt: activation.interrupt,
        });
        self.peer.kick();
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.broken = false;
        self.rx_waiting = 0;
        self.link_told = self.peer.link_up();
    }

    fn quiesce(&mut self) -> Result<Vec<QueueState>, DeviceError> {
        // Every packet is moved within one call: none is ever in flight between calls.
        self.quiesced = true;
        Ok(self.active.as_ref().map_or_else(Vec::new, |active| {
            vec![active.rx.state(), active.tx.state()]
        }))
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.quiesced = false;
        self.run();
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

impl MutEventSubscriber for Net {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match usize::try_from(events.data()) {
            Ok(index @ (RX | TX)) => {
                if let Some(event) = self.queue_events.get(index) {
                    ring::drain(event);
                }
            }
            _ => self.peer.on_events(),
        }
        self.run();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let queues = (0u32..).zip(&self.queue_events);
        let all = queues
            .map(|(data, event)| Events::with_data(event.as_ref(), data, EventSet::IN))
            .chain([Events::with_data_raw(
                self.peer.event_fd(),
                PEER_EVENT,
                EventSet::IN,
            )]);
        for events in all {
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "the network device cannot be watched");
                self.broken = true;
            }
        }
    }
}
