//! Processes that are killed in the middle of their work leave a store that is whole.

mod support;

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use offshoot_storage::{
    Access, Durability, ErrorKind, LayerName, Volume, VolumeName, open_backend,
};
use support::{FileSystem, Mounted, entries};

const SIZE: usize = 1 << 20;
const KIND: &str = "OFFSHOOT_TEST_KIND";
const STORE: &str = "OFFSHOOT_TEST_STORE";

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

fn layer(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

/// What the killed process does: every layer and every fork is one byte over and over.
#[test]
#[ignore = "runs in a process of its own, to be killed"]
fn worker() {
    let (Ok(kind), Ok(path)) = (std::env::var(KIND), std::env::var(STORE)) else {
        return;
    };
    let store = open_backend(&kind, path.as_ref()).unwrap();
    let mut vol = store.open(&volume("v"), Access::ReadWrite).unwrap();
    support::say("working");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    for round in 0_u32.. {
        let byte = round.to_le_bytes()[0];
        vol.write_vectored_at(&[IoSlice::new(&[byte; SIZE])], 0)
            .unwrap();
        let (frozen, fork) = (layer(&format!("l{round}")), volume(&format!("f{round}")));
        if let Some(old) = round.checked_sub(3) {
            store.delete(&volume(&format!("f{old}"))).unwrap();
            // A layer that the volume stands on stays.
            match store.delete_layer(&layer(&format!("l{old}"))) {
                Ok(()) => {}
                Err(e) => assert_eq!(e.kind(), ErrorKind::InUse),
            }
        }
        match store.freeze(vol.name(), &frozen, Durability::Deferred) {
            Ok(()) => {}
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::ChainTooLong);
                drop(vol);
                store.flatten(&volume("v")).unwrap();
                vol = store.open(&volume("v"), Access::ReadWrite).unwrap();
                store
                    .freeze(vol.name(), &frozen, Durability::Deferred)
                    .unwrap();
            }
        }
        drop(store.fork(&frozen, &fork).unwrap());
    }
}

fn start(kind: &str, store: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["worker", "--exact", "--ignored", "--nocapture"])
        .env(KIND, kind)
        .env(STORE, store)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("working")));
    child
}

fn is_one_byte(vol: &dyn Volume) {
    assert_eq!(vol.size(), SIZE as u64);
    let mut content = vec![0; SIZE];
    vol.read_vectored_at(&mut [IoSliceMut::new(&mut content)], 0)
        .unwrap();
    let other = content.iter().position(|b| *b != content[0]);
    assert_eq!(other, None, "in {}", vol.name());
}

fn survives_kills(kind: &str, dir: &Path) {
    let path = dir.join("store");
    for round in 0_u64..12 {
        drop(
            open_backend(kind, &path)
                .and_then(|s| s.create(&volume("v"), SIZE as u64))
                .unwrap(),
        );
        let mut child = start(kind, &path);
        // Another process looks in, and neither cleans up what the worker is making nor gets
        // what it has open.
        let store = open_backend(kind, &path).unwrap();
        let opened = store.open(&volume("v"), Access::ReadWrite);
        assert_eq!(opened.unwrap_err().kind(), ErrorKind::InUse);
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        std::thread::sleep(Duration::from_millis(3 + 17 * round % 60));
        assert_eq!(child.try_wait().unwrap(), None, "the worker failed");
        child.kill().unwrap();
        child.wait().unwrap();
        drop(store);

        let store = open_backend(kind, &path).unwrap();
        for room in ["volumes", "layers"] {
            for name in entries(&path.join(room)) {
                assert!(!name.starts_with('.'), "{name} is left");
            }
        }
        for name in store.volumes().unwrap() {
            let vol = store.open(&name, Access::ReadWrite).unwrap();
            if name.as_str() != "v" {
                is_one_byte(&*vol);
            }
            drop(vol);
            store.check(&name).unwrap();
            store.delete(&name).unwrap();
        }
        let mut layers = store.layers().unwrap();
        for name in &layers {
            is_one_byte(&*store.open_layer(name).unwrap());
        }
        // Whatever stands on others goes first.
        while !layers.is_empty() {
            let before = layers.len();
            layers.retain(|name| store.delete_layer(name).is_err());
            assert!(layers.len() < before, "{layers:?} cannot be deleted");
        }
    }
}

fn in_memory(kind: &str) {
    let _alone = support::alone();
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    survives_kills(kind, dir.path());
}

#[test]
fn copy() {
    in_memory("copy");
}

#[cfg(feature = "imago")]
#[test]
fn qcow2() {
    in_memory("qcow2");
}

#[cfg(feature = "qcow2-rs")]
#[test]
fn qcow2_rs() {
    in_memory("qcow2:qcow2-rs");
}

#[test]
fn reflink() {
    let _alone = support::alone();
    for file_system in [FileSystem::Btrfs, FileSystem::Xfs] {
        if let Some(mounted) = Mounted::new(file_system, 512) {
            survives_kills("reflink", &mounted.path());
        }
    }
}
