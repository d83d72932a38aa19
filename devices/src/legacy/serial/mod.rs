//! A 16550 UART on `vm-superio`, for a guest's console.
//!
//! # Output
//! What the guest sends goes into a buffer of [`OUTPUT_LIMIT`] bytes, from which a thread of its own
//! writes it to the host's writer: a slow, blocked or broken writer costs the guest neither time
//! nor its life, but, once the buffer is full, the bytes that come then. They are counted
//! ([`Serial::lost_output`]). The thread is there only while there is something to write.
//!
//! # Input
//! The guest takes input at its own pace; up to [`INPUT_LIMIT`] bytes wait on the host's side.
//!
//! # What is saved
//! The registers and the receive FIFO. What waits on the host's side, in either direction, is
//! between this guest and its console and stays there: a copy has a console of its own.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod line;
mod output;
#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test that panics has failed"
)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::Arc;

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use self::line::Line;
use self::output::Output;
use crate::{Error, ErrorKind};

pub use self::output::OUTPUT_LIMIT;

/// How many ports the UART has.
pub const PORTS: u16 = 8;
/// How many bytes of input wait for the guest at most.
pub const INPUT_LIMIT: usize = 64 << 10;

const OBJECT: &str = "serial port";

/// The UART's registers. Untrusted plain data, like all saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// The receive FIFO, oldest byte first.
    pub receive_fifo: Vec<u8>,
}

impl Payload for SerialState {
    const KIND: SectionKind = SectionKind(*b"uart");
    const VERSION: u16 = 1;
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(s: vm_superio::SerialState) -> Self {
        Self {
            divisor_low: s.baud_divisor_low,
            divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            receive_fifo: s.in_buffer,
        }
    }
}

impl From<&SerialState> for vm_superio::SerialState {
    fn from(s: &SerialState) -> Self {
        Self {
            baud_divisor_low: s.divisor_low,
            baud_divisor_high: s.divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.receive_fifo.clone(),
        }
    }
}

/// The serial port. The machine keeps it under a lock of its own.
pub struct Serial {
    uart: vm_superio::Serial<Line, NoEvents, Output>,
    /// Input for which the FIFO has had no room.
    input: VecDeque<u8>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("state", &self.uart.state())
            .field("input", &self.input.len())
            .field("output", self.uart.writer())
            .finish_non_exhaustive()
    }
}

impl Serial {
    /// A port as after power-on, which raises `line` and whose output goes to `out`.
    #[must_use]
    pub fn new(line: Arc<EventFd>, out: Box<dyn Write + Send>) -> Self {
        Self {
            uart: vm_superio::Serial::new(Line::open(line), Output::new(out)),
            input: VecDeque::new(),
        }
    }

    /// A port from saved state. It raises no interrupt before [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidState`] when the FIFO holds more than a FIFO can hold.
    pub fn restore(
        state: &SerialState,
        line: Arc<EventFd>,
        out: Box<dyn Write + Send>,
    ) -> Result<Self, Error> {
        let uart = vm_superio::Serial::from_state(
            &state.into(),
            Line::held(line),
            NoEvents,
            Output::new(out),
        )
        .map_err(|e| Error::because(ErrorKind::InvalidState, OBJECT, "restore the UART", e))?;
        uart.writer().pause();
        Ok(Self {
            uart,
            input: VecDeque::new(),
        })
    }

    /// The port's state.
    #[must_use]
    pub fn save(&self) -> SerialState {
        self.uart.state().into()
    }

    /// Holds interrupts back, and has the output thread neither write nor hold a lock. A writer that
    /// is blocked at that moment is waited for a tenth of a second and then left as it is.
    pub fn quiesce(&mut self) {
        self.uart.interrupt_evt().hold();
        self.uart.writer().pause();
    }

    /// Ends a quiesce; an interrupt that was held back is raised.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.uart.writer().resume();
        self.uart
            .interrupt_evt()
            .release()
            .map_err(|e| Error::because(ErrorKind::Io, OBJECT, "raise the interrupt", e))
    }

    /// A vCPU reads from port `offset` of the UART's eight. Its registers are bytes; a wider access
    /// reads all ones, as where there is no device.
    pub fn read(&mut self, offset: u16, data: &mut [u8]) {
        if let (Ok(offset @ 0..8), [byte]) = (u8::try_from(offset), &mut *data) {
            *byte = self.uart.read(offset);
            self.feed();
        } else {
            data.fill(0xff);
        }
    }

    /// A vCPU writes to port `offset` of the UART's eight. A wider access than a byte is ignored.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if let (Ok(offset @ 0..8), [byte]) = (u8::try_from(offset), data) {
            if let Err(error) = self.uart.write(offset, *byte) {
                tracing::debug!(%error, "a write to the serial port was not carried out");
            }
            self.feed();
        }
    }

    /// Sends `bytes` to the guest and returns how many were taken; the others are for later, when
    /// the guest has read some.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_LIMIT.saturating_sub(self.input.len());
        let taken = bytes.len().min(room);
        self.input.extend(bytes.iter().take(taken));
        self.feed();
        taken
    }

    /// How many bytes of output were lost because the writer failed or did not keep up.
    #[must_use]
    pub fn lost_output(&self) -> u64 {
        self.uart.writer().lost()
    }

    /// Gives the FIFO what it has room for.
    fn feed(&mut self) {
        if self.input.is_empty() || self.uart.fifo_capacity() == 0 {
            return;
        }
        let (first, _) = self.input.as_slices();
        match self.uart.enqueue_raw_bytes(first) {
            // In loopback mode nothing is taken; the input waits for its end.
            Ok(taken) => drop(self.input.drain(..taken)),
            Err(error) => tracing::debug!(%error, "serial input waits"),
        }
    }
}
