//! Quiesce, reset and drop with I/O in flight.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// A request of which the test knows what must come of it.
struct Expected {
    slot: usize,
    status: Segment,
    /// For a read: where to, and what.
    read: Option<(Segment, Vec<u8>)>,
}

/// A driver that keeps many requests in flight and a model of the disk. Each of its slots owns a
/// part of the disk and has at most one request in flight, so that their order does not matter.
struct Load {
    rig: Rig,
    model: Vec<u8>,
    in_flight: HashMap<u16, Expected>,
    busy: Vec<bool>,
    seed: u64,
    done: u64,
}

const SLOTS: usize = 48;
const SLOT_SECTORS: u64 = 16;

impl Load {
    fn new(engine: EngineChoice, seed: u64) -> Self {
        let mut volume = TestVolume::new(SLOTS as u64 * SLOT_SECTORS * 512);
        volume.raw = engine != EngineChoice::Threads;
        let mut config = BlkConfig::new("disk0");
        config.queue_size = 256;
        Self {
            rig: Rig::on(volume.arc(), engine, config, ALL),
            model: vec![0; SLOTS * SLOT_SECTORS as usize * 512],
            in_flight: HashMap::new(),
            busy: vec![false; SLOTS],
            seed: seed | 1,
            done: 0,
        }
    }

    /// xorshift64
    fn random(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }

    /// Fills every free slot with a request, without waiting for any.
    fn push_all(&mut self) {
        for slot in 0..SLOTS {
            if !self.busy[slot] {
                self.push(slot);
            }
        }
    }

    fn push(&mut self, slot: usize) {
        let first = self.random(SLOT_SECTORS);
        let sectors = 1 + self.random(SLOT_SECTORS - first);
        let sector = slot as u64 * SLOT_SECTORS + first;
        let bytes = (sector * 512) as usize..((sector + sectors) * 512) as usize;
        let status = self.rig.status();
        let mut read = None;
        let chain = match self.random(8) {
            0..=3 => {
                let data = pattern(self.random(256) as u8, bytes.len());
                self.model[bytes].copy_from_slice(&data);
                vec![
                    self.rig.ram.readable(&header(T_OUT, sector)),
                    self.rig.ram.readable(&data),
                    status,
                ]
            }
            4..=5 => {
                let into = self.rig.ram.writable(bytes.len() as u32);
                read = Some((into, self.model[bytes].to_vec()));
                vec![self.rig.ram.readable(&header(T_IN, sector)), into, status]
            }
            6 => {
                self.model[bytes].fill(0);
                let data = segment(sector, sectors as u32, 0);
                vec![
                    self.rig.ram.readable(&header(T_WRITE_ZEROES, 0)),
                    self.rig.ram.readable(&data),
                    status,
                ]
            }
            _ => vec![self.rig.ram.readable(&header(T_FLUSH, 0)), status],
        };
        self.busy[slot] = true;
        let head = self.rig.submit(&chain);
        let expected = Expected { slot, status, read };
        assert!(self.in_flight.insert(head, expected).is_none());
    }

    /// Takes what was used. `DriverQueue` panics when that was not in flight.
    fn reap(&mut self) {
        while let Some(used) = self.rig.driver.queues[0].pop_used() {
            let expected = self.in_flight.remove(&used.head).unwrap();
            assert_eq!(self.rig.ram.read(&expected.status), [OK]);
            if let Some((into, data)) = expected.read {
                assert!(self.rig.ram.read(&into) == data, "a read saw other bytes");
            }
            self.busy[expected.slot] = false;
            self.done += 1;
        }
    }

    fn drain(&mut self) {
        let limit = Instant::now() + Duration::from_secs(20);
        while !self.in_flight.is_empty() {
            assert!(
                Instant::now() < limit,
                "{} requests lost",
                self.in_flight.len()
            );
            self.reap();
            std::thread::yield_now();
        }
        assert!(self.rig.volume.content() == self.model, "the disk differs");
    }
}

/// Nothing is lost and nothing done twice, however often the drive is stopped.
fn quiesce_under_load(engine: EngineChoice, seed: u64, rounds: usize) {
    let mut load = Load::new(engine, seed);
    for _ in 0..rounds {
        load.push_all();
        if load.random(2) == 0 {
            std::thread::sleep(Duration::from_micros(load.random(300)));
        }
        let states = load.rig.blk.lock().unwrap().quiesce().unwrap();
        // All that was taken has been used: nothing is anywhere in between.
        assert_eq!(states[0].next_avail, states[0].next_used);
        let used = load.rig.driver.queues[0].used_index();
        assert_eq!(used, states[0].next_used);
        load.reap();
        // Notifications while it is quiesced are not lost either.
        load.push_all();
        assert_eq!(load.rig.driver.queues[0].used_index(), used);
        load.rig.blk.lock().unwrap().resume().unwrap();
        load.reap();
    }
    load.drain();
    assert!(load.done >= (rounds * SLOTS) as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_or_doubled_with_threads(seed in any::<u64>()) {
        quiesce_under_load(EngineChoice::Threads, seed, 12);
    }

    #[test]
    fn nothing_is_lost_or_doubled_with_io_uring(seed in any::<u64>()) {
        quiesce_under_load(EngineChoice::IoUring, seed, 12);
    }
}

#[test]
fn a_quiesce_of_an_idle_or_inactive_drive_is_harmless() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        for _ in 0..3 {
            let mut blk = rig.blk.lock().unwrap();
            assert_eq!(blk.quiesce().unwrap(), blk.quiesce().unwrap());
            blk.resume().unwrap();
            blk.resume().unwrap();
        }
        assert_eq!(rig.write(0, &pattern(1, 512)), OK);
        rig.driver.set(0x70, 0);
        let mut blk = rig.blk.lock().unwrap();
        assert_eq!(blk.quiesce().unwrap(), []);
        blk.resume().unwrap();
    }
}

#[test]
fn a_quiesce_ends_when_io_fails() {
    let mut rig = Rig::new(EngineChoice::Threads);
    rig.volume.fail_changes.store(true, Ordering::SeqCst);
    let statuses: Vec<_> = (0..40)
        .map(|sector| {
            let chain = [
                rig.ram.readable(&header(T_OUT, sector)),
                rig.ram.readable(&pattern(1, 512)),
                rig.status(),
            ];
            rig.submit(&chain);
            chain[2]
        })
        .collect();
    rig.driver.kick(0);
    rig.driver
        .run_until(|driver| driver.queues[0].used_index() > 0);
    let states = rig.blk.lock().unwrap().quiesce().unwrap();
    let answered = statuses
        .iter()
        .filter(|status| rig.ram.read(status) == [IOERR])
        .count();
    assert_eq!(answered, usize::from(states[0].next_used));
}

/// A write that waits at the volume's gate.
fn hold_a_write(rig: &mut Rig) -> Segment {
    rig.volume.gate.set_closed(true);
    let chain = [
        rig.ram.readable(&header(T_OUT, 5)),
        rig.ram.readable(&pattern(1, 512)),
        rig.status(),
    ];
    rig.submit(&chain);
    let volume = Arc::clone(&rig.volume);
    rig.driver
        .run_until(|_| volume.gate.came.load(Ordering::SeqCst) > 0);
    chain[2]
}

/// Opens the gate in a while; returns whether it is open.
fn open_later(volume: &Arc<TestVolume>) -> (Arc<AtomicBool>, std::thread::JoinHandle<()>) {
    let opened = Arc::new(AtomicBool::new(false));
    let (volume, told) = (Arc::clone(volume), Arc::clone(&opened));
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        told.store(true, Ordering::SeqCst);
        volume.gate.set_closed(false);
    });
    (opened, thread)
}

#[test]
fn quiesce_reset_and_drop_wait_for_what_is_in_flight() {
    let rig = || Rig::new(EngineChoice::Threads);
    {
        let mut rig = rig();
        let status = hold_a_write(&mut rig);
        let (opened, thread) = open_later(&rig.volume);
        rig.blk.lock().unwrap().quiesce().unwrap();
        assert!(opened.load(Ordering::SeqCst), "quiesce did not wait");
        assert_eq!(rig.ram.read(&status), [OK]);
        thread.join().unwrap();
    }
    {
        let mut rig = rig();
        hold_a_write(&mut rig);
        let (opened, thread) = open_later(&rig.volume);
        // 2.1.1: a reset by the driver.
        rig.driver.set(0x70, 0);
        assert!(opened.load(Ordering::SeqCst), "reset did not wait");
        assert_eq!(rig.driver.get(0x70), 0);
        thread.join().unwrap();
        // Nothing comes after it.
        let before = rig.driver.queues[0].used_index();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rig.driver.queues[0].used_index(), before);
    }
    {
        let mut rig = rig();
        hold_a_write(&mut rig);
        let (opened, thread) = open_later(&rig.volume);
        let Rig {
            blk,
            driver,
            volume,
            ..
        } = rig;
        drop(driver);
        drop(blk);
        assert!(opened.load(Ordering::SeqCst), "drop did not wait");
        thread.join().unwrap();
        assert_eq!(volume.content()[5 * 512..][..512], pattern(1, 512));
    }
}

#[test]
fn a_drive_with_io_in_flight_can_be_dropped_and_reset_again_and_again() {
    for engine in ENGINES {
        for round in 0..20 {
            let mut load = Load::new(engine, round + 7);
            load.push_all();
            if round % 2 == 0 {
                load.rig.driver.set(0x70, 0);
                assert_eq!(load.rig.driver.get(0x70), 0);
            }
            // The memory goes with it, right after.
            drop(load);
        }
    }
}

#[test]
fn the_queue_goes_on_when_more_is_available_than_may_be_in_flight() {
    // 64 MiB are in flight at most; this makes 80 MiB available in one go.
    for engine in ENGINES {
        let mut rig = Rig::on(
            TestVolume::new(4 << 20).arc(),
            engine,
            BlkConfig::new("d"),
            ALL,
        );
        let into = Segment::writable(GuestAddress(60 << 20), 4 << 20);
        let statuses: Vec<_> = (0..20)
            .map(|_| {
                let chain = [rig.ram.readable(&header(T_IN, 0)), into, rig.status()];
                rig.driver.queues[0].push(&chain);
                chain[2]
            })
            .collect();
        rig.driver.kick(0);
        for _ in 0..20 {
            rig.wait_used();
        }
        for status in statuses {
            assert_eq!(rig.ram.read(&status), [OK]);
        }
    }
}

#[test]
fn a_drive_comes_up_again_after_a_reset() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        for round in 0..5 {
            let data = pattern(round, 512);
            assert_eq!(rig.write(round.into(), &data), OK);
            let accepted = rig.driver.negotiate(ALL);
            rig.driver.queues.clear();
            rig.driver.set_up_queues(&rig.ram, accepted & 1 << 29 != 0);
            rig.driver.set(0x70, 15);
            assert_eq!(rig.read(round.into(), 512).data, data);
        }
        let kind = rig.blk.lock().unwrap().engine();
        let expected = match engine {
            EngineChoice::Threads => EngineKind::Threads,
            _ => EngineKind::IoUring,
        };
        assert_eq!(kind, expected);
    }
}
