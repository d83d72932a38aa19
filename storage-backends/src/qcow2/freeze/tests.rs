//! Kills a process at each step of a freeze.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::process::Command;

use crate::{Access, Durability, LayerName, VolumeName, open_backend};

const CRASH_AT: &str = "OFFSHOOT_TEST_CRASH_AT";
const STORE: &str = "OFFSHOOT_TEST_STORE";
const LAST_STEP: u32 = 5;

/// Aborts the process when the environment names this step.
pub(super) fn crash_if_asked(step: u32) {
    if std::env::var(CRASH_AT).is_ok_and(|s| s == step.to_string()) {
        std::process::abort();
    }
}

fn v() -> VolumeName {
    VolumeName::new("v").unwrap()
}

fn l() -> LayerName {
    LayerName::new("l").unwrap()
}

/// What the process does that dies; nothing, when the harness runs it.
#[test]
fn worker() {
    let Ok(path) = std::env::var(STORE) else {
        return;
    };
    let store = open_backend("qcow2", path.as_ref()).unwrap();
    let volume = store.open(&v(), Access::ReadWrite).unwrap();
    volume
        .write_vectored_at(&[IoSlice::new(&[2; 1000])], 0)
        .unwrap();
    volume.flush().unwrap();
    store.freeze(&v(), &l(), Durability::Deferred).unwrap();
}

fn dies_at(step: u32, path: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["qcow2::freeze::tests::worker", "--exact"])
        .env(STORE, path)
        .env(CRASH_AT, step.to_string())
        .output()
        .unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(output.status.signal(), Some(6), "step {step}: {output:?}");
}

#[test]
fn a_process_that_dies_at_any_step_leaves_the_volume_whole_and_the_layer_whole_or_absent() {
    for step in 1..=LAST_STEP {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let store = open_backend("qcow2", &path).unwrap();
        drop(store.create(&v(), 1 << 20).unwrap());
        drop(store);
        dies_at(step, &path);

        let store = open_backend("qcow2", &path).unwrap();
        let is_there = store.layers().unwrap() == [l()];
        assert_eq!(is_there, step >= 4, "step {step}");
        let read = |volume: &dyn crate::Volume| {
            let mut buf = [0xee; 1001];
            volume
                .read_vectored_at(&mut [IoSliceMut::new(&mut buf)], 0)
                .unwrap();
            assert_eq!(buf[..1000], [2; 1000], "step {step}");
            assert_eq!(buf[1000], 0, "step {step}");
        };
        if is_there {
            read(&*store.open_layer(&l()).unwrap());
        }
        store.check(&v()).unwrap();
        let volume = store.open(&v(), Access::ReadWrite).unwrap();
        read(&*volume);
        if !is_there {
            store.freeze(&v(), &l(), Durability::Now).unwrap();
        }
        drop(volume);
        for room in ["volumes", "layers"] {
            let names = std::fs::read_dir(path.join(room)).unwrap();
            assert_eq!(names.count(), 1, "step {step}: something is left in {room}");
        }
    }
}
