//! What the pilot can be asked.

use crate::declare::{choices, messages};
use crate::value::{Ipv4, Mac};

choices! {
    /// What to do with a range of a disk.
    BlkOp {
        /// Write the pattern of the seed.
        #[default]
        Write = 1 "write",
        /// Read, and compare with the pattern of the seed.
        Verify = 2 "verify",
        /// Read, and compare with zeroes.
        VerifyZero = 3 "verify-zero",
        /// Read without comparing.
        Read = 4 "read",
        /// `VIRTIO_BLK_T_DISCARD`.
        Discard = 5 "discard",
        /// `VIRTIO_BLK_T_WRITE_ZEROES`, with permission to unmap.
        Zero = 6 "zero",
        /// `VIRTIO_BLK_T_FLUSH`; the range does not matter.
        Flush = 7 "flush",
    }
}

choices! {
    /// What the main loop does when there is nothing to do.
    Mode {
        /// Halts until an interrupt.
        #[default]
        Halt = 1 "halt",
        /// Looks at every queue without end, interrupts from devices suppressed.
        Poll = 2 "poll",
        /// Like `Poll`, and writes the low byte of its counter to I/O port 0x80 each turn: a guest
        /// that shows the host by an exit of its own that it runs.
        Beacon = 3 "beacon",
    }
}

choices! {
    /// A way to die.
    Crash {
        /// An exception without handlers: the machine shuts down or resets.
        #[default]
        TripleFault = 1 "triple-fault",
        /// An access to an address that is not mapped: reported on the serial line.
        PageFault = 2 "page-fault",
        /// An invalid instruction: reported on the serial line.
        InvalidOpcode = 3 "invalid-opcode",
        /// A panic with its message on the serial line.
        Panic = 4 "panic",
        /// A halt with interrupts off, without a word.
        Hang = 5 "hang",
    }
}

/// A piece of the memory that the pilot owns (all RAM but its image and what the firmware keeps),
/// counted as if it lay in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Bytes from the start; a multiple of 8.
    pub offset: u64,
    /// Bytes; a multiple of 8, or `u64::MAX` for all the rest.
    pub len: u64,
}

impl Area {
    /// All memory that the pilot owns.
    pub const ALL: Self = Self {
        offset: 0,
        len: u64::MAX,
    };
}

messages! {
    /// What the host asks. The answer to each is named with it; a refusal is always possible.
    Request {
        /// Settles the version: the first message of a connection. Answer: `Hello`.
        Hello = 1 "hello" {
            /// Oldest version that the host speaks.
            oldest: u16 = crate::OLDEST_VERSION,
            /// Newest version that the host speaks.
            newest: u16 = crate::VERSION,
        }
        /// A report on everything. Answer: `State`.
        State = 2 "state" {}
        /// Fills owned memory with the pattern of the seed. Answer: `Outcome`.
        Fill = 3 "fill" {
            /// First byte, a multiple of 8.
            offset: u64 = 0,
            /// Bytes, a multiple of 8; all the rest by `u64::MAX`.
            len: u64 = u64::MAX,
            /// Seed of the pattern.
            seed: u64,
        }
        /// Compares owned memory with the pattern of the seed. Answer: `Outcome`.
        Verify = 4 "verify" {
            /// First byte, a multiple of 8.
            offset: u64 = 0,
            /// Bytes, a multiple of 8; all the rest by `u64::MAX`.
            len: u64 = u64::MAX,
            /// Seed of the pattern.
            seed: u64,
        }
        /// Rewrites one word of each 4 KiB page with what it holds. Answer: `Outcome`.
        Touch = 5 "touch" {
            /// First byte, a multiple of 8.
            offset: u64 = 0,
            /// Bytes, a multiple of 8; all the rest by `u64::MAX`.
            len: u64 = u64::MAX,
        }
        /// From now on rewrites pages of an area at a rate, round and round, without changing what
        /// they hold; a rate of 0 stops. The main loop does not halt meanwhile. Answer: `Done`.
        Dirty = 6 "dirty" {
            /// First byte, a multiple of 8.
            offset: u64 = 0,
            /// Bytes, a multiple of 8; all the rest by `u64::MAX`.
            len: u64 = u64::MAX,
            /// Pages of 4 KiB a second.
            rate: u32,
        }
        /// Works on a disk. Answer: `Outcome`.
        Blk = 7 "blk" {
            /// Which disk, counted from 0 among the disks.
            device: u8 = 0,
            /// What to do.
            op: BlkOp,
            /// First byte, a multiple of 512.
            offset: u64 = 0,
            /// Bytes, a multiple of 512; to the end of the disk by `u64::MAX`.
            len: u64 = u64::MAX,
            /// Seed of the pattern. A byte's value depends on the seed and on its place on the
            /// disk only.
            seed: u64 = 0,
            /// Bytes in one request, a multiple of 512, at most 64 KiB for data.
            chunk: u32 = 65536,
            /// Requests in flight, 1 to 20.
            depth: u16 = 8,
        }
        /// Gives a network card an address: the pilot then answers ARP, ICMP echo and UDP echo
        /// (port 7) for it. Answer: `Done`.
        NetAddress = 8 "net-address" {
            /// Which card, counted from 0 among the cards.
            device: u8 = 0,
            /// The address; 0.0.0.0 takes it away.
            ip: Ipv4,
        }
        /// Sends frames of the echo ethertype one by one and waits for each to come back.
        /// Answer: `Outcome`.
        NetPing = 9 "net-ping" {
            /// Which card.
            device: u8 = 0,
            /// How many frames.
            frames: u32 = 1,
            /// Bytes of payload, 8 to 1500.
            len: u16 = 64,
            /// Where to.
            peer: Mac = Mac([0xff; 6]),
        }
        /// Sends frames of the echo ethertype as fast as the card takes them. Answer: `Outcome`.
        NetSend = 10 "net-send" {
            /// Which card.
            device: u8 = 0,
            /// How many frames.
            frames: u32,
            /// Bytes of payload, 8 to 1500.
            len: u16 = 1500,
            /// Where to.
            peer: Mac = Mac([0xff; 6]),
        }
        /// Connects to a port of the host over vsock, sends the pattern of the seed, shuts down its
        /// sending side and compares what comes back with the same pattern. Answer: `Outcome`.
        VsockConnect = 11 "vsock-connect" {
            /// Port on the host.
            port: u32,
            /// Bytes to send, a multiple of 8.
            len: u64 = 4096,
            /// Seed of the pattern.
            seed: u64 = 0,
        }
        /// Bytes of the entropy device. Answer: `Random`.
        Random = 12 "random" {
            /// How many, 1 to 64.
            len: u8 = 16,
        }
        /// What the main loop does when there is nothing to do. Answer: `Done`.
        SetMode = 13 "mode" {
            /// The mode from now on.
            mode: Mode,
        }
        /// Counts in a tight loop. Answer: `Outcome`.
        Spin = 14 "spin" {
            /// Turns of the loop.
            turns: u64,
        }
        /// Dies. No answer.
        Crash = 15 "crash" {
            /// How.
            how: Crash,
        }
        /// Resets the machine by the i8042 (0xfe to port 0x64), or by a triple fault a second later
        /// when that does nothing. No answer.
        Reboot = 16 "reboot" {}
        /// Has the balloon hold as much as the host asks for now: gives the last owned pages, or
        /// takes them back. What was given is not owned. Answer: `Outcome`, `bytes` being what
        /// the balloon holds.
        Balloon = 17 "balloon" {}
        /// Reports owned memory to the host as free: it may hold anything afterwards.
        /// Answer: `Outcome`.
        Report = 18 "report" {
            /// First byte, a multiple of 4096.
            offset: u64 = 0,
            /// Bytes, a multiple of 4096; all the rest by `u64::MAX`.
            len: u64 = u64::MAX,
        }
    }
}
