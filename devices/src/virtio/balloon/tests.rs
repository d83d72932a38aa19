use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::{Driver, Segment, TestRam};

const ALL: BalloonConfig = BalloonConfig {
    deflate_on_oom: true,
    statistics: true,
    page_reporting: true,
};
const REPORTING: BalloonConfig = BalloonConfig {
    deflate_on_oom: false,
    statistics: false,
    page_reporting: true,
};
const RAM: usize = 16 << 20;

/// Notes what is given back, and refuses when it is told to.
#[derive(Debug, Clone, Default)]
struct Ledger {
    ranges: Arc<Mutex<Vec<(u64, u64)>>>,
    refuse: bool,
}

impl Ledger {
    /// First page and number of pages of each range since the last call.
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.ranges.lock().unwrap())
    }
}

impl PageReclaim for Ledger {
    fn reclaim(&self, range: GuestRange) -> io::Result<()> {
        if self.refuse {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let range = (range.start.0 / PAGE_SIZE, range.len / PAGE_SIZE);
        self.ranges.lock().unwrap().push(range);
        Ok(())
    }
}

struct Fixture {
    ram: TestRam,
    ledger: Ledger,
    balloon: Arc<Mutex<Balloon>>,
    driver: Driver,
}

fn start(config: BalloonConfig, features: u64) -> Fixture {
    let ram = TestRam::new(RAM);
    let ledger = Ledger::default();
    let balloon = Balloon::new(config, Box::new(ledger.clone())).unwrap();
    let balloon = Arc::new(Mutex::new(balloon));
    let driver = Driver::start(&ram, Arc::clone(&balloon) as _, features);
    Fixture {
        ram,
        ledger,
        balloon,
        driver,
    }
}

impl Fixture {
    fn inflate(&mut self, frames: &[u32]) -> Vec<(u64, u64)> {
        let bytes: Vec<u8> = frames.iter().flat_map(|f| f.to_le_bytes()).collect();
        self.driver.queues[INFLATE].push(&[self.ram.readable(&bytes)]);
        self.driver.kick(0);
        assert_eq!(self.driver.queues[INFLATE].pop_used().unwrap().len, 0);
        self.ledger.take()
    }

    fn send_stats(&mut self, entries: &[(u16, u64)]) {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        self.driver.queues[STATS].push(&[self.ram.readable(&bytes)]);
        self.driver.kick(2);
    }
}

/// 5.5.6.1: pages are numbered in units of 4096 bytes. An array becomes as few ranges as there are
/// runs in it, in whatever order it lists them.
#[test]
fn inflating_gives_merged_ranges_back() {
    let mut f = start(ALL, u64::MAX);
    let shuffled: Vec<u32> = (0..256).map(|i| 512 + (i * 77) % 256).collect();
    assert_eq!(f.inflate(&shuffled), [(512, 256)]);
    assert_eq!(f.inflate(&[9, 3, 4, 9, 5, 11, 10]), [(3, 3), (9, 3)]);
    assert_eq!(f.driver.take_interrupt(), 1);
}

/// Page numbers outside guest RAM are ignored, also in the middle of a run across its end.
#[test]
fn frames_outside_ram_are_ignored() {
    let mut f = start(ALL, u64::MAX);
    let end = (RAM as u64 / PAGE_SIZE) as u32;
    assert_eq!(
        f.inflate(&[u32::MAX, end - 1, end, end + 1, u32::MAX - 1]),
        [(u64::from(end) - 1, 1)]
    );
    assert_eq!(f.inflate(&[u32::MAX]), []);
}

#[test]
fn an_array_may_be_cut_anywhere_and_is_bounded() {
    let mut f = start(ALL, u64::MAX);
    let bytes: Vec<u8> = [7_u32, 8].iter().flat_map(|f| f.to_le_bytes()).collect();
    let parts = [
        f.ram.readable(&bytes[..3]),
        f.ram.readable(&bytes[3..]),
        f.ram.readable(b"cut"),
    ];
    f.driver.queues[INFLATE].push(&parts);
    f.driver.kick(0);
    assert_eq!(f.ledger.take(), [(7, 2)]);

    let many: Vec<u32> = (0..MAX_FRAMES as u32 + 9).collect();
    f.driver.queues[INFLATE].pop_used();
    assert_eq!(f.inflate(&many), [(0, MAX_FRAMES as u64)]);
}

/// A host that cannot take a page does not stop the guest.
#[test]
fn reclaim_errors_do_not_reach_the_guest() {
    let ram = TestRam::new(RAM);
    let ledger = Ledger {
        refuse: true,
        ..Ledger::default()
    };
    let balloon = Balloon::new(ALL, Box::new(ledger)).unwrap();
    let mut driver = Driver::start(&ram, Arc::new(Mutex::new(balloon)), u64::MAX);
    driver.queues[INFLATE].push(&[ram.readable(&5_u32.to_le_bytes())]);
    driver.kick(0);
    assert!(driver.queues[INFLATE].pop_used().is_some());
    assert_eq!(driver.get(0x70), 15);
}

#[test]
fn deflating_is_acknowledged() {
    let mut f = start(ALL, u64::MAX);
    f.driver.queues[DEFLATE].push(&[f.ram.readable(&[1, 0, 0, 0])]);
    f.driver.kick(1);
    assert_eq!(f.driver.queues[DEFLATE].pop_used().unwrap().len, 0);
    assert_eq!(f.ledger.take(), []);
}

/// 5.5.6.7: reported pages are given back, inward to whole pages.
#[test]
fn reported_pages_are_given_back() {
    // The specification's number, Linux's without gaps, and Linux's without statistics.
    for (config, queue) in [(ALL, 4), (ALL, 3), (REPORTING, 2), (REPORTING, 4)] {
        let mut f = start(config, u64::MAX);
        let buffers = [
            Segment::writable(GuestAddress(0x20_0000), 2 << 20),
            Segment::writable(GuestAddress(0x60_0800), 0x2000),
            Segment::writable(GuestAddress(0x70_0000), 0xfff),
            Segment::writable(GuestAddress(RAM as u64 - PAGE_SIZE), 1 << 30),
            Segment::writable(GuestAddress(u64::MAX - 5), 0x2000),
        ];
        f.driver.queues[queue].push(&buffers);
        f.driver.kick(queue as u32);
        assert_eq!(
            f.ledger.take(),
            [(0x200, 512), (0x601, 1), (RAM as u64 / PAGE_SIZE - 1, 1)],
            "queue {queue}"
        );
        assert_eq!(f.driver.queues[queue].pop_used().unwrap().len, 0);
    }
}

/// 2.2.1: what was not agreed on does not happen.
#[test]
fn reports_need_their_feature() {
    let mut f = start(ALL, STATS_VQ);
    f.driver.queues[4].push(&[Segment::writable(GuestAddress(0x20_0000), 2 << 20)]);
    f.driver.kick(4);
    assert_eq!(f.ledger.take(), []);
    assert_eq!(f.driver.queues[4].used_index(), 0);
}

#[test]
fn queues_are_as_many_as_the_features_need() {
    let queues = |config| {
        let balloon = Balloon::new(config, Box::new(Ledger::default())).unwrap();
        (balloon.features(), balloon.queue_max_sizes().len())
    };
    assert_eq!(queues(BalloonConfig::default()), (0, 2));
    let statistics = BalloonConfig {
        statistics: true,
        ..BalloonConfig::default()
    };
    assert_eq!(queues(statistics), (STATS_VQ, 3));
    assert_eq!(queues(ALL), (STATS_VQ | DEFLATE_ON_OOM | PAGE_REPORTING, 5));
}

/// 5.5.6: a new target is a change of the configuration.
#[test]
fn targets_reach_the_guest_and_actual_comes_back() {
    let mut f = start(ALL, u64::MAX);
    f.balloon.lock().unwrap().set_target(Pages(0x0102)).unwrap();
    assert_eq!(f.driver.take_interrupt(), 2);
    assert_eq!(f.driver.config(0, 10), [2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    f.driver.set(0x104, 0x55);
    assert_eq!(f.balloon.lock().unwrap().actual(), Pages(0x55));
    // num_pages is the host's.
    f.driver.set(0x100, 9);
    assert_eq!(f.balloon.lock().unwrap().target(), Pages(0x0102));
    assert_eq!(f.driver.config(4, 4), [0x55, 0, 0, 0]);
}

/// 5.5.6.4: the device keeps the buffer until it wants new figures, then gives it back.
#[test]
fn stats() {
    let mut f = start(ALL, u64::MAX);
    assert!(!f.balloon.lock().unwrap().request_stats(), "no buffer yet");
    f.send_stats(&[(4, 4096), (5, 1 << 30), (77, 1), (6, 2 << 20)]);
    let stats = f.balloon.lock().unwrap().stats().unwrap();
    assert_eq!(
        (stats.free, stats.total, stats.available, stats.swap_in),
        (Some(4096), Some(1 << 30), Some(2 << 20), None)
    );
    assert_eq!(f.driver.queues[STATS].used_index(), 0, "kept");
    f.driver.take_interrupt();

    assert!(f.balloon.lock().unwrap().request_stats());
    assert_eq!(f.driver.take_interrupt(), 1);
    assert_eq!(f.driver.queues[STATS].pop_used().unwrap().len, 0);
    assert!(
        !f.balloon.lock().unwrap().request_stats(),
        "not answered yet"
    );

    let old = f.driver.queues[STATS].avail_index();
    f.send_stats(&[(0, 1), (1, 2), (2, 3), (3, 4), (7, 5), (8, 6), (9, 7)]);
    assert!(
        f.driver.queues[STATS].should_notify(old),
        "the device wants to know"
    );
    let stats = f.balloon.lock().unwrap().stats().unwrap();
    assert_eq!((stats.free, stats.hugetlb_failures), (None, Some(7)));
}

/// A buffer of figures that waits in its ring is in the copy's ring, too.
#[test]
fn saved_and_restored() {
    let mut f = start(ALL, u64::MAX);
    f.balloon.lock().unwrap().set_target(Pages(77)).unwrap();
    f.driver.set(0x104, 66);
    f.send_stats(&[(4, 4096)]);
    f.driver.transport.quiesce().unwrap();
    assert!(!f.balloon.lock().unwrap().request_stats(), "quiesced");
    f.driver.queues[INFLATE].push(&[f.ram.readable(&5_u32.to_le_bytes())]);
    f.driver.kick(0);
    assert_eq!(f.ledger.take(), []);
    let transport = f.driver.transport.save().unwrap();
    let state = f.balloon.lock().unwrap().save();
    assert_eq!(
        BalloonState::decode(1, &state.encode().unwrap()).unwrap(),
        state
    );

    let balloon = Balloon::restore(&state, Box::new(f.ledger.clone())).unwrap();
    assert_eq!(balloon.save(), state);
    let balloon = Arc::new(Mutex::new(balloon));
    let queues = std::mem::take(&mut f.driver.queues);
    let mut copy = Driver::restore(&f.ram, &transport, Arc::clone(&balloon) as _, queues).unwrap();
    assert_eq!(copy.transport.save().unwrap(), transport);
    assert_eq!(copy.config(0, 8), [77, 0, 0, 0, 66, 0, 0, 0]);
    copy.transport.resume().unwrap();
    assert_eq!(f.ledger.take(), [(5, 1)]);
    assert_eq!(balloon.lock().unwrap().stats().unwrap().free, Some(4096));
    assert!(balloon.lock().unwrap().request_stats());
    assert!(copy.queues[STATS].pop_used().is_some());
}

/// State of other features than the driver agreed on is the transport's to refuse.
#[test]
fn state_with_fewer_features_is_refused() {
    let mut f = start(ALL, u64::MAX);
    f.driver.transport.quiesce().unwrap();
    let transport = f.driver.transport.save().unwrap();
    let mut state = f.balloon.lock().unwrap().save();
    state.config.statistics = false;
    let balloon = Balloon::restore(&state, Box::new(Ledger::default())).unwrap();
    let copy = Driver::restore(
        &f.ram,
        &transport,
        Arc::new(Mutex::new(balloon)),
        Vec::new(),
    );
    assert_eq!(copy.unwrap_err().kind(), crate::ErrorKind::InvalidState);
}

proptest! {
    /// Whatever is listed, what is given back is page-aligned RAM, listed, and given back once.
    #[test]
    fn only_listed_ram_is_given_back(
        mut frames in prop::collection::vec(prop_oneof![0_u32..5000, any::<u32>()], 0..300)
    ) {
        let memory = crate::GuestRam::from_ranges(&[
            (GuestAddress(0), 0x40_0000),
            (GuestAddress(0x80_0000), 0x20_0000),
        ]).unwrap();
        let is_ram = |f: u32| f < 0x400 || (0x800..0xa00).contains(&f);
        let mut expected: Vec<u32> = frames.iter().copied().filter(|f| is_ram(*f)).collect();
        expected.sort_unstable();
        expected.dedup();
        let mut given = Vec::new();
        pages::of_frames(&memory, &mut frames, |range| {
            let first = (range.start.0 / PAGE_SIZE) as u32;
            given.extend(first..first + (range.len / PAGE_SIZE) as u32);
        });
        prop_assert_eq!(given, expected);
    }

    /// Any bytes as a request on any queue: the device goes on or needs a reset.
    #[test]
    fn arbitrary_requests(
        requests in prop::collection::vec(
            (0_usize..5, prop::collection::vec(any::<u8>(), 1..700), any::<bool>()), 1..20)
    ) {
        let mut f = start(ALL, u64::MAX);
        for (queue, bytes, writable) in requests {
            let mut segment = f.ram.readable(&bytes);
            segment.writable = writable;
            f.driver.queues[queue].push(&[segment]);
            f.driver.kick(queue as u32);
            f.balloon.lock().unwrap().request_stats();
        }
        prop_assert_eq!(f.driver.get(0x70), 15);
    }
}
