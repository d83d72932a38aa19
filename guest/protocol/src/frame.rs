//! Frames: how messages follow each other on a stream.
//!
//! ```text
//! offset  size
//!      0     4  length of the payload, at most MAX_PAYLOAD
//!      4     2  magic number
//!      6     2  kind of the message
//!      8     4  tag: a reply has its request's
//!     12     …  payload: the message's fields one after the other
//! ```
//! All little-endian. A frame that breaks these rules ends the connection.

use crate::wire::{Reader, Wire, WireError, WireErrorKind, Writer};
use crate::{Reply, Request};

/// Bytes of a frame's header.
pub const HEADER: usize = 12;
/// The longest payload that either side sends or takes.
pub const MAX_PAYLOAD: usize = 2036;
/// The longest frame.
pub const MAX_FRAME: usize = HEADER + MAX_PAYLOAD;
/// Marks every frame of this protocol: "OS".
pub const MAGIC: u16 = 0x534f;

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow; never above [`MAX_PAYLOAD`].
    pub len: usize,
    /// Which message.
    pub kind: u16,
    /// Chosen by the host for its request.
    pub tag: u32,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`, or `TooLong` when the payload would be longer than [`MAX_PAYLOAD`].
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let len: u32 = reader.take()?;
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_PAYLOAD)
            .ok_or(WireError {
                kind: WireErrorKind::TooLong,
                at: 0,
            })?;
        let magic: u16 = reader.take()?;
        if magic != MAGIC {
            return Err(WireError {
                kind: WireErrorKind::BadMagic,
                at: 4,
            });
        }
        Ok(Self {
            len,
            kind: reader.take()?,
            tag: reader.take()?,
        })
    }
}

fn encode(
    frame: &mut [u8],
    kind: u16,
    tag: u32,
    put: impl FnOnce(&mut Writer<'_>) -> Result<(), WireError>,
) -> Result<usize, WireError> {
    let too_long = WireError {
        kind: WireErrorKind::TooLong,
        at: 0,
    };
    let (header, payload) = frame.split_at_mut_checked(HEADER).ok_or(too_long)?;
    let mut writer = Writer::new(payload);
    put(&mut writer)?;
    let len = writer.written();
    if len > MAX_PAYLOAD {
        return Err(too_long);
    }
    let mut writer = Writer::new(header);
    u32::try_from(len).map_err(|_| too_long)?.put(&mut writer)?;
    MAGIC.put(&mut writer)?;
    kind.put(&mut writer)?;
    tag.put(&mut writer)?;
    Ok(HEADER.saturating_add(len))
}

/// Writes a request as a frame and says how long it is.
///
/// # Errors
/// `TooLong` when the buffer is shorter than the frame; [`MAX_FRAME`] is always enough.
pub fn encode_request(frame: &mut [u8], request: &Request, tag: u32) -> Result<usize, WireError> {
    encode(frame, request.kind(), tag, |writer| request.put(writer))
}

/// Writes a reply as a frame and says how long it is.
///
/// # Errors
/// `TooLong` when the buffer is shorter than the frame; [`MAX_FRAME`] is always enough.
pub fn encode_reply(frame: &mut [u8], reply: &Reply, tag: u32) -> Result<usize, WireError> {
    encode(frame, reply.kind(), tag, |writer| reply.put(writer))
}
