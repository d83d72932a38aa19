//! A guest's network driver over real rings.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestRam;
use crate::virtio::net::{HEADER_LEN, Mac, Net, NetBackend, NetConfig};
use crate::virtio::test_rig::{DeviceLoop, DriverQueue, RINGS, ram, wait_interrupt};
use crate::virtio::{Activation, Interrupt, VirtioDevice};

const RX_AREA: u64 = 0x10_0000;
const TX_AREA: u64 = 0x100_0000;
const SLOT: u64 = 0x1_1000;

pub(super) const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

pub(super) fn config() -> NetConfig {
    NetConfig {
        mac: Mac::new([0x52, 0x54, 0, 0xab, 0xcd, 1]).unwrap(),
        mtu: Some(1500),
    }
}

pub(super) struct Guest {
    pub(super) memory: Arc<GuestRam>,
    pub(super) device: Arc<Mutex<Net>>,
    pub(super) rx: DriverQueue,
    pub(super) tx: DriverQueue,
    pub(super) interrupt: Interrupt,
    line: Arc<EventFd>,
    kicks: Vec<Arc<EventFd>>,
    rx_at: HashMap<u16, u64>,
    tx_at: HashMap<u16, u64>,
    tx_free: Vec<u64>,
    rx_size: u32,
    posted: u64,
    partial: Vec<u8>,
    missing: u16,
    /// Split frames over descriptors in odd places.
    pub(super) fragment: bool,
    _loop: DeviceLoop,
}

impl Guest {
    pub(super) fn boot(backend: Box<dyn NetBackend>, features: u64, rx_size: u32) -> Self {
        Self::boot_with(backend, features, rx_size, 128)
    }

    pub(super) fn boot_with(
        backend: Box<dyn NetBackend>,
        features: u64,
        rx_size: u32,
        buffers: u64,
    ) -> Self {
        let device = Net::new(config(), backend).unwrap();
        let rx = DriverQueue::new(0x1_0000, 256, true);
        let tx = DriverQueue::new(0x1_0000 + RINGS, 256, true);
        let queues = Vec::from([&rx, &tx].map(DriverQueue::device_side));
        let mut guest = Self::around(ram(), device, queues, (rx, tx), features, rx_size);
        guest.post_more(buffers);
        guest
    }

    fn around(
        memory: Arc<GuestRam>,
        mut device: Net,
        queues: Vec<Queue>,
        (rx, tx): (DriverQueue, DriverQueue),
        features: u64,
        rx_size: u32,
    ) -> Self {
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let interrupt = Interrupt::new(Arc::clone(&line), 0);
        device
            .activate(Activation {
                memory: Arc::clone(&memory),
                features,
                queues,
                interrupt: interrupt.clone(),
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
            interrupt,
            line,
            kicks,
            rx_at: HashMap::new(),
            tx_at: HashMap::new(),
            tx_free: (0..64).map(|i| TX_AREA + i * SLOT).collect(),
            rx_size,
            posted: 0,
            partial: Vec::new(),
            missing: 0,
            fragment: false,
            _loop: device_loop,
        }
    }

    pub(super) fn quiesce(&self) -> Vec<QueueState> {
        self.device.lock().unwrap().quiesce().unwrap()
    }

    pub(super) fn post(&mut self, at: u64) {
        let head = self
            .rx
            .add(&self.memory, &[(at, self.rx_size, true)])
            .unwrap();
        self.rx_at.insert(head, at);
    }

    /// Posts buffers that were not posted before.
    pub(super) fn post_more(&mut self, buffers: u64) {
        for _ in 0..buffers {
            let at = RX_AREA + self.posted * u64::from(self.rx_size.next_multiple_of(16));
            self.posted += 1;
            self.post(at);
        }
        self.kick();
    }

    pub(super) fn kick(&mut self) {
        for (queue, kick) in [&mut self.rx, &mut self.tx].into_iter().zip(&self.kicks) {
            if queue.needs_kick(&self.memory) {
                kick.write(1).unwrap();
            }
        }
    }

    fn reap_tx(&mut self) {
        while let Some((head, _)) = self.tx.used(&self.memory) {
            self.tx_free.push(self.tx_at.remove(&head).unwrap());
        }
    }

    /// Frames given to the device that it has not used yet.
    pub(super) fn tx_pending(&mut self) -> usize {
        self.reap_tx();
        self.tx_at.len()
    }

    /// Offers a frame with `header` before it; false when the driver is out of slots.
    pub(super) fn try_send(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) -> bool {
        self.reap_tx();
        let Some(at) = self.tx_free.pop() else {
            return false;
        };
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        self.memory
            .write_slice(frame, GuestAddress(at + HEADER_LEN as u64))
            .unwrap();
        let len = u32::try_from(HEADER_LEN + frame.len()).unwrap();
        let parts: &[_] = if self.fragment {
            &[
                (at, 5, false),
                (at + 5, 10, false),
                (at + 15, len - 15, false),
            ]
        } else {
            &[(at, len, false)]
        };
        match self.tx.add(&self.memory, parts) {
            Some(head) => self.tx_at.insert(head, at),
            None => {
                self.tx_free.push(at);
                return false;
            }
        };
        self.kick();
        true
    }

    pub(super) fn send(&mut self, frame: &[u8]) {
        let end = Instant::now() + Duration::from_secs(10);
        while !self.try_send([0; HEADER_LEN], frame) {
            assert!(Instant::now() < end, "the device takes no frames");
            wait_interrupt(&self.line, Duration::from_millis(10));
        }
    }

    /// The next packet received, header included, if there is one.
    pub(super) fn try_receive(&mut self) -> Option<Vec<u8>> {
        loop {
            let Some((head, len)) = self.rx.used(&self.memory) else {
                // virtio 1.2, 5.1.6.4: the buffers of a packet are used together.
                assert_eq!(self.missing, 0, "a packet was shown in part");
                return None;
            };
            let at = self.rx_at.remove(&head).unwrap();
            let mut data = vec![0; len as usize];
            self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
            if self.missing == 0 {
                self.missing = u16::from_le_bytes([data[10], data[11]]);
                self.partial.clear();
            }
            self.partial.extend(data);
            self.missing -= 1;
            self.post(at);
            if self.missing == 0 {
                self.kick();
                return Some(std::mem::take(&mut self.partial));
            }
        }
    }

    pub(super) fn wait(&self, limit: Duration) -> bool {
        wait_interrupt(&self.line, limit)
    }

    /// The next packet, waiting for its interrupt.
    pub(super) fn receive(&mut self) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(Instant::now() < end, "no packet came");
            self.wait(Duration::from_secs(2));
        }
    }

    pub(super) fn config_status(&self) -> u16 {
        let mut status = [0; 2];
        self.device.lock().unwrap().read_config(6, &mut status);
        u16::from_le_bytes(status)
    }
}
