//! What is there after a power cut, on real file systems: the disk's image is kept at the moment of
//! the cut, and mounted again.

mod support;

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

use offshoot_storage::{
    Access, Durability, Error, LayerName, StorageBackend, Volume, VolumeName, copy, reflink,
};
use support::{FileSystem, Mounted};

const SIZE: usize = 3 << 20;

type Open = fn(&Path) -> Result<Arc<dyn StorageBackend>, Error>;

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

fn layer(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

fn write(vol: &dyn Volume, offset: u64, byte: u8, len: usize) {
    vol.write_vectored_at(&[IoSlice::new(&vec![byte; len])], offset)
        .unwrap();
}

/// Fails unless the first `len` bytes are `byte`.
fn starts_with(vol: &dyn Volume, byte: u8, len: usize) {
    let mut found = vec![0xee; len];
    vol.read_vectored_at(&mut [IoSliceMut::new(&mut found)], 0)
        .unwrap();
    let wrong = found.iter().position(|b| *b != byte);
    assert_eq!(wrong, None, "in {}", vol.name());
}

/// Whole or absent: a volume that was forked from `content` and has never been flushed.
fn whole_or_absent(store: &dyn StorageBackend, name: &str, byte: u8) {
    if store.volumes().unwrap().contains(&volume(name)) {
        let vol = store.open(&volume(name), Access::ReadWrite).unwrap();
        assert_eq!(vol.size(), SIZE as u64);
        starts_with(&*vol, byte, SIZE);
    }
}

/// The power goes the moment that each promise is given, with nothing afterwards that could have
/// made it durable by the way.
fn is_prompt(file_system: FileSystem, open: Open) {
    let Some(mut mounted) = Mounted::new(file_system, 512) else {
        return;
    };
    let dir = mounted.path().join("store");
    let store = open(&dir).unwrap();
    let mut moments = Vec::new();

    let source = store.create(&volume("source"), SIZE as u64).unwrap();
    moments.push(("create", mounted.moment()));
    write(&*source, 0, 1, SIZE);
    source.flush().unwrap();
    moments.push(("flush", mounted.moment()));
    write(&*source, 0, 2, SIZE);
    store
        .freeze(source.name(), &layer("now"), Durability::Now)
        .unwrap();
    moments.push(("freeze", mounted.moment()));
    write(&*source, 0, 3, SIZE);
    store
        .freeze(source.name(), &layer("deferred"), Durability::Deferred)
        .unwrap();
    store.sync_layer(&layer("deferred")).unwrap();
    moments.push(("sync_layer", mounted.moment()));
    let fork = store.fork(&layer("now"), &volume("fork")).unwrap();
    fork.flush().unwrap();
    moments.push(("fork", mounted.moment()));
    let mut fill = |vol: &dyn Volume| {
        write(vol, 0, 4, SIZE);
        Ok(())
    };
    let filled = store
        .create_filled(&volume("filled"), SIZE as u64, &mut fill)
        .unwrap();
    moments.push(("create_filled", mounted.moment()));
    drop((source, fork, filled, store));

    for (promise, moment) in moments {
        mounted.power_was_cut(moment);
        let store = open(&dir).unwrap();
        let vol = |name| store.open(&volume(name), Access::ReadWrite).unwrap();
        match promise {
            "create" => starts_with(&*vol("source"), 0, SIZE),
            "flush" => starts_with(&*vol("source"), 1, SIZE),
            "freeze" => starts_with(&*store.open_layer(&layer("now")).unwrap(), 2, SIZE),
            "sync_layer" => {
                starts_with(&*store.open_layer(&layer("deferred")).unwrap(), 3, SIZE);
            }
            "fork" => starts_with(&*vol("fork"), 2, SIZE),
            _ => starts_with(&*vol("filled"), 4, SIZE),
        }
    }
}

fn survives(file_system: FileSystem, open: Open) {
    let Some(mut mounted) = Mounted::new(file_system, 512) else {
        return;
    };
    let dir = mounted.path().join("store");
    let store = open(&dir).unwrap();
    drop(store.create(&volume("created"), SIZE as u64).unwrap());

    let source = store.create(&volume("source"), SIZE as u64).unwrap();
    write(&*source, 0, 1, SIZE);
    store
        .freeze(source.name(), &layer("now"), Durability::Now)
        .unwrap();
    write(&*source, 0, 2, SIZE);
    store
        .freeze(source.name(), &layer("deferred"), Durability::Deferred)
        .unwrap();
    store.sync_layer(&layer("deferred")).unwrap();
    write(&*source, 0, 3, SIZE);
    source.flush().unwrap();
    write(&*source, 0, 4, 1 << 20);

    let flushed = store.fork(&layer("now"), &volume("flushed")).unwrap();
    write(&*flushed, 0, 5, 1 << 20);
    flushed.flush().unwrap();
    let unflushed = store.fork(&layer("now"), &volume("unflushed")).unwrap();
    store
        .freeze(source.name(), &layer("unsynced"), Durability::Deferred)
        .unwrap();
    // Makes the directory durable, with the names of what is not.
    drop(store.create(&volume("later"), SIZE as u64).unwrap());

    let moment = mounted.moment();
    drop((source, flushed, unflushed, store));
    mounted.power_was_cut(moment);

    let store = open(&dir).unwrap();
    for name in store.volumes().unwrap() {
        store.check(&name).unwrap();
    }
    for name in ["created", "later"] {
        let vol = store.open(&volume(name), Access::ReadWrite).unwrap();
        assert_eq!(vol.size(), SIZE as u64);
        starts_with(&*vol, 0, SIZE);
    }
    starts_with(&*store.open_layer(&layer("now")).unwrap(), 1, SIZE);
    starts_with(&*store.open_layer(&layer("deferred")).unwrap(), 2, SIZE);
    if store.layers().unwrap().contains(&layer("unsynced")) {
        starts_with(&*store.open_layer(&layer("unsynced")).unwrap(), 4, 1 << 20);
    }
    let source = store.open(&volume("source"), Access::ReadOnly).unwrap();
    let mut tail = vec![0; SIZE - (1 << 20)];
    source
        .read_vectored_at(&mut [IoSliceMut::new(&mut tail)], 1 << 20)
        .unwrap();
    assert!(tail.iter().all(|b| *b == 3), "flushed writes are lost");
    let flushed = store.open(&volume("flushed"), Access::ReadWrite).unwrap();
    starts_with(&*flushed, 5, 1 << 20);
    whole_or_absent(&*store, "unflushed", 1);
}

#[test]
fn copy_on_ext4() {
    let _alone = support::alone();
    is_prompt(FileSystem::Ext4, copy::open);
    survives(FileSystem::Ext4, copy::open);
}

#[test]
fn copy_on_xfs() {
    let _alone = support::alone();
    is_prompt(FileSystem::Xfs, copy::open);
    survives(FileSystem::Xfs, copy::open);
}

#[test]
fn reflink_on_btrfs() {
    let _alone = support::alone();
    is_prompt(FileSystem::Btrfs, reflink::open);
    survives(FileSystem::Btrfs, reflink::open);
}

#[test]
fn reflink_on_xfs() {
    let _alone = support::alone();
    is_prompt(FileSystem::Xfs, reflink::open);
    survives(FileSystem::Xfs, reflink::open);
}

#[cfg(feature = "imago")]
#[test]
fn qcow2_on_every_file_system() {
    let _alone = support::alone();
    for file_system in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs] {
        let open: Open = |path| offshoot_storage::open_backend("qcow2:imago", path);
        is_prompt(file_system, open);
        survives(file_system, open);
    }
}

#[cfg(feature = "qcow2-rs")]
#[test]
fn qcow2_rs_on_every_file_system() {
    let _alone = support::alone();
    for file_system in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs] {
        let open: Open = |path| offshoot_storage::open_backend("qcow2:qcow2-rs", path);
        is_prompt(file_system, open);
        survives(file_system, open);
    }
}
