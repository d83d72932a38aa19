//! Entropy (virtio 1.2, 5.4).

use offshoot_protocol::{Bytes, ErrorCode, MAX_RANDOM, Refusal};

use crate::interrupts::Interrupts;
use crate::memory::{Allocator, copy_in};
use crate::patience::Patience;
use crate::virtio::mmio::{Found, Transport};
use crate::virtio::queue::{Piece, Queue};

/// An entropy device.
pub(crate) struct Rng {
    pub(crate) transport: Transport,
    queue: Queue,
    buffer: *mut u8,
    broken: bool,
}

impl Rng {
    /// Sets the device up; `None` when it refuses or memory is short.
    pub(crate) fn start(
        found: &Found,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) -> Option<Self> {
        let mut transport = Transport::start(found, 0)?;
        let queue = transport.queue(0, allocator)?;
        let buffer = allocator.pages(MAX_RANDOM)?;
        transport.begin(interrupts);
        Some(Self {
            transport,
            queue,
            buffer,
            broken: false,
        })
    }

    /// Drops interrupts that nobody waits for.
    pub(crate) fn poll(&mut self) {
        self.transport.take_interrupt();
    }

    /// `len` random bytes.
    pub(crate) fn read(
        &mut self,
        len: usize,
        halt: bool,
        interrupts: &mut Interrupts,
    ) -> Result<Bytes<MAX_RANDOM>, Refusal> {
        if !(1..=MAX_RANDOM).contains(&len) {
            return Err(Refusal::new(ErrorCode::OutOfRange, MAX_RANDOM as u64));
        }
        let mut bytes = [0; MAX_RANDOM];
        let mut have = 0;
        let mut patience = Patience::new(halt);
        // The device may give less than it is asked for (5.4.6.1).
        while have < len && !self.broken {
            let piece = Piece {
                address: self.buffer,
                len: (len - have) as u32,
                writable: true,
            };
            self.queue.add(&[piece], 0);
            self.queue.kick(&self.transport);
            let done = loop {
                self.transport.take_interrupt();
                if let Some(done) = self.queue.take() {
                    break done;
                }
                let queue = &mut self.queue;
                if queue.broken
                    || self.transport.needs_reset
                    || !patience.wait(interrupts, || queue.arm())
                {
                    self.transport.fail();
                    self.broken = true;
                    patience.end(interrupts);
                    return Err(Refusal::new(ErrorCode::NoAnswer, have as u64));
                }
            };
            let got = (done.len as usize).min(len - have);
            // SAFETY: the device has given the buffer back; got is at most its length.
            unsafe { copy_in(&mut bytes[have..have + got], self.buffer) };
            have += got;
            self.broken = got == 0;
        }
        self.queue.disarm();
        patience.end(interrupts);
        if self.broken {
            return Err(Refusal::new(ErrorCode::DeviceBroken, have as u64));
        }
        let mut list = Bytes::default();
        let fits = bytes[..len].iter().all(|byte| list.0.push(*byte));
        debug_assert!(fits);
        Ok(list)
    }
}
