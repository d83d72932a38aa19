//! A network card (virtio 1.2, 5.1), and as much of ARP, IPv4, ICMP and UDP as an echo needs.

use offshoot_protocol::{ECHO_ETHERTYPE, ErrorCode, Outcome, Refusal, UDP_ECHO_PORT, pattern};

use crate::cpu;
use crate::interrupts::Interrupts;
use crate::memory::{Allocator, copy_in, copy_out};
use crate::patience::Patience;
use crate::virtio::mmio::{Found, Transport};
use crate::virtio::queue::{Piece, Queue};

const F_MAC: u64 = 1 << 5;

/// `struct virtio_net_hdr`, all zero for us: no offload is agreed on.
const HEADER: usize = 12;
const ETHERNET: usize = 14;
const MAX_FRAME: usize = ETHERNET + 1500;
const BUFFER: usize = 2048;
const BUFFERS: u16 = 32;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_UDP: u8 = 17;

/// First byte of an echo frame's payload: sent by someone who wants it back.
const ECHO_REQUEST: u8 = 1;
/// … and sent back.
const ECHO_ANSWER: u8 = 2;
/// Bytes of an echo frame's payload before the pattern: what it is, then a nonce.
const ECHO_HEADER: usize = 8;

/// A network card.
pub(crate) struct Net {
    pub(crate) transport: Transport,
    rx: Queue,
    tx: Queue,
    rx_buffers: *mut u8,
    tx_buffers: *mut u8,
    /// Buffers of the sending side that the device does not have, one bit each.
    tx_free: u32,
    pub(crate) mac: [u8; 6],
    ip: [u8; 4],
    pub(crate) frames_in: u64,
    pub(crate) frames_out: u64,
    /// Nonce of the last echo frame that we sent; its answers are ours, not to be sent back.
    nonce: u64,
    answer: Option<Answer>,
    broken: bool,
}

/// An answer to an echo frame of ours.
#[derive(Clone, Copy)]
struct Answer {
    bytes: u64,
    bad: u64,
    first_bad: u64,
}

/// Frames to send.
#[derive(Clone, Copy)]
pub(crate) struct Frames {
    pub(crate) count: u32,
    pub(crate) len: u16,
    pub(crate) peer: [u8; 6],
}

impl Net {
    /// Sets the device up; `None` when it refuses or memory is short.
    pub(crate) fn start(
        found: &Found,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) -> Option<Self> {
        let mut transport = Transport::start(found, F_MAC)?;
        let mut rx = transport.queue(0, allocator)?;
        let mut tx = transport.queue(1, allocator)?;
        let rx_buffers = allocator.pages(BUFFER * usize::from(BUFFERS))?;
        let tx_buffers = allocator.pages(BUFFER * usize::from(BUFFERS))?;
        for index in 0..BUFFERS {
            rx.add(&[receive_piece(rx_buffers, index)], index);
        }
        tx.disarm();
        let mac = match transport.has(F_MAC) {
            true => transport.config(0),
            // Locally administered, told apart by the window's place.
            false => [2, 0x0f, 0xf5, 0, 0, (found.window >> 12) as u8],
        };
        transport.begin(interrupts);
        rx.kick(&transport);
        Some(Self {
            transport,
            rx,
            tx,
            rx_buffers,
            tx_buffers,
            tx_free: u32::MAX,
            mac,
            ip: [0; 4],
            frames_in: 0,
            frames_out: 0,
            nonce: 0,
            answer: None,
            broken: false,
        })
    }

    /// Has the card answer for an address.
    pub(crate) fn set_ip(&mut self, ip: [u8; 4]) {
        self.ip = ip;
    }

    /// Takes what came in and answers it; whether there was anything.
    pub(crate) fn poll(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.transport.take_interrupt();
        let mut any = false;
        while let Some(done) = self.rx.take() {
            any = true;
            self.frames_in += 1;
            let mut frame = [0; MAX_FRAME];
            let len = (done.len as usize).saturating_sub(HEADER).min(MAX_FRAME);
            let buffer = buffer(self.rx_buffers, done.token);
            // SAFETY: the device gave this buffer back; HEADER + MAX_FRAME < BUFFER.
            unsafe { copy_in(&mut frame[..len], buffer.wrapping_add(HEADER)) };
            self.rx
                .add(&[receive_piece(self.rx_buffers, done.token)], done.token);
            self.receive(&mut frame[..len]);
        }
        if any {
            self.rx.kick(&self.transport);
        }
        if self.rx.broken || self.tx.broken || self.transport.needs_reset {
            self.transport.fail();
            self.broken = true;
        }
        any
    }

    /// Asks for an interrupt with the next frame; whether there is one already.
    pub(crate) fn arm(&mut self) -> bool {
        !self.broken && self.rx.arm()
    }

    /// Asks for no interrupts.
    pub(crate) fn disarm(&mut self) {
        self.rx.disarm();
    }

    fn reclaim(&mut self) {
        while let Some(done) = self.tx.take() {
            self.tx_free |= 1 << done.token;
        }
    }

    /// Sends a frame; false when the card has no room for it now.
    fn send(&mut self, frame: &[u8]) -> bool {
        if self.tx_free == 0 {
            self.reclaim();
        }
        if self.tx_free == 0 || self.tx.room(1) == 0 || frame.len() > MAX_FRAME {
            return false;
        }
        let index = self.tx_free.trailing_zeros() as u16;
        let address = buffer(self.tx_buffers, index);
        // SAFETY: the device does not have this buffer; its first HEADER bytes stay zero.
        unsafe { copy_out(address.wrapping_add(HEADER), frame) };
        let len = (HEADER + frame.len()) as u32;
        if !self.tx.add(
            &[Piece {
                address,
                len,
                writable: false,
            }],
            index,
        ) {
            return false;
        }
        self.tx_free &= !(1 << index);
        self.frames_out += 1;
        true
    }

    /// Sends an answer. One that finds no room is dropped, as on any network.
    fn answer(&mut self, frame: &[u8]) {
        if self.send(frame) {
            self.tx.kick(&self.transport);
        }
    }

    fn receive(&mut self, frame: &mut [u8]) {
        let Some((head, payload)) = frame.split_at_mut_checked(ETHERNET) else {
            return;
        };
        let ethertype = u16::from_be_bytes([head[12], head[13]]);
        let sender: [u8; 6] = [head[6], head[7], head[8], head[9], head[10], head[11]];
        let back = match ethertype {
            ECHO_ETHERTYPE => self.receive_echo(payload),
            ETHERTYPE_ARP => self.receive_arp(payload),
            ETHERTYPE_IPV4 => self.receive_ipv4(payload),
            _ => false,
        };
        if back {
            head[..6].copy_from_slice(&sender);
            head[6..12].copy_from_slice(&self.mac);
            self.answer(frame);
        }
    }

    /// Whether to send the frame back.
    fn receive_echo(&mut self, payload: &mut [u8]) -> bool {
        let Some((head, rest)) = payload.split_first_chunk_mut::<ECHO_HEADER>() else {
            return false;
        };
        let nonce = u64::from_le_bytes(*head) >> 8;
        let ours = nonce == self.nonce >> 8 && self.nonce != 0;
        match head[0] {
            // A peer that sends the very bytes back has not turned the first one.
            ECHO_ANSWER | ECHO_REQUEST if ours => {
                let (bad, first) = pattern::compare(rest, nonce, 0);
                let bytes = (ECHO_HEADER + rest.len()) as u64;
                let first_bad = first.unwrap_or(u64::MAX);
                self.answer = Some(Answer {
                    bytes,
                    bad,
                    first_bad,
                });
                false
            }
            ECHO_REQUEST => {
                head[0] = ECHO_ANSWER;
                true
            }
            _ => false,
        }
    }

    /// RFC 826: who has our address?
    fn receive_arp(&mut self, payload: &mut [u8]) -> bool {
        const REQUEST_FOR_IPV4: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
        if payload.len() < 28 || payload[..8] != REQUEST_FOR_IPV4 || !self.is_ours(&payload[24..28])
        {
            return false;
        }
        payload[7] = 2;
        payload.copy_within(8..18, 18);
        payload[8..14].copy_from_slice(&self.mac);
        payload[14..18].copy_from_slice(&self.ip);
        true
    }

    fn is_ours(&self, ip: &[u8]) -> bool {
        self.ip != [0; 4] && ip == self.ip
    }

    /// Turns an ICMP or UDP echo request into its answer.
    fn receive_ipv4(&mut self, packet: &mut [u8]) -> bool {
        let Some(first) = packet.first() else {
            return false;
        };
        let header = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header < 20 || packet.len() < header + 8 {
            return false;
        }
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
        if fragment || total < header + 8 || total > packet.len() || !self.is_ours(&packet[16..20])
        {
            return false;
        }
        let protocol = packet[9];
        let body = &mut packet[header..total];
        match protocol {
            PROTOCOL_ICMP if body[0] == 8 => {
                body[0] = 0;
                // RFC 1624: the sum of what is gone, 0x0800, comes back to the checksum.
                let sum = u32::from(u16::from_be_bytes([body[2], body[3]])) + 0x0800;
                let sum = (sum & 0xffff) + (sum >> 16);
                body[2..4].copy_from_slice(&(sum as u16).to_be_bytes());
            }
            PROTOCOL_UDP if body[2..4] == UDP_ECHO_PORT.to_be_bytes() => {
                // Swapping ports leaves the checksum as it is.
                let from = [body[0], body[1]];
                body.copy_within(2..4, 0);
                body[2..4].copy_from_slice(&from);
            }
            _ => return false,
        }
        // Swapping addresses leaves both checksums as they are.
        let mut from = [0; 4];
        from.copy_from_slice(&packet[12..16]);
        packet.copy_within(16..20, 12);
        packet[16..20].copy_from_slice(&from);
        true
    }

    fn check(&self, frames: &Frames) -> Result<(), Refusal> {
        if self.broken {
            return Err(Refusal::new(ErrorCode::DeviceBroken, 0));
        }
        match (ECHO_HEADER..=1500).contains(&usize::from(frames.len)) {
            true => Ok(()),
            false => Err(Refusal::new(ErrorCode::OutOfRange, 1500)),
        }
    }

    /// Makes an echo frame; its length.
    fn echo_frame(&self, frame: &mut [u8; MAX_FRAME], frames: &Frames, kind: u8) -> usize {
        let len = ETHERNET + usize::from(frames.len);
        frame[..6].copy_from_slice(&frames.peer);
        frame[6..12].copy_from_slice(&self.mac);
        frame[12..14].copy_from_slice(&ECHO_ETHERTYPE.to_be_bytes());
        let head = self.nonce & !0xff | u64::from(kind);
        frame[14..14 + ECHO_HEADER].copy_from_slice(&head.to_le_bytes());
        pattern::fill(&mut frame[14 + ECHO_HEADER..len], self.nonce >> 8, 0);
        len
    }

    /// Sends frames one by one, each when the one before has come back.
    pub(crate) fn ping(
        &mut self,
        frames: Frames,
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Outcome, Refusal> {
        self.check(&frames)?;
        let begin = cpu::tsc();
        let mut outcome = Outcome {
            first_bad: u64::MAX,
            ..Outcome::default()
        };
        for turn in 0..u64::from(frames.count) {
            // Differs between copies of one guest as far as their clocks do, and from turn to turn.
            self.nonce = pattern::word(cpu::tsc() ^ u64::from(self.mac[5]), turn * 8) | 0x100;
            self.answer = None;
            let mut frame = [0; MAX_FRAME];
            let len = self.echo_frame(&mut frame, &frames, ECHO_REQUEST);
            let mut patience = Patience::new(halt);
            let mut sent = false;
            let answer = loop {
                if !sent && self.send(&frame[..len]) {
                    self.tx.kick(&self.transport);
                    sent = true;
                    outcome.units += 1;
                    outcome.bytes += u64::from(frames.len);
                }
                self.poll();
                if let Some(answer) = self.answer.take() {
                    break answer;
                }
                if self.broken || !patience.wait(interrupts, || self.arm()) {
                    patience.end(interrupts);
                    return Err(Refusal::new(ErrorCode::NoAnswer, turn));
                }
            };
            patience.end(interrupts);
            outcome.received += answer.bytes;
            outcome.bad += answer.bad;
            outcome.first_bad = outcome.first_bad.min(answer.first_bad);
        }
        outcome.ticks = cpu::tsc().saturating_sub(begin);
        Ok(outcome)
    }

    /// Sends frames that nobody needs to send back, as fast as the card takes them.
    pub(crate) fn flood(
        &mut self,
        frames: Frames,
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Outcome, Refusal> {
        self.check(&frames)?;
        let begin = cpu::tsc();
        let mut frame = [0; MAX_FRAME];
        let len = self.echo_frame(&mut frame, &frames, 0);
        let mut outcome = Outcome {
            first_bad: u64::MAX,
            ..Outcome::default()
        };
        let mut patience = Patience::new(halt);
        while outcome.units < u64::from(frames.count) {
            if self.send(&frame[..len]) {
                outcome.units += 1;
                outcome.bytes += u64::from(frames.len);
                patience.progress();
                continue;
            }
            self.tx.kick(&self.transport);
            self.poll();
            if self.broken || !patience.wait(interrupts, || self.tx.arm()) {
                patience.end(interrupts);
                return Err(Refusal::new(ErrorCode::NoAnswer, outcome.units));
            }
        }
        self.tx.kick(&self.transport);
        self.tx.disarm();
        patience.end(interrupts);
        outcome.ticks = cpu::tsc().saturating_sub(begin);
        Ok(outcome)
    }
}

fn buffer(buffers: *mut u8, index: u16) -> *mut u8 {
    buffers.wrapping_add(BUFFER * usize::from(index % BUFFERS))
}

fn receive_piece(buffers: *mut u8, index: u16) -> Piece {
    Piece {
        address: buffer(buffers, index),
        len: BUFFER as u32,
        writable: true,
    }
}
