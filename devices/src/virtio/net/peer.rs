//! The backend with its readiness and the state of the link.
//!
//! The backend's descriptor is in an inner epoll instance of ours, edge-triggered, and its
//! readiness is remembered: a guest without receive buffers, or a device that is quiesced, leaves
//! the frames where they are without a wake-up for each. Room to send is watched only while
//! something waits for it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{NetBackend, Sent};
use crate::event::event;

const PEER: u64 = 0;
const KICK: u64 = 1;

pub(super) struct Peer {
    backend: Box<dyn NetBackend>,
    epoll: Epoll,
    kick: EventFd,
    readable: bool,
    blocked: bool,
    watches_room: bool,
    link_up: bool,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("backend", &self.backend)
            .field("readable", &self.readable)
            .field("blocked", &self.blocked)
            .field("link_up", &self.link_up)
            .finish_non_exhaustive()
    }
}

impl Peer {
    pub(super) fn new(backend: Box<dyn NetBackend>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let kick = event()?;
        let fd = backend.fd().as_raw_fd();
        epoll.ctl(ControlOperation::Add, fd, interest(false))?;
        epoll.ctl(
            ControlOperation::Add,
            kick.as_raw_fd(),
            EpollEvent::new(EventSet::IN, KICK),
        )?;
        Ok(Self {
            backend,
            epoll,
            kick,
            readable: true,
            blocked: false,
            watches_room: false,
            link_up: true,
        })
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Makes the device loop come back to this device.
    pub(super) fn kick(&self) {
        // It cannot fail but by a full counter, which kicks as well.
        let _ = self.kick.write(1);
    }

    pub(super) fn link_up(&self) -> bool {
        self.link_up
    }

    pub(super) fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        self.backend.set_offloads(features)
    }

    /// Takes note of what happened.
    pub(super) fn on_events(&mut self) {
        let mut events = [EpollEvent::default(); 2];
        match self.epoll.wait(0, &mut events) {
            Ok(count) => {
                for event in events.iter().take(count) {
                    if event.data() == KICK {
                        let _ = self.kick.read();
                        continue;
                    }
                    let set = event.event_set();
                    if set.contains(EventSet::OUT) {
                        self.blocked = false;
                    }
                    // An end or an error shows when it is read.
                    self.readable |= set != EventSet::OUT;
                }
            }
            Err(error) => tracing::warn!(%error, "waiting for network events failed"),
        }
    }

    /// Whether a packet may be waiting.
    pub(super) fn has_packets(&self) -> bool {
        self.readable && self.link_up
    }

    pub(super) fn receive(&mut self, packet: &mut [u8]) -> Option<usize> {
        if !self.has_packets() {
            return None;
        }
        match self.backend.receive(packet) {
            Ok(Some(len)) => Some(len),
            Ok(None) => {
                self.readable = false;
                None
            }
            Err(error) => {
                self.link_down(&error);
                None
            }
        }
    }

    /// Whether packets can be sent; without a link they can, and are lost.
    pub(super) fn takes_packets(&self) -> bool {
        !self.blocked
    }

    pub(super) fn send(&mut self, packet: &[u8]) -> Sent {
        if !self.link_up {
            return Sent::Taken;
        }
        match self.backend.send(packet) {
            Ok(Sent::Taken) => Sent::Taken,
            Ok(Sent::Blocked) => {
                self.blocked = true;
                Sent::Blocked
            }
            Err(error) => {
                self.link_down(&error);
                Sent::Taken
            }
        }
    }

    /// After sending: finishes what was taken in part, and watches for room if need be.
    pub(super) fn settle(&mut self) {
        if !self.link_up {
            return;
        }
        match self.backend.flush() {
            Ok(done) => self.blocked |= !done,
            Err(error) => {
                self.link_down(&error);
                return;
            }
        }
        if self.blocked != self.watches_room {
            self.watches_room = self.blocked;
            let fd = self.backend.fd().as_raw_fd();
            let changed = self
                .epoll
                .ctl(ControlOperation::Modify, fd, interest(self.blocked));
            if let Err(error) = changed {
                self.link_down(&error);
            }
        }
    }

    fn link_down(&mut self, error: &io::Error) {
        if self.link_up {
            tracing::warn!(%error, "the network peer is gone: the link is down");
            self.link_up = false;
            self.blocked = false;
            self.readable = false;
            let fd = self.backend.fd().as_raw_fd();
            // It may have left by itself.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }
}

fn interest(room: bool) -> EpollEvent {
    let set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    EpollEvent::new(if room { set | EventSet::OUT } else { set }, PEER)
}
