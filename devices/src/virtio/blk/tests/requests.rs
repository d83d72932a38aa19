//! What a well-behaved driver asks for (virtio 1.2, 5.2.6).

use super::*;

#[test]
fn writes_are_read_back_and_reach_the_file() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        let data = pattern(1, 8192);
        assert_eq!(rig.write(17, &data), OK);
        let answer = rig.read(17, 8192);
        assert_eq!(answer.status, OK);
        assert_eq!(answer.data, data);
        assert_eq!(answer.used, 8193);
        assert_eq!(rig.volume.content()[17 * 512..][..8192], data);
    }
}

#[test]
fn a_request_larger_than_any_bounce_buffer_is_whole() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        let data = pattern(2, 1 << 20);
        assert_eq!(rig.write(8, &data), OK);
        assert!(rig.read(8, 1 << 20).data == data);
    }
}

#[test]
fn get_id_answers_twenty_bytes_without_a_terminator() {
    // 5.2.6: the id is padded with zeros and has no terminator when it is 20 bytes long.
    for engine in ENGINES {
        let mut config = BlkConfig::new("disk0");
        config.serial = *b"exactly-twenty-bytes";
        let mut rig = Rig::with(engine, config, ALL);
        let answer = rig.ask(T_GET_ID, 0, &[], 20);
        assert_eq!((answer.status, answer.used), (OK, 21));
        assert_eq!(answer.data, b"exactly-twenty-bytes");
        // What the used length covers was written.
        let answer = rig.ask(T_GET_ID, 0, &[], 24);
        assert_eq!(answer.data, b"exactly-twenty-bytes\0\0\0\0");
        // A cut serial would name another disk.
        assert_eq!(rig.ask(T_GET_ID, 0, &[], 19).status, IOERR);
    }
    assert_eq!(&BlkConfig::new("root").serial[..5], b"root\0");
}

#[test]
fn a_flush_reaches_the_volume() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        rig.write(0, &pattern(3, 512));
        assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, OK);
        // A new volume is durable only once its backend has flushed it, whatever the engine.
        assert_eq!(rig.volume.flushes.load(Ordering::SeqCst), 1);
        for _ in 0..3 {
            assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, OK);
        }
    }
}

#[test]
fn without_the_flush_feature_every_change_is_durable_when_it_is_done() {
    // 5.2.6.2: writes are stable when completed if FLUSH was offered and not accepted.
    let mut rig = Rig::with(
        EngineChoice::Threads,
        BlkConfig::new("disk0"),
        ALL & !feature::FLUSH,
    );
    rig.write(0, &pattern(3, 512));
    rig.write(1, &pattern(4, 512));
    assert_eq!(rig.read(0, 512).status, OK);
    assert_eq!(rig.volume.flushes.load(Ordering::SeqCst), 2);
    rig.ask(T_WRITE_ZEROES, 0, &segment(0, 1, 0), 0);
    assert_eq!(rig.volume.flushes.load(Ordering::SeqCst), 3);

    let mut rig = Rig::with(
        EngineChoice::IoUring,
        BlkConfig::new("disk0"),
        ALL & !feature::FLUSH,
    );
    for sector in 0..4 {
        assert_eq!(rig.write(sector, &pattern(5, 512)), OK);
    }
    // The first by the volume, the others by the kernel.
    assert_eq!(rig.volume.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(rig.volume.content()[..512], pattern(5, 512));
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes() {
    for engine in ENGINES {
        for (kind, flags) in [(T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, 1)] {
            let mut rig = Rig::new(engine);
            let data = pattern(9, 64 * 512);
            rig.write(0, &data);
            let two = [segment(8, 8, flags), segment(32, 16, flags)].concat();
            assert_eq!(rig.ask(kind, 0, &two, 0).status, OK);
            let mut expected = data;
            expected[8 * 512..16 * 512].fill(0);
            expected[32 * 512..48 * 512].fill(0);
            assert!(rig.read(0, 64 * 512).data == expected);
        }
    }
}

#[test]
fn bad_flags_of_discards_and_zeroes_are_unsupported() {
    // 5.2.6.2: UNSUPP for an unknown flag, and for unmap in a discard.
    let mut rig = Rig::new(EngineChoice::Threads);
    let data = pattern(1, 4096);
    rig.write(0, &data);
    for (kind, flags) in [
        (T_DISCARD, 1),
        (T_DISCARD, 2),
        (T_WRITE_ZEROES, 2),
        (T_WRITE_ZEROES, 0x8000_0001),
    ] {
        assert_eq!(rig.ask(kind, 0, &segment(0, 8, flags), 0).status, UNSUPP);
    }
    assert_eq!(rig.read(0, 4096).data, data);
}

#[test]
fn bad_segments_change_nothing() {
    let mut rig = Rig::new(EngineChoice::Threads);
    let data = pattern(1, 4096);
    rig.write(0, &data);
    let good = segment(0, 8, 0);
    let limits = BlkLimits::for_queue_size(256);
    for (kind, bad) in [
        // Beyond the capacity, also by overflow.
        (T_DISCARD, segment(SECTORS, 1, 0)),
        (T_DISCARD, segment(SECTORS - 1, 2, 0)),
        (T_DISCARD, segment(u64::MAX, 1, 0)),
        (T_WRITE_ZEROES, segment(u64::MAX - 3, 8, 0)),
        // More than the configuration space allows.
        (T_DISCARD, segment(0, limits.max_discard_sectors + 1, 0)),
        (T_WRITE_ZEROES, segment(0, u32::MAX, 0)),
        (T_DISCARD, segment(0, 1, 0).repeat(17)),
        (T_WRITE_ZEROES, segment(0, 1, 0).repeat(5)),
        // Not whole segments, or none.
        (T_DISCARD, vec![0; 15]),
        (T_DISCARD, vec![]),
    ] {
        let after_a_good_one = [good.clone(), bad.clone()].concat();
        assert_eq!(rig.ask(kind, 0, &bad, 0).status, IOERR, "{kind} {bad:?}");
        if !bad.is_empty() {
            assert_eq!(rig.ask(kind, 0, &after_a_good_one, 0).status, IOERR);
        }
    }
    assert_eq!(rig.read(0, 4096).data, data);
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    // 5.2.6.1: DISCARD and WRITE_ZEROES need their features.
    let mut rig = Rig::with(EngineChoice::Threads, BlkConfig::new("d"), feature::FLUSH);
    assert_eq!(rig.ask(T_DISCARD, 0, &segment(0, 8, 0), 0).status, UNSUPP);
    let zeroes = rig.ask(T_WRITE_ZEROES, 0, &segment(0, 8, 0), 0);
    assert_eq!(zeroes.status, UNSUPP);
}

#[test]
fn other_request_types_are_unsupported() {
    // 5.2.6.2: UNSUPP for a request that the device does not know.
    let mut rig = Rig::new(EngineChoice::Threads);
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 0x8000_0000, u32::MAX] {
        let answer = rig.ask(kind, 0, &pattern(0, 512), 512);
        assert_eq!((answer.status, answer.used), (UNSUPP, 513), "type {kind}");
        assert_eq!(answer.data, [0; 512], "2.7.8.2: written as reported");
    }
    assert_eq!(rig.ask(77, 0, &[], 0).status, UNSUPP);
}

#[test]
fn ranges_outside_the_disk_are_refused() {
    // 5.2.6.2: IOERR for a request beyond the capacity.
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        for sector in [
            SECTORS,
            SECTORS - 1,
            u64::MAX,
            u64::MAX - 1,
            u64::MAX / 512,
            u64::MAX / 512 + 1,
            1 << 55,
        ] {
            assert_eq!(rig.write(sector, &pattern(1, 1024)), IOERR, "{sector}");
            let answer = rig.read(sector, 1024);
            assert_eq!((answer.status, answer.used), (IOERR, 1025), "{sector}");
        }
        assert_eq!(rig.write(SECTORS - 2, &pattern(1, 1024)), OK);
        assert!(
            rig.volume.content()[..(SECTORS as usize - 2) * 512]
                == vec![0; (SECTORS as usize - 2) * 512]
        );
    }
}

#[test]
fn lengths_that_are_no_sectors_are_refused() {
    // 5.2.6.1: the data of IN and OUT is a multiple of 512 bytes.
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        for len in [1, 511, 513, 4095] {
            assert_eq!(rig.write(0, &pattern(1, len)), IOERR);
            assert_eq!(rig.read(0, len as u32).status, IOERR);
        }
        // None at all is a multiple.
        assert_eq!(rig.write(0, &[]), OK);
        assert_eq!(rig.read(SECTORS, 0).status, OK);
        assert_eq!(rig.read(SECTORS + 1, 0).status, IOERR);
        assert_eq!(rig.read(0, 512).data, [0; 512]);
    }
}

#[test]
fn a_read_only_drive_answers_writes_with_ioerr() {
    // 5.2.6.2: with RO offered a write is IOERR and nothing is written.
    for engine in ENGINES {
        let mut config = BlkConfig::new("disk0");
        config.read_only = true;
        let mut rig = Rig::with(engine, config, ALL);
        let offered = rig.blk.lock().unwrap().features();
        assert_ne!(offered & feature::RO, 0);
        assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES), 0);
        assert_eq!(rig.write(0, &pattern(1, 512)), IOERR);
        assert_eq!(rig.ask(T_DISCARD, 0, &segment(0, 8, 0), 0).status, IOERR);
        let zeroes = rig.ask(T_WRITE_ZEROES, 0, &segment(0, 8, 0), 0);
        assert_eq!(zeroes.status, IOERR);
        assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, OK);
        assert_eq!(rig.read(0, 512).data, [0; 512]);
        assert!(rig.volume.content().iter().all(|byte| *byte == 0));
    }
}

/// Cuts a segment into pieces of `at` bytes.
fn cut(segment: Segment, at: u32) -> Vec<Segment> {
    (0..segment.len)
        .step_by(at as usize)
        .map(|offset| Segment {
            addr: GuestAddress(segment.addr.0 + u64::from(offset)),
            len: at.min(segment.len - offset),
            ..segment
        })
        .collect()
}

#[test]
fn the_layout_of_descriptors_means_nothing() {
    // 2.7.4: a device makes no assumption about it.
    for engine in ENGINES {
        for indirect in [false, true] {
            let mut rig = Rig::new(engine);
            let data = pattern(7, 1024);
            for (header_cut, data_cut) in [(1, 1024), (16, 100), (5, 37), (3, 512)] {
                // Header and data of a write, cut anywhere, with an empty piece between.
                let mut chain = cut(rig.ram.readable(&header(T_OUT, 3)), header_cut);
                chain.push(Segment::readable(GuestAddress(0x1000), 0));
                chain.extend(cut(rig.ram.readable(&data), data_cut));
                let status = rig.status();
                chain.push(status);
                send(&mut rig, &chain, indirect);
                assert_eq!(rig.wait_used().len, 1);
                assert_eq!(rig.ram.read(&status), [OK]);

                // Header and data of a write in one piece.
                let both = [&header(T_OUT, 3)[..], &data].concat();
                let chain = [rig.ram.readable(&both), rig.status()];
                send(&mut rig, &chain, indirect);
                rig.wait_used();
                assert_eq!(rig.ram.read(&chain[1]), [OK]);

                // Data and status of a read in one buffer, cut anywhere.
                let into = rig.ram.writable(1025);
                let mut chain = vec![rig.ram.readable(&header(T_IN, 3))];
                chain.extend(cut(into, data_cut));
                send(&mut rig, &chain, indirect);
                assert_eq!(rig.wait_used().len, 1025);
                let bytes = rig.ram.read(&into);
                assert_eq!(bytes[..1024], data);
                assert_eq!(bytes[1024], OK);
            }
        }
    }
}

fn send(rig: &mut Rig, chain: &[Segment], indirect: bool) {
    if indirect {
        rig.driver.queues[0].push_indirect(&rig.ram, chain);
    } else {
        rig.driver.queues[0].push(chain);
    }
    rig.driver.kick(0);
}

#[test]
fn surplus_bytes_are_zeroed_or_ignored() {
    // 2.7.8.2: the device has written what it reports as written.
    let mut rig = Rig::new(EngineChoice::Threads);
    let into = rig.ram.writable(100);
    rig.ram.memory().write_slice(&[7; 100], into.addr).unwrap();
    let (head, data, status) = (
        rig.ram.readable(&header(T_OUT, 0)),
        rig.ram.readable(&pattern(1, 512)),
        rig.status(),
    );
    let answer = rig.ask_chain(&[head, data, into, status], &into, 100, &status);
    assert_eq!((answer.status, answer.used), (OK, 101));
    assert_eq!(answer.data, [0; 100]);
    // A flush may bring data (5.2.6.1 only says SHOULD NOT), and a sector.
    assert_eq!(rig.ask(T_FLUSH, 99, &[1; 64], 0).status, OK);
    let answer = rig.ask(T_IN, 0, &[1; 64], 512);
    assert_eq!((answer.status, answer.data), (OK, pattern(1, 512)));
}

#[test]
fn the_configuration_space_is_as_the_specification_lays_it_out() {
    // 5.2.4.
    let mut config = BlkConfig::new("disk0");
    config.queues = 3;
    let rig = Rig::with(EngineChoice::Threads, config, ALL);
    let word = |at| u32::from_le_bytes(rig.driver.config(at, 4).try_into().unwrap());
    let half = |at| u16::from_le_bytes(rig.driver.config(at, 2).try_into().unwrap());
    assert_eq!(rig.driver.config(0, 8), SECTORS.to_le_bytes());
    assert_eq!(word(8), 128 << 10, "size_max");
    assert_eq!(word(12), 254, "seg_max");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(rig.driver.config(24, 2), [3, 0], "topology");
    assert_eq!(half(34), 3, "num_queues");
    assert_eq!(word(36), 1 << 21, "max_discard_sectors");
    assert_eq!(word(40), 16, "max_discard_seg");
    assert_eq!(word(44), 8, "discard_sector_alignment");
    assert_eq!(word(48), 1 << 17, "max_write_zeroes_sectors");
    assert_eq!(word(52), 4, "max_write_zeroes_seg");
    assert_eq!(rig.driver.config(56, 1), [1], "write_zeroes_may_unmap");
    assert_eq!(rig.driver.config(60, 100), [0; 100]);
    let blk = rig.blk.lock().unwrap();
    let mut none = [1; 4];
    blk.read_config(u64::MAX, &mut none);
    assert_eq!(none, [0; 4]);
}

#[test]
fn the_driver_is_told_once_when_it_asked_for_that() {
    // 2.7.7: with EVENT_IDX an interrupt is sent when used_event is passed, and not else.
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        rig.driver.raised();
        rig.driver.queues[0].set_used_event(7);
        for sector in 0..8 {
            let chain = [
                rig.ram.readable(&header(T_OUT, sector)),
                rig.ram.readable(&pattern(1, 512)),
                rig.status(),
            ];
            rig.submit(&chain);
            if sector == 3 {
                let half = |driver: &mut Driver| driver.queues[0].used_index() == 4;
                rig.driver.run_until(half);
                assert_eq!(rig.driver.raised(), 0, "{engine:?}");
            }
        }
        let mut raised = 0;
        rig.driver.run_until(|driver| {
            raised += driver.raised();
            raised > 0
        });
        assert_eq!(raised, 1);
        assert_eq!(rig.driver.queues[0].used_index(), 8);
        assert_eq!(rig.driver.take_interrupt(), 1);
    }
}

#[test]
fn without_event_idx_every_batch_is_told() {
    for engine in ENGINES {
        let mut rig = Rig::with(engine, BlkConfig::new("d"), ALL & !(1 << 29));
        rig.driver.raised();
        for sector in 0..20 {
            assert_eq!(rig.write(sector, &pattern(1, 512)), OK);
            rig.driver.run_until(|driver| driver.raised() > 0);
        }
    }
}

#[test]
fn every_queue_is_served() {
    // 5.2.3 VIRTIO_BLK_F_MQ.
    for engine in ENGINES {
        let mut config = BlkConfig::new("disk0");
        (config.queues, config.queue_size) = (4, 16);
        let mut rig = Rig::with(engine, config, ALL);
        assert_ne!(rig.blk.lock().unwrap().features() & feature::MQ, 0);
        for index in 0..4 {
            let data = pattern(index as u8, 512);
            let chain = [
                rig.ram.readable(&header(T_OUT, index as u64)),
                rig.ram.readable(&data),
                rig.status(),
            ];
            rig.driver.queues[index].push(&chain);
            rig.driver.kick(index as u32);
            rig.driver
                .run_until(|driver| driver.queues[index].pop_used().is_some());
            assert_eq!(rig.ram.read(&chain[2]), [OK]);
            assert_eq!(rig.volume.content()[index * 512..][..512], data);
        }
    }
}

#[test]
fn a_full_queue_of_requests_is_served() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        let into: Vec<_> = (0..256)
            .map(|sector| {
                let chain = [
                    rig.ram.readable(&header(T_OUT, sector)),
                    rig.ram.readable(&pattern(sector as u8, 512)),
                    rig.status(),
                ];
                // A queue of 256 takes as many indirect chains.
                rig.driver.queues[0].push_indirect(&rig.ram, &chain);
                chain[2]
            })
            .collect();
        rig.driver.kick(0);
        for _ in 0..256 {
            rig.wait_used();
        }
        for status in into {
            assert_eq!(rig.ram.read(&status), [OK]);
        }
        let content = rig.volume.content();
        for sector in 0..256 {
            assert_eq!(content[sector * 512..][..512], pattern(sector as u8, 512));
        }
    }
}
