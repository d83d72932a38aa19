//! A guest's vsock driver and sockets, speaking packets over real rings.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestRam;
use crate::virtio::test_rig::{DeviceLoop, DriverQueue, RINGS, copy_of, ram, wait_interrupt};
use crate::virtio::vsock::packet::{HEADER_LEN, Header, Op, TYPE_STREAM};
use crate::virtio::vsock::{GuestCid, HOST_CID, Vsock, VsockBinding, VsockState};
use crate::virtio::{Activation, Interrupt, VirtioDevice};

pub(super) const CID: u64 = 42;
const RX_BUFFER: u32 = 44 + 4096;
const RX_AREA: u64 = 0x10_0000;
const TX_AREA: u64 = 0x80_0000;
const TX_SLOT: u64 = 0x11000;
const TX_SLOTS: u16 = 64;
const EVENT_AREA: u64 = 0x8_0000;
/// How much unsent data an echoing socket keeps before it stops reading.
const ECHO_WINDOW: usize = 256 * 1024;

#[derive(Debug, Clone, Default)]
pub(super) struct Sock {
    pub(super) established: bool,
    pub(super) gone: bool,
    pub(super) rx: Vec<u8>,
    pub(super) out: VecDeque<u8>,
    pub(super) peer_shut: u32,
    pub(super) peer_alloc: u32,
    peer_fwd: u32,
    sent: u32,
    fwd: u32,
    told: u32,
    echo: bool,
    shut_sent: u32,
}

/// A guest: driver state, its memory and the device it talks to.
pub(super) struct Guest {
    pub(super) memory: Arc<GuestRam>,
    pub(super) device: Arc<Mutex<Vsock>>,
    pub(super) rx: DriverQueue,
    pub(super) tx: DriverQueue,
    pub(super) event: DriverQueue,
    rx_at: HashMap<u16, u64>,
    event_at: HashMap<u16, u64>,
    tx_at: HashMap<u16, u64>,
    tx_slots: Vec<u64>,
    tx_wait: VecDeque<(Header, Vec<u8>)>,
    kicks: Vec<Arc<EventFd>>,
    line: Arc<EventFd>,
    pub(super) cid: u64,
    /// Receive buffer that this guest announces.
    pub(super) buf_alloc: u32,
    /// Ports that are listened on; the data of their connections is echoed.
    pub(super) echo_ports: HashSet<u32>,
    /// Ports that are listened on; the data of their connections is kept.
    pub(super) sink_ports: HashSet<u32>,
    pub(super) socks: HashMap<(u32, u32), Sock>,
    pub(super) resets_seen: usize,
    /// Split packets in odd places, as a driver may.
    pub(super) fragment: bool,
    /// The driver handles events (and gives their buffers back).
    pub(super) handles_events: bool,
    pub(super) takes_rx: bool,
    _loop: DeviceLoop,
}

pub(super) fn binding(dir: &tempfile::TempDir) -> VsockBinding {
    VsockBinding::new(dir.path().join("v.sock"))
}

impl Guest {
    pub(super) fn boot(binding: VsockBinding) -> Self {
        Self::boot_with(binding, true, 8)
    }

    pub(super) fn boot_with(binding: VsockBinding, event_idx: bool, events: u16) -> Self {
        let memory = ram();
        let device = Vsock::new(GuestCid::new(CID).unwrap(), binding).unwrap();
        let rx = DriverQueue::new(0x1_0000, 256, event_idx);
        let tx = DriverQueue::new(0x1_0000 + RINGS, 256, event_idx);
        let event = DriverQueue::new(0x1_0000 + 2 * RINGS, 64, event_idx);
        let queues = Vec::from([&rx, &tx, &event].map(DriverQueue::device_side));
        let mut guest = Self::around(memory, device, queues, rx, tx, event);
        for slot in 0..128u64 {
            guest.post_rx(RX_AREA + slot * 0x2000);
        }
        for slot in 0..u64::from(events) {
            guest.post_event(EVENT_AREA + slot * 16);
        }
        guest.kick();
        guest
    }

    fn around(
        memory: Arc<GuestRam>,
        mut device: Vsock,
        queues: Vec<virtio_queue::Queue>,
        rx: DriverQueue,
        tx: DriverQueue,
        event: DriverQueue,
    ) -> Self {
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        device
            .activate(Activation {
                memory: Arc::clone(&memory),
                features: device.features(),
                queues,
                interrupt: Interrupt::new(Arc::clone(&line), 0),
            })
            .unwrap();
        let kicks = device.queue_events().to_vec();
        let device = Arc::new(Mutex::new(device));
        let device_loop = DeviceLoop::start(Arc::clone(&device) as _);
        Self {
            memory,
            device,
            rx,
            tx,
            event,
            rx_at: HashMap::new(),
            event_at: HashMap::new(),
            tx_at: HashMap::new(),
            tx_slots: (0..u64::from(TX_SLOTS))
                .map(|i| TX_AREA + i * TX_SLOT)
                .collect(),
            tx_wait: VecDeque::new(),
            kicks,
            line,
            cid: CID,
            buf_alloc: 256 * 1024,
            echo_ports: HashSet::new(),
            sink_ports: HashSet::new(),
            socks: HashMap::new(),
            resets_seen: 0,
            fragment: false,
            handles_events: true,
            takes_rx: true,
            _loop: device_loop,
        }
    }

    /// Quiesces the device and returns what a snapshot holds of it.
    pub(super) fn capture(&self) -> (Vec<QueueState>, VsockState) {
        let mut device = self.device.lock().unwrap();
        let queues = device.quiesce().unwrap();
        (queues, device.save())
    }

    /// A copy of this guest from a capture: memory, driver, and a device restored from state. Not
    /// resumed yet.
    pub(super) fn restore(
        &self,
        (queues, state): &(Vec<QueueState>, VsockState),
        cid: Option<u64>,
        binding: VsockBinding,
    ) -> Self {
        let memory = copy_of(&self.memory);
        let cid = cid.map(|cid| GuestCid::new(cid).unwrap());
        let device = Vsock::restore(state, cid, binding).unwrap();
        let queues = queues
            .iter()
            .map(|state| virtio_queue::Queue::try_from(*state).unwrap())
            .collect();
        let mut copy = Self::around(
            memory,
            device,
            queues,
            self.rx.clone(),
            self.tx.clone(),
            self.event.clone(),
        );
        copy.rx_at = self.rx_at.clone();
        copy.event_at = self.event_at.clone();
        copy.tx_at = self.tx_at.clone();
        copy.tx_slots = self.tx_slots.clone();
        copy.tx_wait = self.tx_wait.clone();
        copy.cid = self.cid;
        copy.buf_alloc = self.buf_alloc;
        copy.echo_ports = self.echo_ports.clone();
        copy.sink_ports = self.sink_ports.clone();
        copy.socks = self.socks.clone();
        copy.handles_events = self.handles_events;
        copy
    }

    pub(super) fn resume(&self) {
        self.device.lock().unwrap().resume().unwrap();
    }

    fn post_rx(&mut self, at: u64) {
        let parts: &[_] = if self.fragment {
            &[
                (at, 20, true),
                (at + 20, 100, true),
                (at + 120, RX_BUFFER - 120, true),
            ]
        } else {
            &[(at, RX_BUFFER, true)]
        };
        if let Some(head) = self.rx.add(&self.memory, parts) {
            self.rx_at.insert(head, at);
        }
    }

    pub(super) fn post_event(&mut self, at: u64) {
        let head = self.event.add(&self.memory, &[(at, 4, true)]).unwrap();
        self.event_at.insert(head, at);
    }

    pub(super) fn kick(&mut self) {
        for (queue, kick) in [&mut self.rx, &mut self.tx, &mut self.event]
            .into_iter()
            .zip(&self.kicks)
        {
            if queue.needs_kick(&self.memory) {
                kick.write(1).unwrap();
            }
        }
    }

    /// Sends a raw packet (now, or when the queue has room).
    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        self.tx_wait.push_back((header, data.to_vec()));
        self.pump_tx();
    }

    fn pump_tx(&mut self) {
        while let Some((header, data)) = self.tx_wait.front() {
            let Some(at) = self.tx_slots.pop() else { break };
            self.memory
                .write_slice(&header.encode(), GuestAddress(at))
                .unwrap();
            let behind = at + HEADER_LEN as u64;
            self.memory.write_slice(data, GuestAddress(behind)).unwrap();
            let len = u32::try_from(data.len()).unwrap();
            let whole = (at, 44 + len, false);
            let parts: Vec<_> = if self.fragment {
                let a = len / 3;
                [
                    (at, 10),
                    (at + 10, 34),
                    (behind, a),
                    (behind + u64::from(a), len - a),
                ]
                .into_iter()
                .filter(|&(_, len)| len > 0)
                .map(|(at, len)| (at, len, false))
                .collect()
            } else {
                vec![whole]
            };
            let Some(head) = self.tx.add(&self.memory, &parts) else {
                self.tx_slots.push(at);
                break;
            };
            self.tx_at.insert(head, at);
            self.tx_wait.pop_front();
        }
    }

    pub(super) fn header(&self, (guest, host): (u32, u32), op: Op) -> Header {
        let sock = self.socks.get(&(guest, host));
        Header {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            socket_type: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: sock.map_or(0, |s| s.fwd),
            ..Header::default()
        }
    }

    pub(super) fn control(&mut self, key: (u32, u32), op: Op, flags: u32) {
        let mut header = self.header(key, op);
        header.flags = flags;
        self.send(header, &[]);
    }

    /// Asks for a connection to a port of the host's.
    pub(super) fn connect(&mut self, guest: u32, host: u32) -> (u32, u32) {
        let key = (guest, host);
        self.socks.insert(key, Sock::default());
        self.control(key, Op::Request, 0);
        self.kick();
        key
    }

    /// One turn of the driver: takes everything that is there. True when something happened.
    pub(super) fn step(&mut self) -> bool {
        let mut busy = false;
        while let Some((head, _)) = self.tx.used(&self.memory) {
            self.tx_slots.push(self.tx_at.remove(&head).unwrap());
            busy = true;
        }
        if self.handles_events {
            while let Some((head, len)) = self.event.used(&self.memory) {
                let at = self.event_at.remove(&head).unwrap();
                assert_eq!(len, 4);
                assert_eq!(self.memory.read_obj::<u32>(GuestAddress(at)).unwrap(), 0);
                self.resets_seen += 1;
                for sock in self.socks.values_mut().filter(|s| s.established) {
                    sock.gone = true;
                }
                let mut cid = [0; 8];
                self.device.lock().unwrap().read_config(0, &mut cid);
                self.cid = u64::from_le_bytes(cid);
                self.post_event(at);
                busy = true;
            }
        }
        while self.takes_rx {
            let Some((head, len)) = self.rx.used(&self.memory) else {
                break;
            };
            busy = true;
            let at = self.rx_at.remove(&head).unwrap();
            let mut raw = [0; HEADER_LEN];
            self.memory.read_slice(&mut raw, GuestAddress(at)).unwrap();
            let header = Header::decode(&raw);
            let mut data = vec![0; header.len as usize];
            assert_eq!(len, 44 + header.len, "used length: {header:?}");
            self.memory
                .read_slice(&mut data, GuestAddress(at + 44))
                .unwrap();
            self.post_rx(at);
            self.on_packet(header, &data);
        }
        self.pump_socks();
        self.pump_tx();
        self.kick();
        busy
    }

    fn on_packet(&mut self, header: Header, data: &[u8]) {
        assert_eq!(header.dst_cid, self.cid);
        assert_eq!(header.src_cid, HOST_CID);
        let key = (header.dst_port, header.src_port);
        if header.op == Op::Request as u16 {
            let echo = self.echo_ports.contains(&key.0);
            if !echo && !self.sink_ports.contains(&key.0) {
                self.control(key, Op::Reset, 0);
                return;
            }
            assert!(
                self.socks.get(&key).is_none_or(|s| s.gone),
                "a port pair was reused"
            );
            self.socks.insert(
                key,
                Sock {
                    established: true,
                    echo,
                    peer_alloc: header.buf_alloc,
                    peer_fwd: header.fwd_cnt,
                    ..Sock::default()
                },
            );
            self.control(key, Op::Response, 0);
            return;
        }
        let Some(sock) = self.socks.get_mut(&key).filter(|s| !s.gone) else {
            if header.op != Op::Reset as u16 {
                self.control(key, Op::Reset, 0);
            }
            return;
        };
        sock.peer_alloc = header.buf_alloc;
        sock.peer_fwd = header.fwd_cnt;
        match Op::from_raw(header.op).unwrap() {
            Op::Request => unreachable!(),
            Op::Response => sock.established = true,
            Op::Reset => sock.gone = true,
            Op::Shutdown => sock.peer_shut |= header.flags,
            Op::Data => {
                assert!(sock.established);
                sock.rx.extend_from_slice(data);
                let held = u32::try_from(sock.rx.len()).unwrap();
                // virtio 1.2, 5.10.6.3.1: the sender keeps within the receiver's room.
                assert!(
                    !sock.echo || held <= self.buf_alloc,
                    "the device overran its credit"
                );
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => self.control(key, Op::CreditUpdate, 0),
        }
    }

    fn pump_socks(&mut self) {
        let keys: Vec<_> = self.socks.keys().copied().collect();
        for key in keys {
            let buf_alloc = self.buf_alloc;
            let sock = self.socks.get_mut(&key).unwrap();
            if sock.gone || !sock.established {
                continue;
            }
            if sock.echo && sock.out.len() < ECHO_WINDOW && !sock.rx.is_empty() {
                sock.fwd = sock.fwd.wrapping_add(u32::try_from(sock.rx.len()).unwrap());
                let data = std::mem::take(&mut sock.rx);
                sock.out.extend(data);
            }
            let owes = sock.fwd.wrapping_sub(sock.told) > buf_alloc / 2;
            if owes {
                sock.told = sock.fwd;
            }
            let mut packets = Vec::new();
            loop {
                let flying = sock.sent.wrapping_sub(sock.peer_fwd);
                let room = sock.peer_alloc.saturating_sub(flying) as usize;
                let n = room.min(sock.out.len()).min(16 * 1024);
                if n == 0 {
                    break;
                }
                sock.sent = sock.sent.wrapping_add(u32::try_from(n).unwrap());
                packets.push(sock.out.drain(..n).collect::<Vec<u8>>());
            }
            let ends = sock.echo && sock.peer_shut & 2 != 0 && sock.out.is_empty();
            let ends = ends && sock.rx.is_empty() && sock.shut_sent == 0;
            let closed = sock.peer_shut == 3 && sock.echo;
            if ends && !closed {
                sock.shut_sent = 3;
            }
            sock.gone |= closed;
            if owes {
                self.control(key, Op::CreditUpdate, 0);
            }
            for data in packets {
                let mut header = self.header(key, Op::Data);
                header.len = u32::try_from(data.len()).unwrap();
                self.send(header, &data);
            }
            if closed {
                self.control(key, Op::Reset, 0);
            } else if ends {
                self.control(key, Op::Shutdown, 3);
            }
        }
    }

    /// Takes what a (not echoing) socket received.
    pub(super) fn take(&mut self, key: (u32, u32)) -> Vec<u8> {
        let sock = self.socks.get_mut(&key).unwrap();
        let data = std::mem::take(&mut sock.rx);
        sock.fwd = sock.fwd.wrapping_add(u32::try_from(data.len()).unwrap());
        data
    }

    /// Runs the driver until `done`, by interrupts alone: a lost one is a failure.
    pub(super) fn run_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            while self.step() {}
            if done(self) {
                return;
            }
            assert!(Instant::now() < end, "timed out: {what}");
            wait_interrupt(&self.line, Duration::from_millis(50));
        }
    }

    /// Runs the driver for some time.
    pub(super) fn run_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            while self.step() {}
            wait_interrupt(&self.line, Duration::from_millis(5));
        }
    }
}
