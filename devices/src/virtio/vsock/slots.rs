//! Host sockets by slot, with tokens that do not outlive what they were made for.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::connection::Connection;

/// A connection's two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// Names one socket: slot and generation. A late epoll event or deadline of a socket that is
/// gone names nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Token {
    generation: u32,
    slot: u32,
}

impl Token {
    pub(super) fn to_raw(self) -> u64 {
        (u64::from(self.generation) << 32) | u64::from(self.slot)
    }

    pub(super) fn from_raw(raw: u64) -> Option<Self> {
        Some(Self {
            generation: u32::try_from(raw >> 32).ok()?,
            slot: u32::try_from(raw & 0xffff_ffff).ok()?,
        })
    }

    fn index(self) -> usize {
        usize::try_from(self.slot).unwrap_or(usize::MAX)
    }
}

/// What a host socket is at the moment.
#[derive(Debug)]
pub(super) enum Role {
    /// It has not sent its whole `CONNECT` line yet.
    Greeting { line: Vec<u8> },
    /// It is one end of a connection.
    Peer {
        ports: Ports,
        connection: Box<Connection>,
        /// What the guest sent and the socket did not take yet, at most
        /// [`BUFFER`](super::connection::BUFFER) bytes.
        buffer: VecDeque<u8>,
    },
}

/// A host socket. Readiness is remembered here, for epoll tells of it once (edge-triggered).
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    pub(super) role: Role,
    pub(super) readable: bool,
    /// The other end closed its sending side, so the last read is an end of file.
    pub(super) ended: bool,
    /// The other end is closed in both directions.
    pub(super) hung_up: bool,
    /// epoll also watches for room to write.
    pub(super) watches_room: bool,
    /// What we already shut down of it.
    pub(super) write_closed: bool,
    pub(super) read_closed: bool,
    /// It is in the list of sockets that have something for the guest.
    pub(super) queued: bool,
    deadline: Option<Instant>,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd, role: Role) -> Self {
        Self {
            fd,
            role,
            readable: false,
            ended: false,
            hung_up: false,
            watches_room: false,
            write_closed: false,
            read_closed: false,
            queued: false,
            deadline: None,
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    socket: Option<Socket>,
}

/// All host sockets of a device.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, Token>,
    deadlines: BTreeSet<(Instant, Token)>,
    used: usize,
}

impl Slots {
    pub(super) fn len(&self) -> usize {
        self.used
    }

    pub(super) fn insert(&mut self, socket: Socket) -> Option<Token> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot::default());
                slot
            }
        };
        let place = self.slots.get_mut(usize::try_from(slot).ok()?)?;
        let token = Token {
            generation: place.generation,
            slot,
        };
        if let Role::Peer { ports, .. } = socket.role {
            self.by_ports.insert(ports, token);
        }
        place.socket = Some(socket);
        self.used = self.used.saturating_add(1);
        Some(token)
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut Socket> {
        self.slots
            .get_mut(token.index())
            .filter(|slot| slot.generation == token.generation)?
            .socket
            .as_mut()
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Socket> {
        let slot = self
            .slots
            .get_mut(token.index())
            .filter(|slot| slot.generation == token.generation)?;
        let socket = slot.socket.take()?;
        // The largest generation is kept for the tokens that are no sockets.
        slot.generation = slot.generation.wrapping_add(1) % u32::MAX;
        self.free.push(token.slot);
        self.used = self.used.saturating_sub(1);
        if let Some(at) = socket.deadline {
            self.deadlines.remove(&(at, token));
        }
        if let Role::Peer { ports, .. } = socket.role {
            self.by_ports.remove(&ports);
        }
        Some(socket)
    }

    pub(super) fn find(&self, ports: Ports) -> Option<Token> {
        self.by_ports.get(&ports).copied()
    }

    /// A greeting became a connection.
    pub(super) fn become_peer(&mut self, token: Token, ports: Ports, connection: Connection) {
        if let Some(socket) = self.get_mut(token) {
            socket.role = Role::Peer {
                ports,
                connection: Box::new(connection),
                buffer: VecDeque::new(),
            };
            self.by_ports.insert(ports, token);
        }
    }

    pub(super) fn set_deadline(&mut self, token: Token, deadline: Option<Instant>) {
        let Some(socket) = self.get_mut(token) else {
            return;
        };
        let before = std::mem::replace(&mut socket.deadline, deadline);
        if let Some(at) = before {
            self.deadlines.remove(&(at, token));
        }
        if let Some(at) = deadline {
            self.deadlines.insert((at, token));
        }
    }

    pub(super) fn has_deadline(&mut self, token: Token) -> bool {
        self.get_mut(token).is_some_and(|s| s.deadline.is_some())
    }

    pub(super) fn first_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// A socket whose deadline has passed.
    pub(super) fn expired(&self, now: Instant) -> Option<Token> {
        self.deadlines
            .first()
            .filter(|&&(at, _)| at <= now)
            .map(|&(_, token)| token)
    }

    /// The tokens of all connections (greetings excepted).
    pub(super) fn peers(&self) -> Vec<Token> {
        self.by_ports.values().copied().collect()
    }
}
