//! Frames: how messages follow each other on a connection.
//!
//! ```text
//! offset  size
//!      0     4  length of the payload, at most MAX_PAYLOAD
//!      4     2  magic number
//!      6     2  kind of the message
//!      8     …  payload: the message's fields one after the other, or raw bytes
//! ```
//! All little-endian. A frame that breaks these rules ends the connection.

use alloc::vec;
use alloc::vec::Vec;

use super::{Reply, Request};
use crate::wire::{Reader, Wire, WireError, WireErrorKind, Writer};

/// Bytes of a frame's header.
pub const HEADER: usize = 8;
/// The longest payload of a message.
pub const MAX_PAYLOAD: usize = 256 << 10;
/// The longest payload of a frame of raw bytes that either side sends: two of them fit what a
/// vsock connection may have in flight.
pub const MAX_RAW: usize = 64 << 10;
/// Marks every frame of this protocol: "OA".
pub const MAGIC: u16 = 0x414f;

/// Frames whose payload is bytes of a stream and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RawKind {
    /// Of a file (either way) or of a command's standard input (to the agent).
    Data = 64,
    /// The end of such a stream; empty.
    End = 65,
    /// A command's standard output, or all that its terminal shows.
    Stdout = 66,
    /// A command's standard error.
    Stderr = 67,
}

impl RawKind {
    /// Every raw kind.
    pub const ALL: &[Self] = &[Self::Data, Self::End, Self::Stdout, Self::Stderr];

    /// The raw kind of this number.
    pub fn of(kind: u16) -> Option<Self> {
        Self::ALL.iter().find(|raw| **raw as u16 == kind).copied()
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow; never above the kind's bound.
    pub len: usize,
    /// Which message.
    pub kind: u16,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`, or `TooLong` when the payload would be longer than its kind may be.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let len: u32 = reader.take()?;
        let magic: u16 = reader.take()?;
        if magic != MAGIC {
            let kind = WireErrorKind::BadMagic;
            return Err(WireError { kind, at: 4 });
        }
        let kind: u16 = reader.take()?;
        let bound = match RawKind::of(kind) {
            Some(RawKind::End) => 0,
            Some(_) => MAX_RAW,
            None => MAX_PAYLOAD,
        };
        let len = usize::try_from(len).ok().filter(|len| *len <= bound);
        let too_long = WireError {
            kind: WireErrorKind::TooLong,
            at: 0,
        };
        Ok(Self {
            len: len.ok_or(too_long)?,
            kind,
        })
    }

    /// The header of a frame with `len` bytes of payload.
    ///
    /// # Errors
    /// `TooLong` when that is more than a receiver takes.
    pub fn encode(kind: u16, len: usize) -> Result<[u8; HEADER], WireError> {
        let mut bytes = [0; HEADER];
        let too_long = WireError {
            kind: WireErrorKind::TooLong,
            at: 0,
        };
        let mut writer = Writer::new(&mut bytes);
        u32::try_from(len).map_err(|_| too_long)?.put(&mut writer)?;
        MAGIC.put(&mut writer)?;
        kind.put(&mut writer)?;
        // The writer obeys the reader's bounds.
        Self::decode(&bytes)?;
        Ok(bytes)
    }
}

/// Writes into a buffer that grows until the message fits.
fn encode(
    kind: u16,
    put: impl Fn(&mut Writer<'_>) -> Result<(), WireError>,
) -> Result<Vec<u8>, WireError> {
    let limit = HEADER.saturating_add(MAX_PAYLOAD);
    let mut size = 512;
    loop {
        let mut frame = vec![0; size];
        let mut writer = Writer::new(&mut frame);
        let tried = writer.bytes(&[0; HEADER]).and_then(|()| put(&mut writer));
        let written = writer.written();
        match tried {
            Ok(()) => {
                let header = Header::encode(kind, written.saturating_sub(HEADER))?;
                frame.truncate(written);
                if let Some(head) = frame.first_chunk_mut() {
                    *head = header;
                }
                return Ok(frame);
            }
            Err(error) if size >= limit => return Err(error),
            Err(_) => size = size.saturating_mul(8).min(limit),
        }
    }
}

impl Request {
    /// The request as a frame.
    ///
    /// # Errors
    /// `TooLong` when it is longer than [`MAX_PAYLOAD`].
    pub fn to_frame(&self) -> Result<Vec<u8>, WireError> {
        encode(self.kind(), |writer| self.put(writer))
    }
}

impl Reply {
    /// The reply as a frame.
    ///
    /// # Errors
    /// `TooLong` when it is longer than [`MAX_PAYLOAD`].
    pub fn to_frame(&self) -> Result<Vec<u8>, WireError> {
        encode(self.kind(), |writer| self.put(writer))
    }
}
