//! From a descriptor chain to a request (virtio 1.2, 5.2.6).
//!
//! The layout of descriptors is not assumed (virtio 1.2, 2.7.4): the device-readable bytes of a
//! chain are one stream (header, then data of the request), the device-writable bytes another
//! (data for the driver, then one status byte), and each may be cut anywhere.
//!
//! What is wrong with a chain decides who hears of it: when there is a status byte to write, the
//! request fails with an error status; when there is none (or the chain itself is broken: it
//! does not end, it is longer than its queue, it has readable bytes after writable ones), no
//! answer is possible and the device needs a reset.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::config::{BlkLimits, MAX_REQUEST_BYTES, SECTOR, feature};
use super::spans::Spans;
use crate::GuestRam;
use crate::virtio::DeviceError;

/// Request types (virtio 1.2, 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// `flags` of a discard or write-zeroes segment: the space may be given back.
const SEGMENT_UNMAP: u32 = 1;

/// Bytes in a GET_ID answer.
const ID_BYTES: u64 = 20;

/// The status byte of a request (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Bytes of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A range to be read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ZeroRange {
    pub(super) range: ByteRange,
    pub(super) unmap: bool,
}

/// Work for an engine. Offsets and lengths are inside the volume.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read { offset: u64, data: Spans },
    Write { offset: u64, data: Spans },
    Flush,
    Discard { ranges: Vec<ByteRange> },
    WriteZeroes { ranges: Vec<ZeroRange> },
}

impl Op {
    /// Bytes of guest memory that it moves.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => data.len(),
            Self::Flush | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }

    /// Whether it changes the volume.
    pub(super) fn is_change(&self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. }
        )
    }
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The engine does it. For a read, the writable spans are in the operation.
    Start(Op),
    /// The answer is there: these bytes, in these writable spans.
    Answer(Spans, [u8; 20]),
    /// Nothing to do but to say so; the spans are the writable ones, to be zeroed if they are to
    /// be written at all.
    Refuse(Status, Option<Spans>),
}

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// What the driver calls it in the used ring.
    pub(super) head: u16,
    /// Where its status goes.
    pub(super) status: GuestAddress,
    /// Device-writable bytes that the operation does not fill; the device zeroes them, for what
    /// the used ring reports as written must have been (virtio 1.2, 2.7.8.2).
    pub(super) surplus: Spans,
    /// What it asks for.
    pub(super) action: Action,
}

/// What a drive knows when it looks at requests.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) capacity_sectors: u64,
    pub(super) read_only: bool,
    pub(super) serial: [u8; 20],
    /// The features negotiated.
    pub(super) features: u64,
    pub(super) limits: BlkLimits,
}

/// Reads one chain of a queue of `queue_size` entries.
///
/// # Errors
/// When the chain has no place for an answer.
pub(super) fn parse(
    chain: DescriptorChain<&GuestRam>,
    memory: &GuestRam,
    queue_size: u16,
    rules: &Rules,
) -> Result<Request, DeviceError> {
    let head = chain.head_index();
    let Framed {
        mut readable,
        mut writable,
        status,
        in_memory,
    } = frame(chain, memory, queue_size)?;
    let request = |surplus, action| Request {
        head,
        status,
        surplus,
        action,
    };
    // What the device would have to zero is bounded like all other data.
    if !in_memory || writable.len() > MAX_REQUEST_BYTES {
        return Ok(request(
            Spans::default(),
            Action::Refuse(Status::IoError, None),
        ));
    }
    let action = match decode(&mut readable, &mut writable, memory, rules) {
        Ok(action) => action,
        Err(why) => {
            return Ok(request(
                Spans::default(),
                Action::Refuse(why, Some(writable)),
            ));
        }
    };
    Ok(request(writable, action))
}

/// A chain's two streams.
struct Framed {
    readable: Spans,
    /// Without the status byte.
    writable: Spans,
    status: GuestAddress,
    /// Whether every piece is in guest memory.
    in_memory: bool,
}

fn frame(
    chain: DescriptorChain<&GuestRam>,
    memory: &GuestRam,
    queue_size: u16,
) -> Result<Framed, DeviceError> {
    let mut readable = Spans::default();
    let mut writable = Spans::default();
    let mut in_memory = true;
    let mut last: Option<Descriptor> = None;
    let mut last_writable: Option<(Descriptor, bool)> = None;
    for (count, descriptor) in chain.enumerate() {
        // Virtio 1.2, 2.7.5.3.1: no chain, indirect or not, is longer than the queue.
        if count >= usize::from(queue_size) {
            return Err(DeviceError::Driver("a descriptor chain exceeds its queue"));
        }
        if descriptor.is_write_only() {
            let inside = writable.push(memory, descriptor.addr(), descriptor.len());
            in_memory &= inside;
            if descriptor.len() > 0 {
                last_writable = Some((descriptor, inside));
            }
        } else {
            // Virtio 1.2, 2.7.4.2: what the device reads comes first.
            if last.is_some_and(|d| d.is_write_only()) {
                return Err(DeviceError::Driver(
                    "a descriptor chain has readable bytes after writable ones",
                ));
            }
            in_memory &= readable.push(memory, descriptor.addr(), descriptor.len());
        }
        last = Some(descriptor);
    }
    // The iterator ends early where it cannot follow the chain.
    if last.is_none_or(|d| d.has_next()) {
        return Err(DeviceError::Driver("a descriptor chain does not end"));
    }
    // Without a writable byte, or with its last one outside memory, there is no answer.
    if !last_writable.is_some_and(|(_, inside)| inside) {
        return Err(DeviceError::Driver("a request has no status byte"));
    }
    let Some(status) = writable.pop_last_byte() else {
        return Err(DeviceError::Driver("a request has no status byte"));
    };
    Ok(Framed {
        readable,
        writable,
        status,
        in_memory,
    })
}

/// What a request asks for; takes from `writable` what the answer fills.
fn decode(
    readable: &mut Spans,
    writable: &mut Spans,
    memory: &GuestRam,
    rules: &Rules,
) -> Result<Action, Status> {
    // struct virtio_blk_req: type, reserved, sector, all little-endian.
    let header: [u8; 16] = readable.take_array(memory).ok_or(Status::IoError)?;
    let (kind, rest) = header.split_first_chunk::<4>().ok_or(Status::IoError)?;
    let sector = rest.last_chunk::<8>().ok_or(Status::IoError)?;
    let sector = u64::from_le_bytes(*sector);
    match u32::from_le_bytes(*kind) {
        T_IN => {
            let range = data_range(sector, writable.len(), rules)?;
            Ok(Action::Start(Op::Read {
                offset: range.offset,
                data: std::mem::take(writable),
            }))
        }
        T_OUT => {
            refuse_on_read_only(rules)?;
            let range = data_range(sector, readable.len(), rules)?;
            Ok(Action::Start(Op::Write {
                offset: range.offset,
                data: std::mem::take(readable),
            }))
        }
        T_FLUSH => Ok(Action::Start(Op::Flush)),
        T_GET_ID => {
            // A cut serial would name another disk.
            if writable.len() < ID_BYTES {
                return Err(Status::IoError);
            }
            Ok(Action::Answer(std::mem::take(writable), rules.serial))
        }
        T_DISCARD => {
            refuse_on_read_only(rules)?;
            let limits = (
                rules.limits.max_discard_sectors,
                rules.limits.max_discard_seg,
            );
            let ranges = segments(readable, memory, rules, feature::DISCARD, limits, 0)?;
            Ok(Action::Start(Op::Discard {
                ranges: ranges.into_iter().map(|zero| zero.range).collect(),
            }))
        }
        T_WRITE_ZEROES => {
            refuse_on_read_only(rules)?;
            let limits = (
                rules.limits.max_write_zeroes_sectors,
                rules.limits.max_write_zeroes_seg,
            );
            let known = SEGMENT_UNMAP;
            let ranges = segments(
                readable,
                memory,
                rules,
                feature::WRITE_ZEROES,
                limits,
                known,
            )?;
            Ok(Action::Start(Op::WriteZeroes { ranges }))
        }
        _ => Err(Status::Unsupported),
    }
}

/// Virtio 1.2, 5.2.6.2: a read-only device answers a write with IOERR and writes nothing.
fn refuse_on_read_only(rules: &Rules) -> Result<(), Status> {
    if rules.read_only {
        Err(Status::IoError)
    } else {
        Ok(())
    }
}

/// The range of an IN or OUT request; a length that is no multiple of 512 or a range beyond the
/// capacity is an error (virtio 1.2, 5.2.6.1 and 5.2.6.2).
fn data_range(sector: u64, len: u64, rules: &Rules) -> Result<ByteRange, Status> {
    if len > MAX_REQUEST_BYTES || len.checked_rem(SECTOR) != Some(0) {
        return Err(Status::IoError);
    }
    sector_range(
        sector,
        len.checked_div(SECTOR).ok_or(Status::IoError)?,
        rules,
    )
}

fn sector_range(sector: u64, sectors: u64, rules: &Rules) -> Result<ByteRange, Status> {
    let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
    if end > rules.capacity_sectors {
        return Err(Status::IoError);
    }
    Ok(ByteRange {
        offset: sector.checked_mul(SECTOR).ok_or(Status::IoError)?,
        len: sectors.checked_mul(SECTOR).ok_or(Status::IoError)?,
    })
}

/// The segments of a DISCARD or WRITE_ZEROES request (`struct virtio_blk_discard_write_zeroes`).
/// All are checked before the first is carried out.
fn segments(
    readable: &mut Spans,
    memory: &GuestRam,
    rules: &Rules,
    feature: u64,
    (max_sectors, max_segments): (u32, u32),
    known_flags: u32,
) -> Result<Vec<ZeroRange>, Status> {
    // Virtio 1.2, 5.2.6.1: only for drivers that negotiated it.
    if rules.features & feature == 0 {
        return Err(Status::Unsupported);
    }
    let count = readable.len().checked_div(16).ok_or(Status::IoError)?;
    if count == 0 || count > u64::from(max_segments) || readable.len().checked_rem(16) != Some(0) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::new();
    let mut unknown_flags = false;
    while readable.len() > 0 {
        let sector: [u8; 8] = readable.take_array(memory).ok_or(Status::IoError)?;
        let sectors: [u8; 4] = readable.take_array(memory).ok_or(Status::IoError)?;
        let flags: [u8; 4] = readable.take_array(memory).ok_or(Status::IoError)?;
        let flags = u32::from_le_bytes(flags);
        // Virtio 1.2, 5.2.6.2: unknown flags, and unmap in a discard, are UNSUPP.
        unknown_flags |= flags & !known_flags != 0;
        let sectors = u32::from_le_bytes(sectors);
        if sectors > max_sectors {
            return Err(Status::IoError);
        }
        ranges.push(ZeroRange {
            range: sector_range(u64::from_le_bytes(sector), u64::from(sectors), rules)?,
            unmap: flags & SEGMENT_UNMAP != 0,
        });
    }
    if unknown_flags {
        return Err(Status::Unsupported);
    }
    Ok(ranges)
}
