//! One stream connection's protocol (virtio 1.2, 5.10.6.3 to 5.10.6.6) as a state machine on
//! plain data: no sockets, no rings, no clock. The muxer feeds it what happens and asks it what
//! to send; a fuzzer can do the same.

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that the guest may have on their way to one host socket: what we announce as
/// `buf_alloc`, and the bound of what we ever hold for one connection.
pub const BUFFER: u32 = 128 * 1024;

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host asked, the guest has not answered.
    Requested,
    /// Both sides agreed.
    Established,
}

/// What a packet of the guest means to the connection's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing besides the state kept here.
    Nothing,
    /// The guest accepted what the host asked for.
    Accepted,
    /// The packet's data is to go to the host, or into the buffer.
    Deliver,
    /// The connection is gone; forget it.
    Gone,
    /// The guest broke the protocol: answer with a reset and forget the connection.
    Refuse,
}

/// What to send to the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outgoing {
    /// A packet without data.
    Control(Op, u32),
    /// Up to so many bytes of what the host's socket has.
    Data(u32),
}

/// A connection between a host socket and a guest socket.
#[derive(Debug, Clone)]
pub struct Connection {
    phase: Phase,
    /// A request or response that was not sent yet.
    opening: Option<Op>,
    /// The guest's announced buffer and how far it has read, and what we sent it. Wrapping.
    guest_alloc: u32,
    guest_forwarded: u32,
    sent: u32,
    /// What the guest sent, what of it the host took, and what the guest knows of that. Wrapping.
    received: u32,
    forwarded: u32,
    forwarded_told: u32,
    /// What each side no longer does ([`SHUTDOWN_RECEIVE`], [`SHUTDOWN_SEND`]; bits only get set).
    guest_shut: u32,
    host_shut: u32,
    host_shut_told: u32,
    owes_credit: bool,
    asked_credit: bool,
}

impl Connection {
    /// A connection that the host asks for.
    #[must_use]
    pub fn from_host() -> Self {
        Self::new(Phase::Requested, Op::Request, 0, 0)
    }

    /// A connection that the guest asked for with `request` and the host took.
    #[must_use]
    pub fn from_guest(request: &Header) -> Self {
        Self::new(
            Phase::Established,
            Op::Response,
            request.buf_alloc,
            request.fwd_cnt,
        )
    }

    fn new(phase: Phase, opening: Op, guest_alloc: u32, guest_forwarded: u32) -> Self {
        Self {
            phase,
            opening: Some(opening),
            guest_alloc,
            guest_forwarded,
            sent: 0,
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            guest_shut: 0,
            host_shut: 0,
            host_shut_told: 0,
            owes_credit: false,
            asked_credit: false,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest has heard of it.
    #[must_use]
    pub fn announced(&self) -> bool {
        self.opening != Some(Op::Request)
    }

    /// Whether what the guest sends still goes somewhere.
    #[must_use]
    pub fn host_receives(&self) -> bool {
        self.host_shut & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest will send no more.
    #[must_use]
    pub fn guest_sends_no_more(&self) -> bool {
        self.guest_shut & SHUTDOWN_SEND != 0
    }

    /// Whether the guest will receive no more.
    #[must_use]
    pub fn guest_receives_no_more(&self) -> bool {
        self.guest_shut & SHUTDOWN_RECEIVE != 0
    }

    /// Whether the guest has closed its side wholly.
    #[must_use]
    pub fn guest_closed(&self) -> bool {
        self.guest_shut == BOTH
    }

    /// Whether the guest was told that the host's side is closed wholly, and owes a reset.
    #[must_use]
    pub fn awaits_reset(&self) -> bool {
        self.host_shut_told == BOTH
    }

    /// Whether data from the host's socket may still go to the guest.
    #[must_use]
    pub fn takes_host_data(&self) -> bool {
        self.phase == Phase::Established
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
            && self.host_shut & SHUTDOWN_SEND == 0
    }

    /// Bytes received from the guest that the host has not taken.
    #[must_use]
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Bytes that the guest can take. What it says is not trusted: a nonsense count (more taken
    /// than was ever sent) reads as no room at all and stalls nobody but itself.
    #[must_use]
    pub fn guest_room(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_alloc.saturating_sub(on_the_way)
    }

    /// A packet came from the guest.
    pub fn on_packet(&mut self, header: &Header) -> Reaction {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.guest_room() > 0 {
            self.asked_credit = false;
        }
        let Some(op) = Op::from_raw(header.op) else {
            return Reaction::Refuse;
        };
        match (self.phase, op) {
            (_, Op::Reset) => Reaction::Gone,
            (Phase::Requested, Op::Response) if self.opening.is_none() => {
                self.phase = Phase::Established;
                Reaction::Accepted
            }
            (Phase::Requested, _) | (_, Op::Request | Op::Response) => Reaction::Refuse,
            (Phase::Established, Op::Shutdown) => {
                self.guest_shut |= header.flags & BOTH;
                Reaction::Nothing
            }
            (Phase::Established, Op::Data) => self.on_data(header.len),
            (Phase::Established, Op::CreditUpdate) => Reaction::Nothing,
            (Phase::Established, Op::CreditRequest) => {
                self.owes_credit = true;
                Reaction::Nothing
            }
        }
    }

    fn on_data(&mut self, len: u32) -> Reaction {
        // virtio 1.2, 5.10.6.3.1: data is only sent when the receiver has room for it.
        if self.guest_sends_no_more() || len > BUFFER.saturating_sub(self.buffered()) {
            return Reaction::Refuse;
        }
        self.received = self.received.wrapping_add(len);
        Reaction::Deliver
    }

    /// The host took (or will never take) `bytes` of what the guest sent.
    pub fn on_forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.buffered()));
        let guest_sees = BUFFER.saturating_sub(self.received.wrapping_sub(self.forwarded_told));
        if guest_sees < BUFFER / 2 && self.forwarded != self.forwarded_told {
            self.owes_credit = true;
        }
    }

    /// The host will send no more.
    pub fn on_host_end(&mut self) {
        self.host_shut |= SHUTDOWN_SEND;
    }

    /// The host will receive no more.
    pub fn on_host_deaf(&mut self) {
        self.host_shut |= SHUTDOWN_RECEIVE;
    }

    /// Whether [`next`](Self::next) has something, given that the host's socket has data or not.
    #[must_use]
    pub fn has_next(&self, host_readable: bool) -> bool {
        if self.opening.is_some() {
            return true;
        }
        self.phase == Phase::Established
            && (self.owes_credit
                || self.host_shut != self.host_shut_told
                || (host_readable
                    && self.takes_host_data()
                    && (self.guest_room() > 0 || !self.asked_credit)))
    }

    /// What to send next. A control packet counts as sent; data counts when
    /// [`on_sent`](Self::on_sent) says how much there was.
    pub fn next(&mut self, host_readable: bool) -> Option<Outgoing> {
        if let Some(op) = self.opening.take() {
            return Some(Outgoing::Control(op, 0));
        }
        if self.phase != Phase::Established {
            return None;
        }
        if self.owes_credit {
            self.owes_credit = false;
            return Some(Outgoing::Control(Op::CreditUpdate, 0));
        }
        if self.host_shut != self.host_shut_told {
            self.host_shut_told = self.host_shut;
            return Some(Outgoing::Control(Op::Shutdown, self.host_shut));
        }
        if !host_readable || !self.takes_host_data() {
            return None;
        }
        match self.guest_room() {
            // Asked once for each time it runs dry: the guest's next packet tells.
            0 if self.asked_credit => None,
            0 => {
                self.asked_credit = true;
                Some(Outgoing::Control(Op::CreditRequest, 0))
            }
            room => Some(Outgoing::Data(room)),
        }
    }

    /// `bytes` of the host's data went to the guest.
    pub fn on_sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Puts our side's credit into a header; the guest then knows it.
    pub fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.forwarded_told = self.forwarded;
        self.owes_credit = false;
    }
}
