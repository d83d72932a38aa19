//! Connections that the pilot makes.

use offshoot_protocol::{ErrorCode, Outcome, Refusal, pattern};

use super::connection::{Role, Stage};
use super::packet::{HOST, NO_SEND, op};
use super::{CONNECTIONS, Vsock};
use crate::cpu;
use crate::interrupts::Interrupts;
use crate::patience::Patience;

impl Vsock {
    /// Connects to a port of the host, sends `len` bytes of the pattern, and compares what comes
    /// back until the host is through too.
    pub(crate) fn exchange(
        &mut self,
        port: u32,
        (len, seed): (u64, u64),
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Outcome, Refusal> {
        if !len.is_multiple_of(8) {
            return Err(Refusal::new(ErrorCode::Misaligned, 8));
        }
        if self.broken {
            return Err(Refusal::new(ErrorCode::DeviceBroken, 0));
        }
        let begin = cpu::tsc();
        let place = self
            .connections
            .iter()
            .position(|connection| connection.stage == Stage::Closed)
            .ok_or(Refusal::new(ErrorCode::Busy, CONNECTIONS as u64))?;
        let local = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(0x4000_0000);
        self.connections[place].open(Stage::Connecting, Role::Client, local, (HOST, port));
        let mut asked = false;
        let mut outcome = Outcome {
            first_bad: u64::MAX,
            ..Outcome::default()
        };
        let mut patience = Patience::new(halt);
        let result = loop {
            if !asked {
                asked = self.send(place, op::REQUEST, 0, &[]);
            }
            let moved = self.poll() | self.step(place, len, seed, &mut outcome);
            let connection = &self.connections[place];
            let shut = connection.peer_shut & NO_SEND != 0;
            if outcome.bytes == len && (outcome.received == len || shut) && connection.held() < 8 {
                break Ok(());
            }
            // A peer that resets once it has sent everything is no failure: that ended above.
            if connection.stage == Stage::Closed || shut {
                break Err(Refusal::new(ErrorCode::Reset, outcome.received));
            }
            if moved {
                patience.progress();
            } else if self.broken || !patience.wait(interrupts, || self.arm()) {
                break Err(Refusal::new(ErrorCode::NoAnswer, outcome.received));
            }
        };
        patience.end(interrupts);
        if self.connections[place].stage != Stage::Closed {
            self.reset(place);
            self.tx.kick(&self.transport);
        }
        outcome.ticks = cpu::tsc().saturating_sub(begin);
        result.map(|()| outcome)
    }

    /// Sends and compares as much as goes now; whether anything moved.
    fn step(&mut self, place: usize, len: u64, seed: u64, outcome: &mut Outcome) -> bool {
        let mut moved = false;
        let left = usize::try_from(len - outcome.bytes).unwrap_or(usize::MAX);
        let piece = self.allowance(place).min(left) / 8 * 8;
        let at = outcome.bytes;
        if piece > 0 && self.send_with(place, op::RW, 0, piece, |to| pattern::fill(to, seed, at)) {
            outcome.bytes += piece as u64;
            outcome.units += 1;
            moved = true;
        }
        let connection = &self.connections[place];
        if outcome.bytes == len && connection.stage == Stage::Open && !connection.send_shut {
            let sent = self.send(place, op::SHUTDOWN, NO_SEND, &[]);
            self.connections[place].send_shut = sent;
            moved |= sent;
        }
        // The buffer's size is a multiple of 8 and so is all that left it: words stay whole.
        let front = self.connections[place].front();
        let whole = front.len() / 8 * 8;
        if whole > 0 {
            let (bad, first) = pattern::compare(&front[..whole], seed, outcome.received);
            outcome.bad += bad;
            outcome.first_bad = outcome.first_bad.min(first.unwrap_or(u64::MAX));
            outcome.received += whole as u64;
            self.connections[place].forward(whole);
            moved = true;
        }
        self.tx.kick(&self.transport);
        moved
    }
}
