//! Import and export: any image into any backend and out again.

#![allow(clippy::cast_possible_truncation, reason = "sizes of test images")]

mod support;

use std::io::{IoSlice, IoSliceMut};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use offshoot_storage::image::{Format, Progress, export, import};
use offshoot_storage::{
    Access, Durability, ErrorKind, LayerName, StorageBackend, Volume, VolumeName, open_backend,
};
use support::{FileSystem, Mounted, entries};

const MIB: u64 = 1 << 20;

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

fn quietly(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Pieces of content, with nothing in between: offset, length, byte.
const PIECES: [(u64, usize, u8); 4] = [
    (0, 1000, 1),
    (5 * MIB + 511, 2 * MIB as usize, 2),
    (9 * MIB, 4096, 3),
    (12 * MIB + 512 - 77, 77, 4),
];
const SIZE: u64 = 12 * MIB + 512;

fn make_raw(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for (offset, len, byte) in PIECES {
        file.write_all_at(&vec![byte; len], offset).unwrap();
    }
}

/// Fails unless the volume is what [`make_raw`] makes.
fn is_the_image(vol: &dyn Volume) {
    assert_eq!(vol.size(), SIZE);
    let mut content = vec![0xee; SIZE as usize];
    vol.read_vectored_at(&mut [IoSliceMut::new(&mut content)], 0)
        .unwrap();
    for (offset, len, byte) in PIECES {
        let at = offset as usize;
        assert!(
            content[at..at + len].iter().all(|b| *b == byte),
            "at {offset}"
        );
        content[at..at + len].fill(0);
    }
    assert!(content.iter().all(|b| *b == 0), "something in the holes");
}

fn stores(dir: &Path) -> Vec<Arc<dyn StorageBackend>> {
    ["copy", "qcow2"]
        .map(|kind| open_backend(kind, &dir.join(kind)).unwrap())
        .into()
}

fn qemu_img(args: &[&str], paths: &[&Path]) {
    let output = Command::new("qemu-img")
        .args(args)
        .args(paths)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
}

fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        support::skipped("qemu-img is not installed");
    }
    found
}

#[test]
fn every_format_goes_into_every_backend_and_out_again() {
    let _alone = support::alone();
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    make_raw(&raw);
    let mut images = vec![(raw.clone(), Format::Raw)];
    for store in stores(dir.path()) {
        for format in [Format::Raw, Format::Qcow2] {
            for (index, (image, from)) in images.clone().into_iter().enumerate() {
                let name = volume(&format!("v{index}-{}", format.as_str()));
                let vol = import(&image, from, &*store, &name, &mut quietly).unwrap();
                is_the_image(&*vol);
                let out = dir.path().join(format!("{}-{name}", store.name()));
                export(&*vol, &out, format, &mut quietly).unwrap();
                let taken = std::fs::metadata(&out).unwrap().blocks() * 512;
                assert!(taken < 5 * MIB, "{} takes {taken}", out.display());
                if has_qemu_img() {
                    let format = format.as_str();
                    qemu_img(&["compare", "-f", "raw", "-F", format], &[&raw, &out]);
                    if format == "qcow2" {
                        qemu_img(&["check", "-q"], &[&out]);
                    }
                }
                if index == 0 {
                    images.push((out, format));
                }
            }
        }
    }
}

#[test]
fn images_that_others_made_are_read() {
    let _alone = support::alone();
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    make_raw(&raw);
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=4k",
        "cluster_size=2M",
    ] {
        let image = dir.path().join(options);
        let args = ["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        qemu_img(&args, &[&raw, &image]);
        for store in stores(dir.path()) {
            let name = volume(&options.replace('=', "-"));
            let vol = import(&image, Format::Qcow2, &*store, &name, &mut quietly).unwrap();
            is_the_image(&*vol);
        }
    }
}

#[test]
fn what_is_no_image_is_refused_and_leaves_nothing() {
    let _alone = support::alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("odd"), [1; 1000]).unwrap();
    std::fs::write(path("empty"), []).unwrap();
    std::fs::write(path("text"), [b'x'; 65536]).unwrap();
    let fifo = Command::new("mkfifo").arg(path("fifo")).status().unwrap();
    assert!(fifo.success());
    let refusals: &[(&str, Format, ErrorKind)] = &[
        ("odd", Format::Raw, ErrorKind::Unsupported),
        ("empty", Format::Raw, ErrorKind::Unsupported),
        ("empty", Format::Qcow2, ErrorKind::Damaged),
        ("text", Format::Qcow2, ErrorKind::Damaged),
        ("fifo", Format::Raw, ErrorKind::Unsupported),
        (".", Format::Raw, ErrorKind::Unsupported),
        ("absent", Format::Raw, ErrorKind::NotFound),
        ("absent", Format::Qcow2, ErrorKind::NotFound),
    ];
    for store in stores(dir.path()) {
        for (name, format, kind) in refusals {
            let made = import(&path(name), *format, &*store, &volume("v"), &mut quietly);
            let error = made.unwrap_err();
            assert_eq!(error.kind(), *kind, "{name} as {format:?}: {error:?}");
        }
        assert!(store.volumes().unwrap().is_empty());
    }
}

/// A qcow2 header is the only thing that may make an image's content depend on another file, and
/// that is refused; in a raw image it is content.
#[test]
fn a_backing_file_is_not_followed() {
    let _alone = support::alone();
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, [b's'; 65536]).unwrap();
    let image = dir.path().join("overlay");
    let backing = format!("backing_file={},backing_fmt=raw", secret.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &backing], &[&image]);
    for store in stores(dir.path()) {
        let made = import(&image, Format::Qcow2, &*store, &volume("v"), &mut quietly);
        let error = made.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("backing file"), "{why}");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap();
        file.set_len(MIB).unwrap();
        let vol = import(&image, Format::Raw, &*store, &volume("v"), &mut quietly).unwrap();
        let mut magic = [0; 4];
        vol.read_vectored_at(&mut [IoSliceMut::new(&mut magic)], 0)
            .unwrap();
        assert_eq!(&magic, b"QFI\xfb");
    }
}

#[test]
fn progress_rises_to_the_end_and_can_stop_the_work() {
    let _alone = support::alone();
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    make_raw(&raw);
    let before = entries(dir.path());
    for store in stores(&{
        let stores = dir.path().join("stores");
        std::fs::create_dir(&stores).unwrap();
        stores
    }) {
        let mut seen = Vec::new();
        let mut watch = |p: Progress| {
            seen.push(p);
            ControlFlow::Continue(())
        };
        let vol = import(&raw, Format::Raw, &*store, &volume("v"), &mut watch).unwrap();
        let last = *seen.last().unwrap();
        assert_eq!(last.done, last.total);
        assert!(
            (2 * MIB..5 * MIB).contains(&last.total),
            "holes do not count: {last:?}"
        );
        assert!(seen.is_sorted_by_key(|p| p.done) && seen.len() > 2);

        let mut stop = |p: Progress| match p.done {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        };
        let made = import(&raw, Format::Raw, &*store, &volume("stopped"), &mut stop);
        assert_eq!(made.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(store.volumes().unwrap(), [volume("v")]);
        for format in [Format::Raw, Format::Qcow2] {
            let out = dir.path().join("out");
            let error = export(&*vol, &out, format, &mut stop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled);
        }
    }
    std::fs::remove_dir_all(dir.path().join("stores")).unwrap();
    assert_eq!(entries(dir.path()), before, "stopped exports leave nothing");
}

#[test]
fn an_export_never_overwrites() {
    let _alone = support::alone();
    let dir = tempfile::tempdir().unwrap();
    let store = open_backend("copy", &dir.path().join("store")).unwrap();
    let vol = store.create(&volume("v"), MIB).unwrap();
    let out = dir.path().join("out");
    std::fs::write(&out, "precious").unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
    // What an export that was killed has left, which nobody holds a lock on.
    std::fs::write(dir.path().join(".offshoot-new-1-1"), "half").unwrap();
    for target in ["out", "dangling"] {
        let error = export(&*vol, &dir.path().join(target), Format::Raw, &mut quietly);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Exists);
    }
    // Somebody makes the file while the export is under way.
    let late = dir.path().join("late");
    let mut meanwhile = |_| {
        std::fs::write(&late, "precious").unwrap();
        ControlFlow::Continue(())
    };
    let error = export(&*vol, &late, Format::Raw, &mut meanwhile).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    for path in [&out, &late] {
        assert_eq!(std::fs::read(path).unwrap(), b"precious");
    }
    assert_eq!(entries(dir.path()), ["dangling", "late", "out", "store"]);
    let missing: PathBuf = dir.path().join("no/where");
    let error = export(&*vol, &missing, Format::Raw, &mut quietly).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// A store and a target that run full in the middle of the work.
#[test]
fn no_space_leaves_nothing_behind() {
    let _alone = support::alone();
    let Some(mounted) = Mounted::new(FileSystem::Ext4, 48) else {
        return;
    };
    let dir = mounted.path();
    std::fs::remove_dir(dir.join("lost+found")).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let big = elsewhere.path().join("big.raw");
    std::fs::write(&big, vec![7; 64 * MIB as usize]).unwrap();

    for kind in ["copy", "qcow2"] {
        let path = dir.join("store");
        let store = open_backend(kind, &path).unwrap();
        let made = import(&big, Format::Raw, &*store, &volume("big"), &mut quietly);
        assert_eq!(made.unwrap_err().kind(), ErrorKind::StorageFull, "{kind}");
        assert!(store.volumes().unwrap().is_empty());

        // A volume that fits, and a copy of it that does not.
        let vol = store.create(&volume("v"), 64 * MIB).unwrap();
        vol.write_vectored_at(&[IoSlice::new(&vec![5; 24 * MIB as usize])], 0)
            .unwrap();
        vol.flush().unwrap();
        let out = dir.join("out.raw");
        let error = export(&*vol, &out, Format::Raw, &mut quietly).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{kind}");
        assert_eq!(entries(&dir), ["store"]);
        if !store.capabilities().shares_blocks {
            let layer = LayerName::new("l").unwrap();
            let frozen = store.freeze(vol.name(), &layer, Durability::Now);
            assert_eq!(frozen.unwrap_err().kind(), ErrorKind::StorageFull);
            assert!(store.layers().unwrap().is_empty());
        }
        // A write that finds no space says so, and what was written before is there.
        let error = (24..64)
            .find_map(|at| {
                let bytes = vec![6; MIB as usize];
                vol.write_vectored_at(&[IoSlice::new(&bytes)], at * MIB)
                    .err()
            })
            .unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{kind}");
        let mut found = vec![0; 24 * MIB as usize];
        vol.read_vectored_at(&mut [IoSliceMut::new(&mut found)], 0)
            .unwrap();
        assert!(found.iter().all(|b| *b == 5));
        drop(vol);
        assert_eq!(entries(&path.join("volumes")).len(), 1);
        store.open(&volume("v"), Access::ReadWrite).unwrap();
        store.delete(&volume("v")).unwrap();
        drop(store);
        std::fs::remove_dir_all(&path).unwrap();
    }
}
