//! Saved state: there and back, and what is refused.

use offshoot_snapshot_format::Payload;

use super::*;

fn saved() -> BlkState {
    let mut rig = Rig::new(EngineChoice::Threads);
    rig.driver.transport.quiesce().unwrap();
    rig.blk.lock().unwrap().save()
}

fn restore(state: BlkState, volume: TestVolume) -> Result<Blk, String> {
    Blk::restore(state, BlkHost::new(volume.arc())).map_err(|error| {
        let source = std::error::Error::source(&error).unwrap();
        format!("{:?}: {error}: {source}", error.kind())
    })
}

#[test]
fn state_survives_its_encoding() {
    let state = saved();
    let bytes = state.encode().unwrap();
    assert_eq!(BlkState::decode(BlkState::VERSION, &bytes).unwrap(), state);
    for end in 0..bytes.len() {
        assert!(BlkState::decode(BlkState::VERSION, &bytes[..end]).is_err());
    }
    assert!(BlkState::decode(BlkState::VERSION + 1, &bytes).is_err());
}

#[test]
fn a_disk_of_another_size_is_refused_by_both_sizes() {
    let why = restore(saved(), TestVolume::new(SECTORS * 512 + 4096)).unwrap_err();
    assert!(
        why.contains("drive disk0")
            && why.contains("2097152 bytes")
            && why.contains("2101248 bytes"),
        "{why}"
    );
    assert!(why.starts_with("InvalidState"), "{why}");
}

#[test]
fn a_read_only_volume_does_not_serve_a_writable_drive() {
    let mut volume = TestVolume::new(SECTORS * 512);
    volume.read_only = true;
    let why = restore(saved(), volume).unwrap_err();
    assert!(why.contains("open for reading only"), "{why}");

    let mut config = BlkConfig::new("disk0");
    config.read_only = true;
    let state = Rig::with(EngineChoice::Threads, config, ALL)
        .blk
        .lock()
        .unwrap()
        .save();
    let mut volume = TestVolume::new(SECTORS * 512);
    volume.read_only = true;
    assert!(restore(state, volume).is_ok());
}

#[test]
fn hostile_state_is_refused() {
    let changes: [&dyn Fn(&mut BlkState); 17] = [
        &|s| s.id = String::new(),
        &|s| s.id = "a/b".into(),
        &|s| s.id = "x".repeat(1000),
        &|s| s.capacity_sectors = u64::MAX,
        &|s| s.capacity_sectors = 0,
        &|s| s.features |= 1 << 11,
        &|s| s.features |= 1 << 63,
        &|s| s.read_only = true,
        &|s| s.queues = 0,
        &|s| s.queues = u16::MAX,
        &|s| s.queue_size = 0,
        &|s| s.queue_size = 255,
        &|s| s.queue_size = 32768,
        &|s| s.limits.size_max = 0,
        &|s| s.limits.seg_max = u32::MAX,
        &|s| s.limits.max_discard_seg = u32::MAX,
        &|s| s.limits.max_write_zeroes_sectors = u32::MAX,
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut state = saved();
        change(&mut state);
        let why = restore(state, TestVolume::new(SECTORS * 512)).err();
        assert!(
            why.as_ref()
                .is_some_and(|why| why.starts_with("InvalidState")),
            "change {index}: {why:?}"
        );
    }
}

#[test]
fn a_restored_drive_keeps_what_its_driver_knows() {
    let mut state = saved();
    // An older version offered less.
    state.features &= !feature::DISCARD;
    state.limits.seg_max = 100;
    let blk = restore(state.clone(), TestVolume::new(SECTORS * 512)).unwrap();
    assert_eq!(blk.features(), state.features);
    assert_eq!(blk.save(), state);
    let mut seg_max = [0; 4];
    blk.read_config(12, &mut seg_max);
    assert_eq!(u32::from_le_bytes(seg_max), 100);
}

#[test]
fn a_drive_that_needed_a_reset_still_does() {
    let mut rig = Rig::new(EngineChoice::Threads);
    rig.driver.queues[0].set_avail_index(999);
    rig.driver.kick(0);
    rig.wait_needs_reset();
    rig.driver.transport.quiesce().unwrap();
    let transport = rig.driver.transport.save().unwrap();
    let state = rig.blk.lock().unwrap().save();
    assert!(state.needs_reset);
    let blk = Blk::restore(state, BlkHost::new(rig.volume.clone())).unwrap();
    let blk = Arc::new(Mutex::new(blk));
    let queues = std::mem::take(&mut rig.driver.queues);
    let mut driver = Driver::restore(&rig.ram, &transport, blk.clone(), queues).unwrap();
    driver.transport.resume().unwrap();
    assert!(blk.lock().unwrap().needs_reset());
    driver.negotiate(ALL);
    assert!(!blk.lock().unwrap().needs_reset());
}

/// Saves the rig's machine and goes on in a copy of it: same memory, new device and transport.
fn replace(rig: &mut Rig, engine: EngineChoice) {
    rig.driver.transport.quiesce().unwrap();
    let transport = rig.driver.transport.save().unwrap();
    let state = rig.blk.lock().unwrap().save();
    let bytes = state.encode().unwrap();
    let host = BlkHost {
        engine,
        ..BlkHost::new(rig.volume.clone())
    };
    let state = BlkState::decode(BlkState::VERSION, &bytes).unwrap();
    rig.blk = Arc::new(Mutex::new(Blk::restore(state, host).unwrap()));
    let queues = std::mem::take(&mut rig.driver.queues);
    rig.driver = Driver::restore(&rig.ram, &transport, rig.blk.clone(), queues).unwrap();
}

#[test]
fn io_goes_on_in_a_restored_drive() {
    for (before, after) in [
        (EngineChoice::Threads, EngineChoice::IoUring),
        (EngineChoice::IoUring, EngineChoice::Threads),
    ] {
        let mut rig = Rig::new(before);
        let data = pattern(1, 4096);
        assert_eq!(rig.write(0, &data), OK);
        replace(&mut rig, after);

        // Nothing moves before the resume, and nothing is forgotten at it.
        let chain = [
            rig.ram.readable(&header(T_IN, 0)),
            rig.ram.writable(4096),
            rig.status(),
        ];
        rig.driver.queues[0].push(&chain);
        rig.driver.kick(0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(rig.driver.queues[0].pop_used(), None);
        rig.driver.transport.resume().unwrap();
        rig.wait_used();
        assert_eq!(rig.ram.read(&chain[2]), [OK]);
        assert_eq!(rig.ram.read(&chain[1]), data);

        // And again, back and forth.
        for round in 0..10 {
            assert_eq!(rig.write(8 * round, &pattern(round as u8, 4096)), OK);
            replace(&mut rig, if round % 2 == 0 { before } else { after });
            rig.driver.transport.resume().unwrap();
            assert_eq!(rig.read(8 * round, 4096).data, pattern(round as u8, 4096));
        }
    }
}
