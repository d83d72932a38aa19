//! Drivers that break the specification: whatever they do ends in an error status or in
//! `NEEDS_RESET`, and after a reset the drive works again.

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{INDIRECT, NEXT, WRITE};

/// Resets the device and brings it up with new queues.
fn reset(rig: &mut Rig) {
    let accepted = rig.driver.negotiate(ALL);
    rig.driver.queues.clear();
    rig.driver.set_up_queues(&rig.ram, accepted & 1 << 29 != 0);
    rig.driver.set(0x70, 15);
    assert_eq!(rig.driver.get(0x70), 15);
    assert!(!rig.needs_reset());
    assert_eq!(rig.write(1, &pattern(1, 512)), OK);
}

/// The chain that starts at descriptor 0 gets no answer and stops the device.
fn breaks(name: &str, chain: impl Fn(&mut Rig)) {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        rig.driver.take_interrupt();
        chain(&mut rig);
        rig.driver.queues[0].publish(0);
        rig.driver.kick(0);
        rig.wait_needs_reset();
        // 2.1.2: DEVICE_NEEDS_RESET is set and a configuration change is told.
        assert_ne!(rig.driver.get(0x70) & 64, 0, "{name}");
        rig.driver
            .run_until(|driver| driver.take_interrupt() & 2 != 0);
        assert_eq!(rig.driver.queues[0].used_index(), 0, "{name}");
        // What comes now is not looked at.
        rig.driver.queues[0].publish(0);
        rig.driver.kick(0);
        assert_eq!(rig.blk.lock().unwrap().quiesce().unwrap().len(), 1);
        rig.blk.lock().unwrap().resume().unwrap();
        assert_eq!(rig.driver.queues[0].used_index(), 0, "{name}");
        reset(&mut rig);
    }
}

fn set(rig: &mut Rig, index: u16, segment: Segment, flags: u16, next: u16) {
    let flags = flags | if segment.writable { WRITE } else { 0 };
    rig.driver.queues[0].set_descriptor(index, segment.addr, segment.len, flags, next);
}

#[test]
fn a_chain_without_a_status_byte_needs_a_reset() {
    // 5.2.6: the status is a device-writable byte.
    breaks("nothing writable", |rig| {
        let head = rig.ram.readable(&header(T_OUT, 0));
        let data = rig.ram.readable(&pattern(1, 512));
        set(rig, 0, head, NEXT, 1);
        set(rig, 1, data, 0, 0);
    });
    breaks("a status that may only be read", |rig| {
        let head = rig.ram.readable(&header(T_FLUSH, 0));
        let status = rig.ram.readable(&[UNTOUCHED]);
        set(rig, 0, head, NEXT, 1);
        set(rig, 1, status, 0, 0);
    });
    breaks("a status of no bytes", |rig| {
        let head = rig.ram.readable(&header(T_FLUSH, 0));
        set(rig, 0, head, NEXT, 1);
        set(rig, 1, Segment::writable(GuestAddress(0x2000), 0), 0, 0);
    });
}

#[test]
fn readable_bytes_after_writable_ones_need_a_reset() {
    // 2.7.4.2: the driver puts device-writable elements last.
    breaks("the status in the middle", |rig| {
        let head = rig.ram.readable(&header(T_OUT, 0));
        let data = rig.ram.readable(&pattern(1, 512));
        let status = rig.status();
        set(rig, 0, head, NEXT, 1);
        set(rig, 1, status, NEXT, 2);
        set(rig, 2, data, 0, 0);
    });
}

#[test]
fn a_chain_that_does_not_end_needs_a_reset() {
    // 2.7.5.2: no loops in a descriptor chain.
    breaks("a loop", |rig| {
        let head = rig.ram.readable(&header(T_OUT, 0));
        set(rig, 0, head, NEXT, 1);
        set(rig, 1, head, NEXT, 0);
    });
    breaks("a descriptor that is its own next one", |rig| {
        let status = rig.status();
        set(rig, 0, status, NEXT, 0);
    });
    breaks("a next one beyond the table", |rig| {
        let head = rig.ram.readable(&header(T_FLUSH, 0));
        set(rig, 0, head, NEXT, 256);
    });
    breaks("more than 2^32 bytes", |rig| {
        let status = rig.status();
        for index in 0..3 {
            set(
                rig,
                index,
                Segment::readable(GuestAddress(0), u32::MAX / 2 + 1),
                NEXT,
                index + 1,
            );
        }
        set(rig, 3, status, 0, 0);
    });
}

#[test]
fn broken_indirect_tables_need_a_reset() {
    // 2.7.5.3.1.
    breaks("a table that is no table", |rig| {
        let table = rig.ram.alloc(64, 16);
        rig.driver.queues[0].set_descriptor(0, table, 15, INDIRECT, 0);
    });
    breaks("a table outside memory", |rig| {
        rig.driver.queues[0].set_descriptor(0, GuestAddress(1 << 40), 64, INDIRECT, 0);
    });
    breaks("an empty table", |rig| {
        rig.driver.queues[0].set_descriptor(0, GuestAddress(0x1000), 0, INDIRECT, 0);
    });
    breaks("a table in a table", |rig| {
        let inner = rig.ram.alloc(16, 16);
        let outer = rig.ram.alloc(16, 16);
        let memory = rig.ram.memory();
        memory.write_obj(inner.0, outer).unwrap();
        memory.write_obj(16_u32, GuestAddress(outer.0 + 8)).unwrap();
        memory
            .write_obj(INDIRECT, GuestAddress(outer.0 + 12))
            .unwrap();
        rig.driver.queues[0].set_descriptor(0, outer, 16, INDIRECT, 0);
    });
    breaks("a chain longer than the queue", |rig| {
        // 257 entries are one more than the queue has.
        let head = rig.ram.readable(&header(T_OUT, 0));
        let byte = rig.ram.readable(&[1]);
        let mut chain = vec![head];
        chain.extend(std::iter::repeat_n(byte, 255));
        chain.push(rig.status());
        rig.driver.queues[0].push_indirect(&rig.ram, &chain);
    });
}

#[test]
fn a_status_outside_memory_needs_a_reset() {
    for at in [1 << 40, (64 << 20) - 511, u64::MAX - 10, u64::MAX] {
        breaks("a status outside memory", |rig| {
            let head = rig.ram.readable(&header(T_IN, 0));
            set(rig, 0, head, NEXT, 1);
            set(rig, 1, Segment::writable(GuestAddress(at), 513), 0, 0);
        });
    }
}

#[test]
fn an_impossible_available_index_needs_a_reset() {
    // 2.7.13.3.1: the driver never makes more available than the queue holds.
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        rig.driver.queues[0].set_avail_index(257);
        rig.driver.kick(0);
        rig.wait_needs_reset();
        reset(&mut rig);
    }
}

#[test]
fn buffers_outside_memory_fail_their_request_only() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        for at in [1 << 40, (64 << 20) - 511, u64::MAX - 100, u64::MAX] {
            let far = GuestAddress(at);
            for (kind, outside) in [
                (T_IN, Segment::writable(far, 512)),
                (T_OUT, Segment::readable(far, 512)),
            ] {
                let chain = [rig.ram.readable(&header(kind, 0)), outside, rig.status()];
                rig.submit(&chain);
                rig.wait_used();
                assert_eq!(rig.ram.read(&chain[2]), [IOERR]);
            }
            // A header outside memory.
            let chain = [Segment::readable(far, 512), rig.status()];
            rig.submit(&chain);
            rig.wait_used();
            assert_eq!(rig.ram.read(&chain[1]), [IOERR]);
        }
        assert!(!rig.needs_reset());
        assert_eq!(rig.write(0, &pattern(1, 512)), OK);
    }
}

#[test]
fn a_short_header_fails_its_request_only() {
    let mut rig = Rig::new(EngineChoice::Threads);
    for len in [1, 8, 15] {
        let chain = [rig.ram.readable(&header(T_FLUSH, 0)[..len]), rig.status()];
        rig.submit(&chain);
        rig.wait_used();
        assert_eq!(rig.ram.read(&chain[1]), [IOERR]);
    }
    // None at all.
    let status = rig.status();
    rig.submit(&[status]);
    rig.wait_used();
    assert_eq!(rig.ram.read(&status), [IOERR]);
    assert!(!rig.needs_reset());
}

#[test]
fn a_huge_request_is_refused_without_being_worked_on() {
    // The same 60 MiB many times over.
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        for kind in [T_IN, T_OUT, T_FLUSH, T_GET_ID, 99] {
            let mut chain = vec![rig.ram.readable(&header(kind, 0))];
            let big = Segment {
                writable: kind != T_OUT,
                ..Segment::readable(GuestAddress(0), 60 << 20)
            };
            chain.extend(std::iter::repeat_n(big, 60));
            let status = rig.status();
            chain.push(status);
            // Only what it would have to touch counts, so that it must not have been touched.
            let before = rig.ram.read(&Segment::readable(GuestAddress(0), 4096));
            rig.submit(&chain);
            let used = rig.wait_used();
            assert_eq!(rig.ram.read(&status), [IOERR], "type {kind}");
            assert!(used.len <= 1);
            assert_eq!(
                rig.ram.read(&Segment::readable(GuestAddress(0), 4096)),
                before
            );
        }
    }
}

#[test]
fn the_same_chain_twice_is_answered_twice() {
    // A driver may not do that (2.7.13); nothing bad comes of it.
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        let head = rig.ram.readable(&header(T_IN, 0));
        let into = rig.ram.writable(513);
        set(&mut rig, 0, head, NEXT, 1);
        set(&mut rig, 1, into, 0, 0);
        for _ in 0..256 {
            rig.driver.queues[0].publish(0);
        }
        rig.driver.kick(0);
        rig.driver
            .run_until(|driver| driver.queues[0].used_index() == 256);
        assert!(!rig.needs_reset());
    }
}

#[derive(Debug, Clone)]
struct AnyDescriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn any_descriptor() -> impl Strategy<Value = AnyDescriptor> {
    let addr = prop_oneof![
        4 => 0x10_0000_u64..0x20_0000,
        1 => 0_u64..0x1000,
        1 => (4_u64 << 20) - 600..(4 << 20) + 600,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => prop_oneof![Just(0_u32), Just(1), Just(16), Just(512), Just(4096), Just(32)],
        2 => 0_u32..2048,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0_u16..8, 1 => any::<u16>()];
    (addr, len, flags, 0_u16..10).prop_map(|(addr, len, flags, next)| AnyDescriptor {
        addr,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Any table, any heads, any bytes where headers, tables and segments are read from.
    #[test]
    fn any_driver_leaves_a_device_that_can_be_quiesced_and_reset(
        uring in any::<bool>(),
        descriptors in prop::collection::vec(any_descriptor(), 8),
        heads in prop::collection::vec(0_u16..9, 1..8),
        kinds in prop::collection::vec(0_u32..16, 16),
        sectors in prop::collection::vec(prop_oneof![0_u64..40, any::<u64>()], 16),
        jump in prop_oneof![8 => Just(0_u16), 1 => any::<u16>()],
    ) {
        let mut config = BlkConfig::new("disk0");
        config.queue_size = 8;
        let engine = ENGINES[usize::from(uring)];
        let host = BlkHost { engine, ..BlkHost::new(TestVolume::new(32 * 512).arc()) };
        let blk = Arc::new(Mutex::new(Blk::new(config, host).unwrap()));
        let ram = TestRam::new(4 << 20);
        let mut driver = Driver::start(&ram, blk.clone(), ALL);
        let queue = &mut driver.queues[0];
        for (index, (kind, sector)) in kinds.iter().zip(&sectors).enumerate() {
            let at = GuestAddress(0x10_0000 + 0x1000 * index as u64);
            ram.memory().write_slice(&header(*kind, *sector), at).unwrap();
        }
        for (index, d) in descriptors.iter().enumerate() {
            // Half of the addresses hit the headers exactly.
            let addr = if d.flags & 8 == 0 && d.addr < 1 << 22 { d.addr & !0xfff } else { d.addr };
            queue.set_descriptor(index as u16, GuestAddress(addr), d.len, d.flags, d.next);
        }
        for head in heads {
            queue.publish(head);
        }
        queue.set_avail_index(queue.avail_index().wrapping_add(jump));
        driver.kick(0);
        driver.run();
        // Ends, whatever is under way, and then nothing is.
        let states = blk.lock().unwrap().quiesce().unwrap();
        prop_assert_eq!(states.len(), 1);
        blk.lock().unwrap().resume().unwrap();
        driver.negotiate(ALL);
        prop_assert!(!blk.lock().unwrap().needs_reset());
    }
}
