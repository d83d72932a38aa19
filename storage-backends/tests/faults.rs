//! The fault-injecting storage: faithful while nothing is to fail, and failing as told.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::faults::{Fault, Faults, Operation};
use offshoot_storage::{
    Access, Durability, ErrorKind, LayerName, StorageBackend, Volume, VolumeName, copy,
};

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

fn layer(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

fn write(vol: &dyn Volume, offset: u64, bytes: &[u8]) -> io::Result<()> {
    vol.write_vectored_at(&[IoSlice::new(bytes)], offset)
}

fn read(vol: &dyn Volume, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    vol.read_vectored_at(&mut [IoSliceMut::new(&mut bytes)], offset)
        .unwrap();
    bytes
}

/// A store in `dir` with the faults in front of it.
fn faulty(dir: &tempfile::TempDir) -> (Faults, Arc<dyn StorageBackend>) {
    let faults = Faults::new();
    let store = faults.wrap(copy::open(dir.path()).unwrap());
    (faults, store)
}

#[test]
fn conforms_while_nothing_fails() {
    for hold_back in [false, true] {
        let dir = dir();
        let faults = Faults::new();
        if hold_back {
            faults.hold_writes_back();
        }
        let mut options = Options::default();
        options.operations = 1500;
        let open = |path: &std::path::Path| Ok(faults.wrap(copy::open(path)?));
        let report = conformance::run(&open, dir.path(), &options);
        assert!(report.passed(), "hold_back {hold_back}\n{report}");
    }
}

#[test]
fn the_planned_operation_fails_and_no_other() {
    let dir = dir();
    let (faults, store) = faulty(&dir);
    let vol = store.create(&volume("v"), 1 << 20).unwrap();
    faults.fail(Operation::Write, 2, Fault::StorageFull);
    faults.fail(Operation::Flush, 0, Fault::Io);
    write(&*vol, 0, &[1; 1000]).unwrap();
    write(&*vol, 0, &[2; 1000]).unwrap();
    let error = write(&*vol, 0, &[3; 1000]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    // Each byte old or new.
    assert_eq!(read(&*vol, 0, 1000), [[3; 500], [2; 500]].concat());
    write(&*vol, 0, &[4; 1000]).unwrap();
    assert_eq!(vol.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
    vol.flush().unwrap();
    assert_eq!(faults.count(Operation::Write), 4);

    faults.fail(Operation::Freeze, 0, Fault::StorageFull);
    let freeze = || store.freeze(vol.name(), &layer("l"), Durability::Now);
    assert_eq!(freeze().unwrap_err().kind(), ErrorKind::StorageFull);
    assert!(store.layers().unwrap().is_empty());
    freeze().unwrap();
}

#[test]
fn a_power_cut_loses_only_what_was_not_flushed() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..20 {
        let dir = dir();
        let (faults, store) = faulty(&dir);
        faults.hold_writes_back();
        let vol = store.create(&volume("v"), 64 << 10).unwrap();
        write(&*vol, 0, &[1; 32 << 10]).unwrap();
        vol.flush().unwrap();
        write(&*vol, 10_000, &[2; 20_000]).unwrap();
        assert_eq!(read(&*vol, 10_000, 20_000), [2; 20_000]);
        store
            .freeze(vol.name(), &layer("synced"), Durability::Deferred)
            .unwrap();
        store.sync_layer(&layer("synced")).unwrap();
        store
            .freeze(vol.name(), &layer("unsynced"), Durability::Deferred)
            .unwrap();
        write(&*vol, 0, &[3; 8192]).unwrap();
        faults.cut_power(seed);
        write(&*vol, 0, &[4]).unwrap_err();
        vol.flush().unwrap_err();
        store.open(vol.name(), Access::ReadOnly).unwrap_err();
        drop((vol, store));

        let store = copy::open(dir.path()).unwrap();
        let vol = store.open(&volume("v"), Access::ReadWrite).unwrap();
        let content = read(&*vol, 0, 8192);
        for sector in content.chunks(512) {
            assert!(sector == [1; 512] || sector == [3; 512], "a torn sector");
            if sector == [1; 512] {
                lost += 1
            } else {
                kept += 1
            }
        }
        assert_eq!(read(&*vol, 8192, 1808), [1; 1808]);
        assert!(store.layers().unwrap().contains(&layer("synced")));
        let synced = store.open_layer(&layer("synced")).unwrap();
        assert_eq!(read(&*synced, 10_000, 20_000), [2; 20_000]);
    }
    assert!(lost > 20 && kept > 20, "lost {lost}, kept {kept}");
}

#[test]
fn the_power_can_go_at_any_operation() {
    for skip in 0..5 {
        let dir = dir();
        let (faults, store) = faulty(&dir);
        faults.hold_writes_back();
        let vol = store.create(&volume("v"), 64 << 10).unwrap();
        faults.fail(Operation::Write, skip, Fault::PowerCut { seed: skip });
        let done = (0..10).take_while(|i| write(&*vol, i * 512, &[7; 512]).is_ok());
        assert_eq!(done.count() as u64, skip);
        drop(vol);
        drop(store);
        let store = copy::open(dir.path()).unwrap();
        let vol = store.open(&volume("v"), Access::ReadOnly).unwrap();
        let rest = 512 * skip;
        assert!(read(&*vol, rest, 4096).iter().all(|b| *b == 0));
    }
}
