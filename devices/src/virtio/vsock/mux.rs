//! The muxer: host sockets on one side, packets on the other.
//!
//! # Readiness
//! All host sockets are in one inner epoll instance, whose descriptor is what the device loop
//! watches. Sockets and the listener are edge-triggered there and their readiness is remembered,
//! so a guest that takes nothing, or a device that is quiesced, costs no wake-ups. Room to write
//! is only watched while bytes wait for it. The timer and the kick are level-triggered and read
//! at once.
//!
//! # Bounds
//! Sockets by `max_connections`; bytes per connection by [`BUFFER`]; resets that wait for the
//! guest's receive buffers by [`MAX_REPLIES`], beyond which no more packets are taken from it;
//! work per call by a number of events and accepted sockets.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{BUFFER, Connection, Outgoing, Phase, Reaction};
use super::greeting::{self, Greeting};
use super::listener::Listener;
use super::packet::{Header, Op, TYPE_STREAM};
use super::ports::HostPorts;
use super::slots::{Ports, Role, Slots, Socket, Token};
use super::state::{GuestCid, VsockBinding};
use crate::event::event;
use crate::virtio::SetupError;

/// The host's CID (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;

/// Resets that may wait for the guest to take them.
const MAX_REPLIES: usize = 256;
const MAX_ACCEPTS: usize = 64;
const MAX_EVENTS: usize = 128;
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const KICK: u64 = u64::MAX - 2;

/// [`BUFFER`] as a length.
const BUFFER_LEN: usize = 128 * 1024;
const _: () = assert!(BUFFER_LEN as u64 == BUFFER as u64);

/// Bytes of the guest's that one call brings to the muxer, and that a packet to the guest holds.
pub(super) type Payload<'a> = &'a mut dyn FnMut(&mut [u8]) -> bool;

pub(super) struct Mux {
    cid: GuestCid,
    binding: VsockBinding,
    listener: Listener,
    epoll: Epoll,
    timer: TimerFd,
    kick: EventFd,
    armed: Option<Instant>,
    /// A deadline of the device itself.
    alarm: Option<Instant>,
    accept_retry: Option<Instant>,
    ports: HostPorts,
    slots: Slots,
    replies: VecDeque<Header>,
    ready: VecDeque<Token>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Mux {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mux")
            .field("cid", &self.cid)
            .field("path", &self.binding.path)
            .field("sockets", &self.slots.len())
            .field("replies", &self.replies.len())
            .field("ready", &self.ready.len())
            .finish_non_exhaustive()
    }
}

impl Mux {
    pub(super) fn new(
        cid: GuestCid,
        binding: VsockBinding,
        last_host_port: u32,
    ) -> Result<Self, SetupError> {
        let failed = SetupError::host("cannot set up the vsock event sources");
        let epoll = Epoll::new().map_err(&failed)?;
        let timer = TimerFd::new().map_err(|e| failed(e.into()))?;
        let kick = event().map_err(&failed)?;
        let ports = HostPorts::start_after(last_host_port).map_err(&failed)?;
        let listener = Listener::bind(&binding.path, binding.replace_stale)?;
        for (fd, set, data) in [
            (timer.as_raw_fd(), EventSet::IN, TIMER),
            (kick.as_raw_fd(), EventSet::IN, KICK),
            (
                listener.as_fd().as_raw_fd(),
                EventSet::IN | EventSet::EDGE_TRIGGERED,
                LISTENER,
            ),
        ] {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(set, data))
                .map_err(&failed)?;
        }
        Ok(Self {
            cid,
            binding,
            listener,
            epoll,
            timer,
            kick,
            armed: None,
            alarm: None,
            accept_retry: None,
            ports,
            slots: Slots::default(),
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            scratch: vec![0; BUFFER_LEN],
        })
    }

    pub(super) fn cid(&self) -> GuestCid {
        self.cid
    }

    pub(super) fn last_host_port(&self) -> u32 {
        self.ports.last()
    }

    pub(super) fn binding(&self) -> &VsockBinding {
        &self.binding
    }

    /// The descriptor that is readable when [`on_events`](Self::on_events) has something to do.
    pub(super) fn event_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Makes the device loop come back to this device.
    pub(super) fn kick(&self) {
        // It cannot fail but by a full counter, which kicks as well.
        let _ = self.kick.write(1);
    }

    /// Sets the device's own deadline; the device loop calls when it has passed.
    pub(super) fn set_alarm(&mut self, alarm: Option<Instant>) {
        self.alarm = alarm;
        self.arm_timer();
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Whether more packets of the guest can be taken.
    pub(super) fn takes_packets(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// The guest's driver is gone: so are all connections. Host programs that still greet stay.
    pub(super) fn forget_guest(&mut self) {
        self.replies.clear();
        self.ready.clear();
        for token in self.slots.peers() {
            self.drop_socket(token);
        }
        self.arm_timer();
    }

    // ---- host to device -------------------------------------------------------------------

    /// Looks at what happened on the host's side. Touches no guest memory.
    pub(super) fn on_events(&mut self) {
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                tracing::warn!(%error, "waiting for vsock events failed");
                return;
            }
        };
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.accept(),
                TIMER => {
                    let _ = self.timer.wait();
                    self.armed = None;
                }
                KICK => {
                    let _ = self.kick.read();
                }
                raw => {
                    if let Some(token) = Token::from_raw(raw) {
                        self.on_socket_event(token, event.event_set());
                    }
                }
            }
        }
        self.on_time(Instant::now());
        self.arm_timer();
    }

    fn on_time(&mut self, now: Instant) {
        if self.accept_retry.is_some_and(|at| at <= now) {
            self.accept_retry = None;
            self.accept();
        }
        if self.alarm.is_some_and(|at| at <= now) {
            self.alarm = None;
        }
        while let Some(token) = self.slots.expired(now) {
            self.refuse(token);
        }
    }

    fn arm_timer(&mut self) {
        let first = [self.slots.first_deadline(), self.alarm, self.accept_retry]
            .into_iter()
            .flatten()
            .min();
        let Some(first) = first else {
            return;
        };
        // A wake-up that comes too early does no harm; one that is set too late does.
        if self.armed.is_some_and(|armed| armed <= first) {
            return;
        }
        let wait = first
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        match self.timer.reset(wait, None) {
            Ok(()) => self.armed = Some(first),
            Err(error) => tracing::warn!(%error, "the vsock timer cannot be set"),
        }
    }

    fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTS {
            match self.listener.accept() {
                Ok(fd) if self.slots.len() < self.binding.max_connections => {
                    self.insert(Socket::new(fd, Role::Greeting { line: Vec::new() }));
                }
                Ok(_) => tracing::warn!("a vsock connection was refused: too many are open"),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(%error, "a vsock connection cannot be accepted");
                    self.accept_retry = Instant::now().checked_add(ACCEPT_RETRY);
                    return;
                }
            }
        }
        // Edge-triggered: nobody will say again that there are more.
        self.accept_retry = Some(Instant::now());
    }

    fn insert(&mut self, socket: Socket) -> Option<Token> {
        let fd = socket.fd.as_raw_fd();
        let greets = matches!(socket.role, Role::Greeting { .. });
        let token = self.slots.insert(socket)?;
        let added = self.epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(interest(false), token.to_raw()),
        );
        if let Err(error) = added {
            tracing::warn!(%error, "a vsock connection cannot be watched");
            self.slots.remove(token);
            return None;
        }
        if greets {
            let deadline = Instant::now().checked_add(self.binding.greeting_timeout);
            self.slots.set_deadline(token, deadline);
        }
        Some(token)
    }

    fn on_socket_event(&mut self, token: Token, set: EventSet) {
        let Some(socket) = self.slots.get_mut(token) else {
            return;
        };
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            socket.hung_up = true;
        }
        if set.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            socket.ended = true;
        }
        if socket.ended || set.contains(EventSet::IN) {
            socket.readable = true;
        }
        if matches!(socket.role, Role::Greeting { .. }) {
            self.greet(token);
        } else {
            self.flush(token);
        }
    }

    fn greet(&mut self, token: Token) {
        let Some(socket) = self.slots.get_mut(token) else {
            return;
        };
        let Role::Greeting { line } = &mut socket.role else {
            return;
        };
        match greeting::read(&socket.fd, line) {
            Greeting::Partial => {}
            Greeting::Invalid => drop(self.drop_socket(token)),
            Greeting::Connect(guest) => {
                let slots = &self.slots;
                let tries = slots.len().saturating_add(1);
                let host = self
                    .ports
                    .next(tries, |host| slots.find(Ports { host, guest }).is_some());
                let Some(host) = host else {
                    self.drop_socket(token);
                    return;
                };
                self.slots
                    .become_peer(token, Ports { host, guest }, Connection::from_host());
                let deadline = Instant::now().checked_add(self.binding.connect_timeout);
                self.slots.set_deadline(token, deadline);
                self.settle(token);
            }
        }
    }

    /// Gives the host what waits for it.
    fn flush(&mut self, token: Token) {
        let Some(socket) = self.slots.get_mut(token) else {
            return;
        };
        let Role::Peer {
            connection, buffer, ..
        } = &mut socket.role
        else {
            return;
        };
        while connection.host_receives() && !buffer.is_empty() {
            let (front, _) = buffer.as_slices();
            match rustix::net::send(&socket.fd, front, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    buffer.drain(..sent.min(buffer.len()));
                    connection.on_forwarded(count(sent));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => connection.on_host_deaf(),
            }
        }
        self.settle(token);
    }

    // ---- guest to device ------------------------------------------------------------------

    /// Takes a packet of the guest's. `payload` fills a buffer of `header.len` bytes with its
    /// data, or says that the packet does not hold them.
    pub(super) fn receive(&mut self, header: &Header, payload: Payload<'_>) {
        let addressed = header.dst_cid == HOST_CID && header.src_cid == self.cid.get();
        // virtio 1.2, 5.10.6.4.2: a packet of an unknown type is answered with a reset.
        if !addressed || header.socket_type != TYPE_STREAM {
            self.reply_reset(header);
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        match self.slots.find(ports) {
            Some(token) => self.receive_for(token, header, payload),
            None if header.op == Op::Request as u16 => self.connect(ports, header),
            None => self.reply_reset(header),
        }
        self.arm_timer();
    }

    fn connect(&mut self, ports: Ports, header: &Header) {
        if self.slots.len() >= self.binding.max_connections {
            tracing::warn!("a guest's vsock connection was refused: too many are open");
            self.reply_reset(header);
            return;
        }
        let fd = match self.listener.connect_to(ports.host) {
            Ok(fd) => fd,
            Err(error) => {
                tracing::debug!(port = ports.host, %error, "nobody takes the guest's connection");
                self.reply_reset(header);
                return;
            }
        };
        let role = Role::Peer {
            ports,
            connection: Box::new(Connection::from_guest(header)),
            buffer: VecDeque::new(),
        };
        match self.insert(Socket::new(fd, role)) {
            Some(token) => self.settle(token),
            None => self.reply_reset(header),
        }
    }

    fn receive_for(&mut self, token: Token, header: &Header, payload: Payload<'_>) {
        let Some(socket) = self.slots.get_mut(token) else {
            return;
        };
        let Role::Peer {
            ports,
            connection,
            buffer,
        } = &mut socket.role
        else {
            return;
        };
        match connection.on_packet(header) {
            Reaction::Nothing => self.settle(token),
            Reaction::Gone => drop(self.drop_socket(token)),
            Reaction::Refuse => self.refuse(token),
            Reaction::Accepted => {
                let line = format!("OK {}\n", ports.host);
                let sent = rustix::net::send(&socket.fd, line.as_bytes(), SendFlags::NOSIGNAL);
                // The socket is fresh: it takes a line at once, or its other end is gone.
                if sent == Ok(line.len()) {
                    self.slots.set_deadline(token, None);
                    self.settle(token);
                } else {
                    self.refuse(token);
                }
            }
            Reaction::Deliver => {
                let len = usize::try_from(header.len).unwrap_or(usize::MAX);
                let data = self.scratch.get_mut(..len);
                let Some(data) = data.and_then(|data| payload(data).then_some(data)) else {
                    self.refuse(token);
                    return;
                };
                let mut rest: &[u8] = data;
                while buffer.is_empty() && connection.host_receives() && !rest.is_empty() {
                    match rustix::net::send(&socket.fd, rest, SendFlags::NOSIGNAL) {
                        Ok(sent) => {
                            connection.on_forwarded(count(sent));
                            rest = rest.get(sent..).unwrap_or_default();
                        }
                        Err(Errno::INTR) => {}
                        Err(Errno::AGAIN) => break,
                        Err(_) => connection.on_host_deaf(),
                    }
                }
                if connection.host_receives() {
                    buffer.extend(rest);
                } else {
                    connection.on_forwarded(count(rest.len()));
                }
                self.settle(token);
            }
        }
    }

    // ---- device to guest ------------------------------------------------------------------

    /// The next packet for the guest, resets first, then one packet of each connection in turn.
    /// Its data (`header.len` bytes, at most `room`) is in [`payload`](Self::payload).
    pub(super) fn next_packet(&mut self, room: usize) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        // Without room a connection with data would stay at the head of the line for ever.
        while room > 0
            && let Some(token) = self.ready.pop_front()
        {
            if let Some(socket) = self.slots.get_mut(token) {
                socket.queued = false;
                let packet = packet_of(socket, &mut self.scratch, room);
                self.settle(token);
                if let Some(mut header) = packet {
                    header.src_cid = HOST_CID;
                    header.dst_cid = self.cid.get();
                    self.arm_timer();
                    return Some(header);
                }
            }
        }
        None
    }

    /// The data of the packet that [`next_packet`](Self::next_packet) returned last.
    pub(super) fn payload(&self, header: &Header) -> &[u8] {
        usize::try_from(header.len)
            .ok()
            .and_then(|len| self.scratch.get(..len))
            .unwrap_or_default()
    }

    // ---- what follows from all of it --------------------------------------------------------

    /// Draws the consequences of a change: half-closes, the end, what is watched and queued.
    fn settle(&mut self, token: Token) {
        let Some(socket) = self.slots.get_mut(token) else {
            return;
        };
        let Role::Peer {
            connection, buffer, ..
        } = &mut socket.role
        else {
            return;
        };
        if socket.hung_up && connection.phase() == Phase::Requested {
            // The host program left before the guest answered.
            if connection.announced() {
                self.refuse(token);
            } else {
                self.drop_socket(token);
            }
            return;
        }
        if socket.hung_up && connection.host_receives() {
            connection.on_host_deaf();
        }
        if socket.hung_up && !connection.takes_host_data() {
            connection.on_host_end();
        }
        if !connection.host_receives() && !buffer.is_empty() {
            buffer.clear();
            connection.on_forwarded(connection.buffered());
        }
        if connection.guest_sends_no_more() && buffer.is_empty() && !socket.write_closed {
            socket.write_closed = true;
            let _ = rustix::net::shutdown(&socket.fd, Shutdown::Write);
        }
        if connection.guest_receives_no_more() && !socket.read_closed {
            socket.read_closed = true;
            let _ = rustix::net::shutdown(&socket.fd, Shutdown::Read);
        }
        if connection.guest_closed() && buffer.is_empty() {
            // virtio 1.2, 5.10.6.5: a full shutdown is answered with a reset.
            self.refuse(token);
            return;
        }
        let waits_for_room = !buffer.is_empty();
        if waits_for_room != socket.watches_room {
            socket.watches_room = waits_for_room;
            let event = EpollEvent::new(interest(waits_for_room), token.to_raw());
            let fd = socket.fd.as_raw_fd();
            if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
                tracing::warn!(%error, "a vsock connection cannot be watched");
            }
        }
        if !socket.queued && connection.has_next(socket.readable) {
            socket.queued = true;
            self.ready.push_back(token);
        }
        let lingers = connection.guest_closed() || connection.awaits_reset();
        if lingers && !self.slots.has_deadline(token) {
            let deadline = Instant::now().checked_add(self.binding.linger_timeout);
            self.slots.set_deadline(token, deadline);
        }
    }

    /// Ends a connection from our side: the guest gets a reset, if it knows of it.
    fn refuse(&mut self, token: Token) {
        if let Some(Role::Peer {
            ports, connection, ..
        }) = self.drop_socket(token)
            && connection.announced()
        {
            self.replies.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.cid.get(),
                src_port: ports.host,
                dst_port: ports.guest,
                socket_type: TYPE_STREAM,
                op: Op::Reset as u16,
                ..Header::default()
            });
        }
    }

    /// Answers a packet that belongs to no connection; a reset is never answered.
    fn reply_reset(&mut self, header: &Header) {
        if header.op != Op::Reset as u16 {
            self.replies.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                socket_type: header.socket_type,
                op: Op::Reset as u16,
                ..Header::default()
            });
        }
    }

    /// Closes a socket and forgets it.
    fn drop_socket(&mut self, token: Token) -> Option<Role> {
        let socket = self.slots.remove(token)?;
        // Closing also ends the watch: nobody else holds the descriptor.
        Some(socket.role)
    }
}

/// The next packet of a connection, ports, operation, length and credit filled in, with its data
/// at the start of `scratch`.
fn packet_of(socket: &mut Socket, scratch: &mut [u8], room: usize) -> Option<Header> {
    let Role::Peer {
        ports, connection, ..
    } = &mut socket.role
    else {
        return None;
    };
    let mut header = Header {
        src_port: ports.host,
        dst_port: ports.guest,
        socket_type: TYPE_STREAM,
        ..Header::default()
    };
    loop {
        match connection.next(socket.readable)? {
            Outgoing::Control(op, flags) => {
                header.op = op as u16;
                header.flags = flags;
            }
            Outgoing::Data(credit) => {
                let most = room.min(usize::try_from(credit).unwrap_or(usize::MAX));
                let buffer = scratch.get_mut(..most).unwrap_or_default();
                if buffer.is_empty() {
                    return None;
                }
                match rustix::net::recv(&socket.fd, &mut *buffer, RecvFlags::empty()) {
                    Ok((got, _)) if got > 0 => {
                        // A short read has emptied the socket; more data is a new edge.
                        socket.readable = got == most || socket.ended;
                        connection.on_sent(count(got));
                        header.op = Op::Data as u16;
                        header.len = count(got);
                    }
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => {
                        socket.readable = false;
                        return None;
                    }
                    ended => {
                        socket.readable = false;
                        connection.on_host_end();
                        if socket.hung_up || ended.is_err() {
                            connection.on_host_deaf();
                        }
                        continue;
                    }
                }
            }
        }
        connection.stamp(&mut header);
        return Some(header);
    }
}

fn interest(room: bool) -> EventSet {
    let set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room { set | EventSet::OUT } else { set }
}

/// Lengths here are at most [`BUFFER`].
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
