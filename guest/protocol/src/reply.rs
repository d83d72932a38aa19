//! What the pilot answers.

use core::fmt;

use crate::declare::{choices, messages, record};
use crate::request::Mode;
use crate::value::{Bytes, Id, List, Text};
use crate::wire::{Reader, Wire, WireError, Writer};
use crate::{MAX_DEVICES, MAX_RANDOM, MAX_VCPUS};

choices! {
    /// Why the pilot refuses.
    ErrorCode {
        /// The message could not be read; detail: at which byte.
        #[default]
        Malformed = 1 "malformed",
        /// No version in common; detail: the newest that the pilot speaks.
        Version = 2 "version",
        /// The connection did not start with `Hello`.
        NoHello = 3 "no-hello",
        /// There is no such device; detail: how many there are.
        NoDevice = 4 "no-device",
        /// A value is outside its range; detail: the range's end.
        OutOfRange = 5 "out-of-range",
        /// A value is not a multiple of what it must be; detail: of what.
        Misaligned = 6 "misaligned",
        /// The device does not offer the feature; detail: the feature's bit.
        NotOffered = 7 "not-offered",
        /// The device answered with an error; detail: its status byte.
        DeviceFailed = 8 "device-failed",
        /// The device or the peer did not answer in time; detail: how much was done.
        NoAnswer = 9 "no-answer",
        /// The device broke the rules of virtio and is no longer used.
        DeviceBroken = 10 "device-broken",
        /// The peer refused the connection or reset it; detail: how much was done.
        Reset = 11 "reset",
        /// What is asked for is in use; detail: how many may be at a time.
        Busy = 12 "busy",
    }
}

choices! {
    /// The kinds of devices that a report tells apart.
    DeviceKind {
        /// One that the pilot has no driver for.
        #[default]
        Other = 0 "other",
        /// Network card (virtio 1.2, 5.1).
        Net = 1 "net",
        /// Disk (5.2).
        Blk = 2 "blk",
        /// Entropy (5.4).
        Rng = 4 "rng",
        /// Balloon (5.5).
        Balloon = 5 "balloon",
        /// Sockets (5.10).
        Vsock = 19 "vsock",
    }
}

/// A virtio-mmio device as the pilot found it. In text: kind, window, interrupt, negotiated
/// features and value with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// Guest physical address of its window.
    pub window: u64,
    /// Its global system interrupt.
    pub gsi: u8,
    /// The features that both sides agreed on; 0 when the device could not be set up.
    pub features: u64,
    /// Bytes of a disk, CID of a vsock, address of a network card (first byte lowest).
    pub value: u64,
}

impl Wire for Device {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        self.kind.put(writer)?;
        self.window.put(writer)?;
        self.gsi.put(writer)?;
        self.features.put(writer)?;
        self.value.put(writer)
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            kind: reader.take()?,
            window: reader.take()?,
            gsi: reader.take()?,
            features: reader.take()?,
            value: reader.take()?,
        })
    }
}

impl Text for Device {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            window,
            gsi,
            features,
            value,
        } = self;
        write!(f, "{kind}:{window:#x}:{gsi}:{features:#x}:{value:#x}")
    }
    fn parse(text: &str) -> Option<Self> {
        let mut items = text.split(':');
        let device = Self {
            kind: Text::parse(items.next()?)?,
            window: Text::parse(items.next()?)?,
            gsi: Text::parse(items.next()?)?,
            features: Text::parse(items.next()?)?,
            value: Text::parse(items.next()?)?,
        };
        items.next().is_none().then_some(device)
    }
}

record! {
    /// A report on everything.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    State {
        /// Turns of the main loop. It only grows, and a copy goes on from where its source was.
        counter: u64,
        /// Made once at boot: two guests with one boot id have the same past.
        boot_id: Id,
        /// The VM generation id, read now; all zero when there is none.
        generation: Id,
        /// The time-stamp counter.
        tsc: u64,
        /// Its frequency in kHz; 0 when not yet measured.
        tsc_khz: u64,
        /// Bytes of RAM that the firmware told of.
        ram: u64,
        /// Bytes of it that the pilot owns: what memory requests work on.
        owned: u64,
        /// The idle mode.
        mode: Mode,
        /// Interrupts taken that meant work for a device.
        interrupts: u64,
        /// Requests answered, on all lines together.
        requests: u64,
        /// vsock connections that are open.
        connections: u16,
        /// Transport resets seen on the vsock event queue (virtio 1.2, 5.10.6.7).
        resets: u32,
        /// Frames that came in on all cards.
        frames_in: u64,
        /// Frames that went out on all cards.
        frames_out: u64,
        /// Pages that a running `Dirty` has rewritten.
        dirtied: u64,
        /// The last refusal's code; `malformed` with detail 0 when there was none.
        last_error: ErrorCode,
        /// The last refusal's detail.
        last_detail: u64,
        /// A counter for each virtual CPU, the boot CPU first.
        vcpus: List<u64, MAX_VCPUS>,
        /// The devices.
        devices: List<Device, MAX_DEVICES>,
    }
}

record! {
    /// What a piece of work came to.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    Outcome {
        /// Bytes worked on.
        bytes: u64,
        /// Requests, pages, frames or packets that it took.
        units: u64,
        /// Bytes received back, where something comes back.
        received: u64,
        /// Words of 8 bytes that differ from what they should be.
        bad: u64,
        /// Where the first of them lies; `u64::MAX` when there is none.
        first_bad: u64,
        /// Ticks of the time-stamp counter that it took.
        ticks: u64,
    }
}

/// A refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub code: ErrorCode,
    /// A number that makes it precise; the code says which.
    pub detail: u64,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: ErrorCode, detail: u64) -> Self {
        Self { code, detail }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.code, self.detail)
    }
}

impl core::error::Error for Refusal {}

messages! {
    /// What the pilot answers.
    #[expect(clippy::large_enum_variant, reason = "there is no allocator to box the report with")]
    Reply {
        /// The version is settled.
        Hello = 129 "hello" {
            /// The version that both speak from now on.
            version: u16,
        }
        /// A report.
        State = 130 "state" {
            /// The report.
            state: State,
        }
        /// It is done, and there is nothing to tell.
        Done = 131 "done" {}
        /// It is done.
        Outcome = 132 "outcome" {
            /// What it came to.
            outcome: Outcome,
        }
        /// Random bytes.
        Random = 133 "random" {
            /// The bytes.
            bytes: Bytes<MAX_RANDOM>,
        }
        /// It was not done.
        Refused = 255 "refused" {
            /// Why.
            code: ErrorCode,
            /// A number that makes it precise.
            detail: u64,
        }
    }
}
