//! COM1: lines in and out.

use core::fmt;

use offshoot_protocol::MAX_LINE;

use crate::cpu::{in8, out8};

const COM1: u16 = 0x3f8;
/// Its global system interrupt.
pub(crate) const GSI: u32 = 4;
const LSR: u16 = COM1 + 5;
const DATA_READY: u8 = 1;
const ALL_ONES: u8 = 0xff;

/// Writes to the line. The emulated ports this runs on never hold a byte back.
pub(crate) struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            out8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line; the port can't fail.
macro_rules! say {
    ($($arg:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut crate::serial::Serial, format_args!($($arg)*));
        let _ = core::fmt::Write::write_str(&mut crate::serial::Serial, "\n");
    }};
}
pub(crate) use say;

/// Turns on the interrupt for received bytes.
pub(crate) fn listen() {
    out8(COM1 + 3, 0x03); // 8n1, divisor latch off
    out8(COM1 + 2, 0x01); // FIFO
    out8(COM1 + 4, 0x0b); // DTR, RTS, OUT2: the interrupt reaches the line
    out8(COM1 + 1, 0x01); // received data
}

/// Gathers bytes to lines.
pub(crate) struct LineReader {
    line: [u8; MAX_LINE],
    len: usize,
    overlong: bool,
}

/// A line that was read.
#[expect(
    clippy::large_enum_variant,
    reason = "there is no allocator to box the line with"
)]
pub(crate) enum Line {
    /// Its bytes.
    Whole([u8; MAX_LINE], usize),
    /// It was longer than a line may be.
    TooLong,
}

impl LineReader {
    pub(crate) const fn new() -> Self {
        Self {
            line: [0; MAX_LINE],
            len: 0,
            overlong: false,
        }
    }

    /// Takes bytes from the port until a line is whole or no byte is left.
    pub(crate) fn poll(&mut self) -> Option<Line> {
        loop {
            let status = in8(LSR);
            if status == ALL_ONES || status & DATA_READY == 0 {
                return None;
            }
            match in8(COM1) {
                b'\r' | b'\n' => {
                    let (len, overlong) = (self.len, self.overlong);
                    (self.len, self.overlong) = (0, false);
                    match (len, overlong) {
                        (_, true) => return Some(Line::TooLong),
                        (0, false) => {}
                        (len, false) => return Some(Line::Whole(self.line, len)),
                    }
                }
                byte => match self.line.get_mut(self.len) {
                    Some(slot) => {
                        *slot = byte;
                        self.len += 1;
                    }
                    None => self.overlong = true,
                },
            }
        }
    }
}
