//! For tests: the driver's side of a split virtqueue on real guest memory, and a device loop.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestRam;

/// Memory of a test guest: [`RAM`] bytes from 0.
pub(crate) const RAM: usize = 32 << 20;

pub(crate) fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap())
}

/// A copy of `memory`, as a restore makes it.
pub(crate) fn copy_of(memory: &GuestRam) -> Arc<GuestRam> {
    let copy = ram();
    for region in memory.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        copy.write_slice(&bytes, region.start_addr()).unwrap();
    }
    copy
}

/// The driver's side of a queue: plain data over guest memory, so it can be cloned with it.
#[derive(Debug, Clone)]
pub(crate) struct DriverQueue {
    base: u64,
    pub(crate) size: u16,
    pub(crate) avail: u16,
    kicked: u16,
    pub(crate) seen_used: u16,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    event_idx: bool,
}

const AVAIL: u64 = 0x2000;
const USED: u64 = 0x4000;
/// Bytes that a queue's rings take.
pub(crate) const RINGS: u64 = 0x8000;

impl DriverQueue {
    pub(crate) fn new(base: u64, size: u16, event_idx: bool) -> Self {
        Self {
            base,
            size,
            avail: 0,
            kicked: 0,
            seen_used: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            event_idx,
        }
    }

    /// The device's side of it, fresh.
    pub(crate) fn device_side(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(u32::try_from(self.base).unwrap()), Some(0));
        queue.set_avail_ring_address(Some(u32::try_from(self.base + AVAIL).unwrap()), Some(0));
        queue.set_used_ring_address(Some(u32::try_from(self.base + USED).unwrap()), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        queue
    }

    /// Writes a raw descriptor.
    pub(crate) fn descriptor(
        &self,
        memory: &GuestRam,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = self.base + u64::from(index) * 16;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain of `parts` (address, length, writable) available; `None` when the queue is
    /// full.
    pub(crate) fn add(&mut self, memory: &GuestRam, parts: &[(u64, u32, bool)]) -> Option<u16> {
        if self.free.len() < parts.len() {
            return None;
        }
        let taken = self.free.split_off(self.free.len() - parts.len());
        for (i, &(address, len, writable)) in parts.iter().enumerate() {
            let next = taken.get(i + 1).copied();
            let flags = u16::from(next.is_some()) | (u16::from(writable) << 1);
            self.descriptor(memory, taken[i], (address, len), flags, next.unwrap_or(0));
        }
        let head = taken[0];
        self.chains[usize::from(head)] = taken;
        self.publish(memory, head);
        Some(head)
    }

    /// Puts a head into the available ring.
    pub(crate) fn publish(&mut self, memory: &GuestRam, head: u16) {
        let slot = self.base + AVAIL + 4 + 2 * u64::from(self.avail % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        memory
            .store(
                self.avail,
                GuestAddress(self.base + AVAIL + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Whether the device wants to hear of what was added since the last call (virtio 1.2,
    /// 2.7.10).
    pub(crate) fn needs_kick(&mut self, memory: &GuestRam) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.avail);
        self.kicked = new;
        if old == new {
            return false;
        }
        let used = GuestAddress(self.base + USED);
        if self.event_idx {
            let event: u16 = memory
                .read_obj(GuestAddress(used.0 + 4 + 8 * u64::from(self.size)))
                .unwrap();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            memory.read_obj::<u16>(used).unwrap() & 1 == 0
        }
    }

    /// The next used chain: head and bytes written. Asks for an interrupt for the one after it.
    pub(crate) fn used(&mut self, memory: &GuestRam) -> Option<(u16, u32)> {
        let used: u16 = memory
            .load(GuestAddress(self.base + USED + 2), Ordering::Acquire)
            .unwrap();
        if used == self.seen_used {
            return None;
        }
        let at = self.base + USED + 4 + 8 * u64::from(self.seen_used % self.size);
        let head = u16::try_from(memory.read_obj::<u32>(GuestAddress(at)).unwrap()).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.seen_used = self.seen_used.wrapping_add(1);
        let used_event = self.base + AVAIL + 4 + 2 * u64::from(self.size);
        memory
            .store(self.seen_used, GuestAddress(used_event), Ordering::SeqCst)
            .unwrap();
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.extend(chain);
        Some((head, len))
    }
}

/// Runs a device as the machine does: an event manager on a thread of its own.
pub(crate) struct DeviceLoop {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceLoop {
    pub(crate) fn start(device: Arc<Mutex<dyn MutEventSubscriber + Send>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut manager =
                EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
            manager.add_subscriber(device);
            while !seen.load(Ordering::SeqCst) {
                manager.run_with_timeout(20).unwrap();
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for DeviceLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the device loop panicked");
        }
    }
}

/// Waits until the device raises its interrupt, at most `limit`.
pub(crate) fn wait_interrupt(line: &EventFd, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    let event = vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0);
    epoll
        .ctl(
            vmm_sys_util::epoll::ControlOperation::Add,
            line.as_raw_fd(),
            event,
        )
        .unwrap();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut events = [event];
        let wait = i32::try_from(left.as_millis()).unwrap();
        match epoll.wait(wait, &mut events) {
            Ok(0) => return false,
            Ok(_) => {
                let _ = line.read();
                return true;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => panic!("{e}"),
        }
    }
}
