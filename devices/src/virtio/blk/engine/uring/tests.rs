//! What a request through the transport does not reach.

use std::time::{Duration, Instant};

use offshoot_storage::{VolumeName, copy};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::blk::spans::Spans;

fn uring(memory: &Arc<GuestRam>, slots: usize) -> (tempfile::TempDir, Arc<dyn Volume>, Uring) {
    let dir = tempfile::tempdir().unwrap();
    let store = copy::open(dir.path()).unwrap();
    let volume = store
        .create(&VolumeName::new("v").unwrap(), 1 << 20)
        .unwrap();
    let ring = Ring::open(volume.raw_file().unwrap(), slots).unwrap();
    let engine = Uring::new(ring, Arc::clone(&volume), Arc::clone(memory), slots).unwrap();
    (dir, volume, engine)
}

fn memory() -> Arc<GuestRam> {
    // Two regions that touch, so that a piece may lie in both.
    let half = 1 << 20;
    let ranges = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
    Arc::new(GuestRam::from_ranges(&ranges).unwrap())
}

/// Every third stretch of 16 bytes from `start` on.
fn scattered(memory: &GuestRam, start: u64, pieces: u64) -> Spans {
    let mut spans = Spans::default();
    for piece in 0..pieces {
        assert!(spans.push(memory, GuestAddress(start + 48 * piece), 16));
    }
    spans
}

fn run(engine: &mut Uring, slot: usize, op: Op) -> io::Result<()> {
    engine.start(slot, Arc::new(op), false);
    let limit = Instant::now() + Duration::from_secs(10);
    let mut done = Vec::new();
    while done.is_empty() {
        assert!(Instant::now() < limit, "the engine did not get done");
        engine.submit();
        engine.reap(&mut done);
    }
    let only = done.pop().unwrap();
    assert!(done.is_empty());
    assert_eq!(only.slot, slot);
    only.result
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once_are_moved_in_turns() {
    let memory = memory();
    let (_dir, volume, mut engine) = uring(&memory, 4);
    let bytes: Vec<u8> = (0..2_000_000_u32)
        .map(|i| i.to_le_bytes()[i as usize % 3])
        .collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    // 2500 pieces over the border between the regions.
    let from = scattered(&memory, (1 << 20) - 60_000, 2500);
    let mut expected = vec![0; 40_000];
    crate::virtio::blk::spans::Cursor::new(&from)
        .read(&memory, &mut expected)
        .unwrap();
    let op = Op::Write {
        offset: 1024,
        data: from,
    };
    run(&mut engine, 1, op).unwrap();
    let mut written = vec![0; 40_000];
    volume
        .read_vectored_at(&mut [io::IoSliceMut::new(&mut written)], 1024)
        .unwrap();
    assert!(written == expected);

    let into = scattered(&memory, 8, 2500);
    let op = Op::Read {
        offset: 1024,
        data: into.clone(),
    };
    run(&mut engine, 2, op).unwrap();
    let mut read = vec![0; 40_000];
    crate::virtio::blk::spans::Cursor::new(&into)
        .read(&memory, &mut read)
        .unwrap();
    assert!(read == expected);
    // What lies between the pieces was not touched.
    let mut between = [0; 32];
    memory.read_slice(&mut between, GuestAddress(24)).unwrap();
    assert_eq!(between, bytes[24..56]);
}

#[test]
fn a_ring_that_takes_nothing_any_more_fails_everything() {
    let memory = memory();
    let (_dir, _volume, mut engine) = uring(&memory, 4);
    let read = || Op::Read {
        offset: 0,
        data: scattered(&memory, 0, 32),
    };
    run(&mut engine, 0, read()).unwrap();
    engine.start(1, Arc::new(read()), false);
    engine.start(2, Arc::new(Op::Flush), false);
    engine.ring.give_up(libc::EPERM);
    let mut done = Vec::new();
    engine.reap(&mut done);
    assert_eq!(done.len(), 1);
    let error = done.pop().unwrap().result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    // The flush is the volume's, which is well.
    while done.is_empty() {
        engine.submit();
        engine.reap(&mut done);
    }
    assert!(done.pop().unwrap().result.is_ok());
    for slot in 0..4 {
        let error = run(&mut engine, slot, read()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}

#[test]
fn dropping_an_engine_waits_for_the_kernel() {
    let memory = memory();
    for _ in 0..50 {
        let (_dir, _volume, mut engine) = uring(&memory, 16);
        for slot in 0..16 {
            let op = Op::Write {
                offset: slot as u64 * 40_000,
                data: scattered(&memory, 0, 2500),
            };
            engine.start(slot, Arc::new(op), false);
        }
        engine.submit();
        drop(engine);
        // Nobody else has the memory: the kernel is done with it.
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
