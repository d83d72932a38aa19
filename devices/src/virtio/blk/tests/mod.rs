//! Tests of the drive through its transport, with real rings in real guest memory on a real file.
#![allow(
    clippy::cast_possible_truncation,
    reason = "a test that is wrong by a cast fails"
)]

mod denied;
mod faults;
mod fork;
mod hostile;
mod life;
mod requests;
mod restore;
mod volume;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use self::volume::TestVolume;
use super::*;
use crate::virtio::testing::{Driver, Segment, TestRam, Used};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// No device writes this.
const UNTOUCHED: u8 = 0xa5;

/// A test's volume has so many sectors, if it has no reason for others.
const SECTORS: u64 = 4096;

const ENGINES: [EngineChoice; 2] = [EngineChoice::Threads, EngineChoice::IoUring];

/// Everything that a driver may accept.
const ALL: u64 = u64::MAX;

/// A drive, its volume, and a driver that has brought it up.
struct Rig {
    ram: TestRam,
    blk: Arc<Mutex<Blk>>,
    volume: Arc<TestVolume>,
    driver: Driver,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    data: Vec<u8>,
    used: u32,
}

impl Rig {
    fn new(engine: EngineChoice) -> Self {
        Self::with(engine, BlkConfig::new("disk0"), ALL)
    }

    fn with(engine: EngineChoice, config: BlkConfig, features: u64) -> Self {
        Self::on(
            TestVolume::new(SECTORS * 512).arc(),
            engine,
            config,
            features,
        )
    }

    fn on(volume: Arc<TestVolume>, engine: EngineChoice, config: BlkConfig, features: u64) -> Self {
        let host = BlkHost {
            engine,
            ..BlkHost::new(volume.clone())
        };
        let blk = Arc::new(Mutex::new(Blk::new(config, host).unwrap()));
        let ram = TestRam::new(64 << 20);
        let driver = Driver::start(&ram, blk.clone(), features);
        Self {
            ram,
            blk,
            volume,
            driver,
        }
    }

    /// Makes a chain available and notifies, as a driver does.
    fn submit(&mut self, segments: &[Segment]) -> u16 {
        let queue = &mut self.driver.queues[0];
        let old = queue.avail_index();
        let head = queue.push(segments);
        if queue.should_notify(old) {
            self.driver.kick(0);
        }
        head
    }

    fn wait_used(&mut self) -> Used {
        let mut used = None;
        self.driver.run_until(|driver| {
            used = driver.queues[0].pop_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// One request from beginning to end: header and `data` in a descriptor each, then `len` bytes
    /// and the status in one each.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], len: u32) -> Answer {
        let mut segments = vec![self.ram.readable(&header(kind, sector))];
        if !data.is_empty() {
            segments.push(self.ram.readable(data));
        }
        let into = self.ram.writable(len.max(1));
        if len > 0 {
            segments.push(into);
        }
        let status = self.status();
        segments.push(status);
        self.ask_chain(&segments, &into, len, &status)
    }

    fn ask_chain(
        &mut self,
        segments: &[Segment],
        into: &Segment,
        len: u32,
        status: &Segment,
    ) -> Answer {
        let head = self.submit(segments);
        let used = self.wait_used();
        assert_eq!(used.head, head);
        let mut data = self.ram.read(into);
        data.truncate(len as usize);
        Answer {
            status: self.ram.read(status)[0],
            data,
            used: used.len,
        }
    }

    /// A status byte that nobody has written yet.
    fn status(&self) -> Segment {
        let status = self.ram.writable(1);
        self.ram.memory().write_obj(UNTOUCHED, status.addr).unwrap();
        status
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ask(T_OUT, sector, data, 0).status
    }

    fn read(&mut self, sector: u64, len: u32) -> Answer {
        self.ask(T_IN, sector, &[], len)
    }

    fn needs_reset(&mut self) -> bool {
        self.blk.lock().unwrap().needs_reset()
    }

    /// Waits until the device has given up on its driver.
    fn wait_needs_reset(&mut self) {
        let blk = Arc::clone(&self.blk);
        self.driver.run_until(|_| blk.lock().unwrap().needs_reset());
    }
}

/// `struct virtio_blk_req` up to its data.
fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// `struct virtio_blk_discard_write_zeroes`.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Bytes that differ everywhere.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed)
        .collect()
}
