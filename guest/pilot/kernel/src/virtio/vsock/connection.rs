//! One stream connection: its buffer, its credit, what it is for.

use offshoot_protocol::frame::{HEADER, Header, MAX_FRAME};
use offshoot_protocol::{
    CONTROL_PORT, ECHO_PORT, ErrorCode, Reply, Request, SINK_PORT, SOURCE_PORT, WireErrorKind,
    frame,
};

use super::packet::{NO_RECEIVE, NO_SEND};

/// Bytes that a connection can hold: what the peer is told as `buf_alloc`.
pub(crate) const BUFFER: usize = 65536;

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not in use.
    Closed,
    /// We asked for it.
    Connecting,
    /// Bytes may flow.
    Open,
    /// We said that we are through; the peer has yet to answer.
    Closing,
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Requests come in, replies go out.
    Control,
    /// What comes in goes out.
    Echo,
    /// What comes in is counted.
    Sink,
    /// The pattern goes out.
    Source,
    /// One that we made.
    Client,
}

impl Role {
    /// What a port of the guest is for, if it is open.
    pub(crate) fn of_port(port: u32) -> Option<Self> {
        match port {
            CONTROL_PORT => Some(Self::Control),
            ECHO_PORT => Some(Self::Echo),
            SINK_PORT => Some(Self::Sink),
            SOURCE_PORT => Some(Self::Source),
            _ => None,
        }
    }
}

/// A connection.
pub(crate) struct Connection {
    pub(crate) stage: Stage,
    pub(crate) role: Role,
    pub(crate) port: u32,
    pub(crate) peer_cid: u64,
    pub(crate) peer_port: u32,
    /// Grows with each use of this place.
    pub(crate) generation: u32,
    /// The peer's `buf_alloc` and `fwd_cnt`.
    pub(crate) peer_alloc: u32,
    pub(crate) peer_forwarded: u32,
    /// Bytes that we sent.
    pub(crate) sent: u32,
    /// Our `fwd_cnt`: bytes that left the buffer, and what of it the peer knows.
    pub(crate) forwarded: u32,
    pub(crate) told: u32,
    /// What the peer said that it won't do any more.
    pub(crate) peer_shut: u32,
    /// We said that we won't send any more.
    pub(crate) send_shut: bool,
    /// Place in the pattern of the next byte to send.
    pub(crate) place: u64,
    greeted: bool,
    buffer: *mut u8,
    head: usize,
    held: usize,
    reply: [u8; MAX_FRAME],
    reply_at: usize,
    reply_len: usize,
}

impl Connection {
    pub(crate) fn new(buffer: *mut u8) -> Self {
        Self {
            stage: Stage::Closed,
            role: Role::Control,
            port: 0,
            peer_cid: 0,
            peer_port: 0,
            generation: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            forwarded: 0,
            told: 0,
            peer_shut: 0,
            send_shut: false,
            place: 0,
            greeted: false,
            buffer,
            head: 0,
            held: 0,
            reply: [0; MAX_FRAME],
            reply_at: 0,
            reply_len: 0,
        }
    }

    /// Begins anew for a peer.
    pub(crate) fn open(&mut self, stage: Stage, role: Role, port: u32, peer: (u64, u32)) {
        self.stage = stage;
        self.role = role;
        self.port = port;
        (self.peer_cid, self.peer_port) = peer;
        self.generation = self.generation.wrapping_add(1);
        (self.peer_alloc, self.peer_forwarded, self.sent) = (0, 0, 0);
        (self.forwarded, self.told) = (0, 0);
        (self.peer_shut, self.send_shut, self.place, self.greeted) = (0, false, 0, false);
        (self.head, self.held, self.reply_at, self.reply_len) = (0, 0, 0, 0);
    }

    /// Bytes that the peer has room for (5.10.6.3).
    pub(crate) fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(in_flight) as usize
    }

    /// Whether the peer should be told of the room that there is now.
    pub(crate) fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) as usize >= BUFFER / 2
    }

    /// Keeps what came in; false when the peer sent more than it was given room for.
    pub(crate) fn keep(&mut self, data: &[u8]) -> bool {
        if self.role == Role::Sink {
            self.forwarded = self.forwarded.wrapping_add(data.len() as u32);
            return true;
        }
        if data.len() > BUFFER - self.held {
            return false;
        }
        let tail = (self.head + self.held) % BUFFER;
        let (first, second) = data.split_at(data.len().min(BUFFER - tail));
        // SAFETY: both ranges lie inside the buffer's BUFFER bytes, which only this connection
        // has; `data` lies elsewhere.
        unsafe {
            crate::memory::copy_out(self.buffer.add(tail), first);
            crate::memory::copy_out(self.buffer, second);
        }
        self.held += data.len();
        true
    }

    /// Bytes kept.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// The first bytes kept that lie in one piece.
    pub(crate) fn front(&self) -> &[u8] {
        let len = self.held.min(BUFFER - self.head);
        // SAFETY: inside the buffer; it changes only through `&mut self`.
        unsafe { core::slice::from_raw_parts(self.buffer.wrapping_add(self.head), len) }
    }

    /// Lets go of the first `len` bytes kept.
    pub(crate) fn forward(&mut self, len: usize) {
        let len = len.min(self.held);
        self.head = (self.head + len) % BUFFER;
        self.held -= len;
        self.forwarded = self.forwarded.wrapping_add(len as u32);
    }

    fn peek(&self, to: &mut [u8]) {
        for (i, byte) in to.iter_mut().enumerate() {
            // SAFETY: taken modulo the buffer's size.
            *byte = unsafe { self.buffer.add((self.head + i) % BUFFER).read() };
        }
    }

    /// The next request of a control connection, once the reply before it has left. What can't
    /// be read, or comes before the greeting, is refused here.
    pub(crate) fn next_request(&mut self) -> Option<(u32, Request)> {
        if self.role != Role::Control || self.stage != Stage::Open || self.reply_len != 0 {
            return None;
        }
        if self.held < HEADER {
            return None;
        }
        let mut bytes = [0; MAX_FRAME];
        self.peek(&mut bytes[..HEADER]);
        let mut head = [0; HEADER];
        head.copy_from_slice(&bytes[..HEADER]);
        let header = match Header::decode(&head) {
            Ok(header) => header,
            Err(error) => {
                // Where the next frame begins is not known any more.
                self.forward(self.held);
                self.shut(NO_SEND);
                self.refuse(0, ErrorCode::Malformed, error.at as u64);
                return None;
            }
        };
        let len = HEADER + header.len;
        if self.held < len {
            return None;
        }
        self.peek(&mut bytes[..len]);
        self.forward(len);
        match Request::decode(header.kind, &bytes[HEADER..len]) {
            Ok(request) => {
                self.greeted |= matches!(request, Request::Hello { .. });
                if self.greeted {
                    return Some((header.tag, request));
                }
                self.refuse(header.tag, ErrorCode::NoHello, 0);
            }
            Err(error) => {
                let at = match error.kind {
                    WireErrorKind::UnknownMessage => 6,
                    _ => HEADER + error.at,
                };
                self.refuse(header.tag, ErrorCode::Malformed, at as u64);
            }
        }
        None
    }

    /// Lets go of the beginning of a frame whose end can't come any more.
    pub(crate) fn drop_torso(&mut self) {
        let mut head = [0; HEADER];
        self.peek(&mut head);
        let whole = match Header::decode(&head) {
            _ if self.held < HEADER => false,
            Ok(header) => self.held >= HEADER + header.len,
            // To be refused, and so not to be dropped.
            Err(_) => true,
        };
        if self.role == Role::Control && !whole {
            self.forward(self.held);
        }
    }

    /// The peer said what it won't do any more.
    pub(crate) fn shut(&mut self, flags: u32) {
        self.peer_shut |= flags & (NO_RECEIVE | NO_SEND);
        if self.is_deaf() {
            (self.reply_at, self.reply_len) = (0, 0);
        }
    }

    /// Whether the peer receives no more.
    pub(crate) fn is_deaf(&self) -> bool {
        self.peer_shut & NO_RECEIVE != 0
    }

    fn refuse(&mut self, tag: u32, code: ErrorCode, detail: u64) {
        self.set_reply(tag, &Reply::Refused { code, detail });
    }

    /// Has a reply sent as the peer has room for it.
    pub(crate) fn set_reply(&mut self, tag: u32, reply: &Reply) {
        // Every reply fits: a report with all its lists full is the longest, and a test in the
        // protocol's crate holds it against the limit.
        if self.is_deaf() {
            return;
        }
        self.reply_len = frame::encode_reply(&mut self.reply, reply, tag).unwrap_or(0);
        self.reply_at = 0;
    }

    /// What of the reply has not left yet.
    pub(crate) fn reply_rest(&self) -> &[u8] {
        self.reply
            .get(self.reply_at..self.reply_len)
            .unwrap_or_default()
    }

    /// `len` bytes more of the reply have left.
    pub(crate) fn reply_sent(&mut self, len: usize) {
        self.reply_at += len;
        if self.reply_at >= self.reply_len {
            (self.reply_at, self.reply_len) = (0, 0);
        }
    }
}
