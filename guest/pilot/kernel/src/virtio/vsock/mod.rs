//! Sockets (virtio 1.2, 5.10): listens, connects, and forgets every connection when the host
//! says that it has.

mod client;
mod connection;
mod packet;

use offshoot_protocol::{Reply, Request, SOURCE_SEED, pattern};

use self::connection::{BUFFER, Connection, Role, Stage};
use self::packet::{HEADER, Header, NO_RECEIVE, NO_SEND, STREAM, op};
use crate::interrupts::Interrupts;
use crate::memory::{Allocator, copy_in, copy_out};
use crate::virtio::mmio::{Found, Transport};
use crate::virtio::queue::{Piece, Queue};

const CONFIG_GUEST_CID: u64 = 0;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT_RESET: u32 = 0;

/// Connections at a time.
const CONNECTIONS: usize = 16;
const BUFFERS: u16 = 32;
const RX_BUFFER: usize = 16384;
const TX_BUFFER: usize = 16384;
/// Where a packet's data lies in its sending buffer.
const TX_DATA: usize = 64;
const MAX_DATA: usize = TX_BUFFER - TX_DATA;
const EVENTS: u16 = 4;
const EVENT_BUFFER: usize = 8;
/// Sending buffers that data leaves for answers.
const RESERVE: u32 = 4;
/// Packets taken, and packets sent for one connection, before everything else has its turn.
const TURN: usize = 32;

/// Names a connection for a reply: its place, and which of those that had it.
#[derive(Clone, Copy)]
pub(crate) struct Ticket {
    place: usize,
    generation: u32,
}

/// A socket device.
pub(crate) struct Vsock {
    pub(crate) transport: Transport,
    rx: Queue,
    tx: Queue,
    events: Queue,
    rx_buffers: *mut u8,
    tx_buffers: *mut u8,
    event_buffers: *mut u8,
    /// Sending buffers that the device does not have, one bit each.
    tx_free: u32,
    pub(crate) cid: u64,
    connections: [Connection; CONNECTIONS],
    /// Transport resets seen.
    pub(crate) resets: u32,
    next_port: u32,
    /// Something waits for a sending buffer.
    blocked: bool,
    broken: bool,
}

impl Vsock {
    /// Sets the device up; `None` when it refuses or memory is short.
    pub(crate) fn start(
        found: &Found,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) -> Option<Self> {
        let mut transport = Transport::start(found, 0)?;
        let mut rx = transport.queue(0, allocator)?;
        let mut tx = transport.queue(1, allocator)?;
        let mut events = transport.queue(2, allocator)?;
        let rx_buffers = allocator.pages(RX_BUFFER * usize::from(BUFFERS))?;
        let tx_buffers = allocator.pages(TX_BUFFER * usize::from(BUFFERS))?;
        let event_buffers = allocator.pages(EVENT_BUFFER * usize::from(EVENTS))?;
        let buffers = allocator.pages(BUFFER * CONNECTIONS)?;
        for index in 0..BUFFERS {
            rx.add(&[receive_piece(rx_buffers, index)], index);
        }
        for index in 0..EVENTS {
            events.add(&[event_piece(event_buffers, index)], index);
        }
        tx.disarm();
        let cid = transport.config_u64(CONFIG_GUEST_CID);
        transport.begin(interrupts);
        rx.kick(&transport);
        events.kick(&transport);
        Some(Self {
            transport,
            rx,
            tx,
            events,
            rx_buffers,
            tx_buffers,
            event_buffers,
            tx_free: u32::MAX,
            cid,
            connections: core::array::from_fn(|i| {
                Connection::new(buffers.wrapping_add(BUFFER * i))
            }),
            resets: 0,
            next_port: 0x4000_0000,
            blocked: false,
            broken: false,
        })
    }

    /// Connections in use.
    pub(crate) fn open_connections(&self) -> usize {
        self.connections
            .iter()
            .filter(|c| c.stage != Stage::Closed)
            .count()
    }

    /// Takes what came in, sends what can be sent; whether there was anything.
    pub(crate) fn poll(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.transport.take_interrupt();
        let mut any = self.take_events();
        self.blocked = false;
        self.reclaim();
        let mut taken = false;
        for _ in 0..TURN {
            // Each packet may need an answer.
            if self.tx_free.count_ones() < 2 {
                self.blocked = true;
                break;
            }
            let Some(done) = self.rx.take() else { break };
            self.receive(done.token, done.len);
            self.rx
                .add(&[receive_piece(self.rx_buffers, done.token)], done.token);
            taken = true;
        }
        if taken {
            self.rx.kick(&self.transport);
        }
        any |= taken;
        for place in 0..CONNECTIONS {
            if self.connections[place].stage != Stage::Closed {
                any |= self.pump(place);
            }
        }
        self.tx.kick(&self.transport);
        let broken = self.rx.broken || self.tx.broken || self.events.broken;
        if broken || self.transport.needs_reset {
            self.transport.fail();
            self.broken = true;
        }
        any
    }

    /// Asks for an interrupt with whatever comes next; whether there is something already.
    pub(crate) fn arm(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let ready = self.rx.arm() | self.events.arm();
        ready | (self.blocked && self.tx.arm())
    }

    /// Asks for no interrupts.
    pub(crate) fn disarm(&mut self) {
        self.rx.disarm();
        self.tx.disarm();
        self.events.disarm();
    }

    /// The next request on any control connection.
    pub(crate) fn next_request(&mut self) -> Option<(Ticket, u32, Request)> {
        self.connections
            .iter_mut()
            .enumerate()
            .find_map(|(place, connection)| {
                let (tag, request) = connection.next_request()?;
                let generation = connection.generation;
                Some((Ticket { place, generation }, tag, request))
            })
    }

    /// Sends a reply, unless the connection has gone meanwhile.
    pub(crate) fn reply(&mut self, ticket: Ticket, tag: u32, reply: &Reply) {
        let connection = &mut self.connections[ticket.place];
        if connection.generation == ticket.generation && connection.stage == Stage::Open {
            connection.set_reply(tag, reply);
            self.pump(ticket.place);
            self.tx.kick(&self.transport);
        }
    }

    /// 5.10.6.7: after a transport reset no connection is left, and the CID may be another one.
    fn take_events(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.events.take() {
            any = true;
            let mut id = [0; 4];
            let buffer = self
                .event_buffers
                .wrapping_add(EVENT_BUFFER * usize::from(done.token % EVENTS));
            // SAFETY: the device gave this buffer back.
            unsafe { copy_in(&mut id, buffer) };
            self.events
                .add(&[event_piece(self.event_buffers, done.token)], done.token);
            if u32::from_le_bytes(id) == EVENT_RESET {
                for connection in &mut self.connections {
                    connection.stage = Stage::Closed;
                }
                self.cid = self.transport.config_u64(CONFIG_GUEST_CID);
                self.resets += 1;
            }
        }
        if any {
            self.events.kick(&self.transport);
        }
        any
    }

    fn reclaim(&mut self) {
        while let Some(done) = self.tx.take() {
            self.tx_free |= 1 << done.token;
        }
    }

    fn receive(&mut self, token: u16, len: u32) {
        let buffer = self
            .rx_buffers
            .wrapping_add(RX_BUFFER * usize::from(token % BUFFERS));
        let mut bytes = [0; HEADER];
        // SAFETY: the device gave this buffer back; it is not given again before this returns.
        unsafe { copy_in(&mut bytes, buffer) };
        let header = Header::decode(&bytes);
        let room = (len as usize).min(RX_BUFFER).saturating_sub(HEADER);
        if header.dst_cid != self.cid {
            // A new host may speak before the event that tells of it has been seen.
            self.cid = self.transport.config_u64(CONFIG_GUEST_CID);
        }
        if header.dst_cid != self.cid || header.len as usize > room {
            return;
        }
        if header.kind != STREAM {
            return self.refuse(&header);
        }
        let place = self.connections.iter().position(|c| {
            let peer = (c.peer_cid, c.peer_port);
            let known = c.port == header.dst_port && peer == (header.src_cid, header.src_port);
            known && c.stage != Stage::Closed
        });
        match place {
            // A peer that asks again has forgotten the old connection.
            _ if header.op == op::REQUEST => self.accept(place, &header),
            Some(place) => {
                // SAFETY: as above; the length was checked against the buffer.
                let data = unsafe {
                    core::slice::from_raw_parts(buffer.wrapping_add(HEADER), header.len as usize)
                };
                self.receive_for(place, &header, data);
            }
            None => self.refuse(&header),
        }
    }

    fn accept(&mut self, known: Option<usize>, header: &Header) {
        let role = Role::of_port(header.dst_port);
        let free = |stage| self.connections.iter().position(|c| c.stage == stage);
        let place = known
            .or_else(|| free(Stage::Closed))
            .or_else(|| free(Stage::Closing));
        let (Some(role), Some(place)) = (role, place) else {
            return self.refuse(header);
        };
        let connection = &mut self.connections[place];
        connection.open(
            Stage::Open,
            role,
            header.dst_port,
            (header.src_cid, header.src_port),
        );
        connection.peer_alloc = header.buf_alloc;
        connection.peer_forwarded = header.fwd_cnt;
        self.send(place, op::RESPONSE, 0, &[]);
    }

    fn receive_for(&mut self, place: usize, header: &Header, data: &[u8]) {
        let connection = &mut self.connections[place];
        connection.peer_alloc = header.buf_alloc;
        connection.peer_forwarded = header.fwd_cnt;
        match header.op {
            op::RESPONSE if connection.stage == Stage::Connecting => connection.stage = Stage::Open,
            op::RST => connection.stage = Stage::Closed,
            op::SHUTDOWN => connection.shut(header.flags),
            op::RW if connection.stage == Stage::Open => {
                if !connection.keep(data) {
                    self.reset(place);
                }
            }
            // What was on its way when we closed.
            op::RW | op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => {
                self.send(place, op::CREDIT_UPDATE, 0, &[]);
            }
            _ => self.reset(place),
        }
    }

    fn reset(&mut self, place: usize) {
        self.send(place, op::RST, 0, &[]);
        self.connections[place].stage = Stage::Closed;
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            let answer = Header {
                src_cid: self.cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: op::RST,
                ..Header::default()
            };
            self.put(&answer, |_| {});
        }
    }

    /// Sends a packet for a connection; false when there is no buffer for it.
    fn send(&mut self, place: usize, op: u16, flags: u32, data: &[u8]) -> bool {
        self.send_with(place, op, flags, data.len(), |to| to.copy_from_slice(data))
    }

    fn send_with(
        &mut self,
        place: usize,
        op: u16,
        flags: u32,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        let connection = &self.connections[place];
        let header = Header {
            src_cid: self.cid,
            dst_cid: connection.peer_cid,
            src_port: connection.port,
            dst_port: connection.peer_port,
            len: len as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: BUFFER as u32,
            fwd_cnt: connection.forwarded,
        };
        if !self.put(&header, fill) {
            return false;
        }
        let connection = &mut self.connections[place];
        connection.sent = connection.sent.wrapping_add(len as u32);
        connection.told = connection.forwarded;
        true
    }

    fn put(&mut self, header: &Header, fill: impl FnOnce(&mut [u8])) -> bool {
        if self.tx_free == 0 {
            self.reclaim();
        }
        if self.tx_free == 0 || self.tx.room(2) == 0 {
            self.blocked = true;
            return false;
        }
        let index = self.tx_free.trailing_zeros() as u16;
        let buffer = self.tx_buffers.wrapping_add(TX_BUFFER * usize::from(index));
        let data = buffer.wrapping_add(TX_DATA);
        // SAFETY: the device does not have this buffer; len is at most MAX_DATA.
        unsafe {
            copy_out(buffer, &header.encode());
            fill(core::slice::from_raw_parts_mut(data, header.len as usize));
        }
        let head = Piece {
            address: buffer,
            len: HEADER as u32,
            writable: false,
        };
        let body = Piece {
            address: data,
            len: header.len,
            writable: false,
        };
        let added = match header.len {
            0 => self.tx.add(&[head], index),
            _ => self.tx.add(&[head, body], index),
        };
        if added {
            self.tx_free &= !(1 << index);
        }
        added
    }

    /// How many bytes of data may go out on a connection now.
    fn allowance(&mut self, place: usize) -> usize {
        let connection = &self.connections[place];
        if connection.stage != Stage::Open || connection.send_shut {
            return 0;
        }
        let credit = connection.credit().min(MAX_DATA);
        if credit > 0 && self.tx_free.count_ones() <= RESERVE {
            self.reclaim();
            if self.tx_free.count_ones() <= RESERVE {
                self.blocked = true;
                return 0;
            }
        }
        credit
    }

    /// Does what a connection is for as far as it goes now; whether anything moved.
    fn pump(&mut self, place: usize) -> bool {
        let mut any = false;
        for _ in 0..TURN {
            let moved = match self.connections[place].role {
                Role::Control => self.pump_reply(place),
                Role::Echo => self.pump_echo(place),
                Role::Source => self.pump_source(place),
                Role::Sink | Role::Client => false,
            };
            any |= moved;
            if !moved {
                break;
            }
        }
        if self.connections[place].owes_credit() && self.connections[place].stage == Stage::Open {
            self.send(place, op::CREDIT_UPDATE, 0, &[]);
        }
        self.close_if_done(place);
        any
    }

    fn pump_reply(&mut self, place: usize) -> bool {
        let allowance = self.allowance(place);
        let mut bytes = [0; offshoot_protocol::frame::MAX_FRAME];
        let rest = self.connections[place].reply_rest();
        let len = rest.len().min(allowance);
        bytes[..len].copy_from_slice(&rest[..len]);
        if len == 0 || !self.send(place, op::RW, 0, &bytes[..len]) {
            return false;
        }
        self.connections[place].reply_sent(len);
        true
    }

    fn pump_echo(&mut self, place: usize) -> bool {
        let allowance = self.allowance(place);
        let front = self.connections[place].front();
        let (from, len) = (front.as_ptr(), front.len().min(allowance));
        if len == 0 {
            return false;
        }
        // SAFETY: the bytes stay where they are until `forward`, and lie apart from the
        // sending buffers.
        let sent = self.send_with(place, op::RW, 0, len, |to| unsafe { copy_in(to, from) });
        if sent {
            self.connections[place].forward(len);
        }
        sent
    }

    fn pump_source(&mut self, place: usize) -> bool {
        let len = self.allowance(place) / 8 * 8;
        let at = self.connections[place].place;
        let sent = len > 0
            && self.send_with(place, op::RW, 0, len, |to| {
                pattern::fill(to, SOURCE_SEED, at)
            });
        if sent {
            self.connections[place].place += len as u64;
        }
        sent
    }

    /// Ends a connection whose peer sends no more and has got everything.
    fn close_if_done(&mut self, place: usize) {
        let connection = &mut self.connections[place];
        if connection.stage != Stage::Open || connection.peer_shut == 0 {
            return;
        }
        let silent = connection.peer_shut & NO_SEND != 0;
        if silent {
            connection.drop_torso();
        }
        let requests = connection.role == Role::Control && connection.held() > 0;
        let owed = connection.held() > 0 || !connection.reply_rest().is_empty();
        match connection.role {
            Role::Client => {}
            // Both ways shut: the receiver answers with a reset (5.10.6.6). What was asked for
            // before that is still done.
            _ if connection.is_deaf() && silent && !requests => self.reset(place),
            Role::Source if connection.is_deaf() => self.reset(place),
            Role::Source if silent => self.close(place),
            _ if silent && !owed => self.close(place),
            _ => {}
        }
    }

    /// Tells the peer that we are through.
    fn close(&mut self, place: usize) {
        if self.send(place, op::SHUTDOWN, NO_RECEIVE | NO_SEND, &[]) {
            self.connections[place].stage = Stage::Closing;
        }
    }
}

fn receive_piece(buffers: *mut u8, index: u16) -> Piece {
    let address = buffers.wrapping_add(RX_BUFFER * usize::from(index % BUFFERS));
    Piece {
        address,
        len: RX_BUFFER as u32,
        writable: true,
    }
}

fn event_piece(buffers: *mut u8, index: u16) -> Piece {
    let address = buffers.wrapping_add(EVENT_BUFFER * usize::from(index % EVENTS));
    Piece {
        address,
        len: EVENT_BUFFER as u32,
        writable: true,
    }
}
