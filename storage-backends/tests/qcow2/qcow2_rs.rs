//! What the qcow2-rs library does wrong does not get through.

use std::process::Command;

use offshoot_storage::qcow2::{EngineKind, Qcow2Backend, Qcow2Options};
use offshoot_storage::{Access, Durability, ErrorKind, StorageBackend};

use crate::basics::{l, open, v};
use crate::oracle::{Place, check, compare, qemu_img, qemu_img_missing, read, same, write};
use crate::support::{FileSystem, Mounted};

const ENGINE: EngineKind = EngineKind::Qcow2Rs;
const MIB: u64 = 1 << 20;

/// The library alone writes what was in memory where the backing file ends inside a cluster.
#[test]
fn a_backing_file_shorter_than_its_overlay_reads_as_zeroes_behind_its_end() {
    if qemu_img_missing() {
        return;
    }
    let place = Place::new();
    let backend = open(&place, ENGINE);
    let short = 100 * 1024 + 512;
    let volume = backend.create(&v("short"), short).unwrap();
    write(&*volume, 0, &vec![7; short as usize]);
    backend
        .freeze(&v("short"), &l("short"), Durability::Now)
        .unwrap();
    drop(volume);
    let image = place.volume("long");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args(["../layers/short.qcow2", image.to_str().unwrap(), "1M"])
        .status()
        .unwrap();
    assert!(made.success());

    let mut model = vec![0; MIB as usize];
    model[..short as usize].fill(7);
    let volume = backend.open(&v("long"), Access::ReadWrite).unwrap();
    same(&*volume, &model);
    // In the cluster that the backing file ends in, in one behind it, and across both.
    for (at, len) in [(70_000, 10), (200_000, 3000), (short as usize - 5, 60_000)] {
        write(&*volume, at as u64, &vec![9; len]);
        model[at..at + len].fill(9);
        same(&*volume, &model);
    }
    volume.flush().unwrap();
    check(&image);
    compare(&place, &image, &model);
}

/// The library alone overwrites what internal snapshots share.
#[test]
fn an_image_with_internal_snapshots_is_refused_untouched() {
    if qemu_img_missing() {
        return;
    }
    let place = Place::new();
    let backend = open(&place, ENGINE);
    let volume = backend.create(&v("a"), MIB).unwrap();
    write(&*volume, 0, &[1; 100_000]);
    drop(volume);
    let image = place.volume("a");
    qemu_img(&["snapshot", "-c", "inside", image.to_str().unwrap()]);
    let before = std::fs::read(&image).unwrap();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let error = backend.open(&v("a"), access).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    for operation in [
        backend.freeze(&v("a"), &l("x"), Durability::Now),
        backend.flatten(&v("a")),
        backend.check(&v("a")),
    ] {
        assert_eq!(operation.unwrap_err().kind(), ErrorKind::Unsupported);
    }
    assert!(
        std::fs::read(&image).unwrap() == before,
        "it was written to"
    );
}

/// Images that imago takes, and the library gets wrong.
#[test]
fn images_that_the_library_gets_wrong_are_refused_with_the_reason() {
    if qemu_img_missing() {
        return;
    }
    for (options, reason) in [
        ("compat=0.10", "version 3"),
        ("cluster_size=512", "4 KiB"),
        ("refcount_bits=8", "16 bits"),
    ] {
        let place = Place::new();
        let backend = open(&place, ENGINE);
        let image = place.volume("a");
        let image = image.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, image, "1M"]);
        let error = backend.open(&v("a"), Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{options}");
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains(reason) && why.contains("imago"), "{why}");
    }
}

#[test]
fn compressed_clusters_are_read_and_flattened_but_not_written_over() {
    if qemu_img_missing() {
        return;
    }
    let place = Place::new();
    let backend = open(&place, ENGINE);
    let model: Vec<u8> = (0..MIB).map(|i| (i / 700) as u8).collect();
    let raw = place.file("raw");
    std::fs::write(&raw, &model).unwrap();
    let image = place.volume("a");
    let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(&["convert", "-c", "-O", "qcow2", paths[0], paths[1]]);
    let error = backend.open(&v("a"), Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    same(&*backend.open(&v("a"), Access::ReadOnly).unwrap(), &model);
    // As a layer it is as good as any.
    backend
        .freeze(&v("a"), &l("compressed"), Durability::Now)
        .unwrap();
    let fork = backend.fork(&l("compressed"), &v("b")).unwrap();
    write(&*fork, 5, &[0xaa; 3]);
    let mut expected = model.clone();
    expected[5..8].fill(0xaa);
    same(&*fork, &expected);
    fork.flush().unwrap();
    check(&place.volume("b"));
    compare(&place, &place.volume("b"), &expected);
}

/// More tables than the cache holds: what is written out when it is emptied is in order.
#[test]
fn the_cache_of_tables_is_emptied_and_filled_again() {
    let place = Place::new();
    let options = Qcow2Options {
        engine: ENGINE,
        cluster_bits: 12,
        ..Qcow2Options::default()
    };
    let backend = Qcow2Backend::open_store(&place.store(), options).unwrap();
    let tables = 5000_u64;
    let volume = backend.create(&v("a"), tables * 2 * MIB).unwrap();
    let content = |table: u64| [table.to_le_bytes(), (!table).to_be_bytes()].concat();
    for table in 0..tables {
        write(&*volume, table * 2 * MIB + table % 1000, &content(table));
    }
    for table in (0..tables).step_by(7) {
        assert_eq!(
            read(&*volume, table * 2 * MIB + table % 1000, 16),
            content(table)
        );
    }
    drop(volume);
    backend.check(&v("a")).unwrap();
    let volume = backend.open(&v("a"), Access::ReadOnly).unwrap();
    for table in 0..tables {
        assert_eq!(
            read(&*volume, table * 2 * MIB + table % 1000, 16),
            content(table)
        );
    }
    if !qemu_img_missing() {
        check(&place.volume("a"));
    }
}

/// A full disk: what is refused changes nothing, also where a cluster was to be copied up, and once
/// there is space again the volume goes on.
#[test]
fn a_full_disk_loses_nothing_and_the_volume_recovers() {
    let _place = Place::new();
    let Some(mounted) = Mounted::new(FileSystem::Ext4, 24) else {
        return;
    };
    let backend = Qcow2Backend::open_store(
        &mounted.path().join("store"),
        Qcow2Options {
            engine: ENGINE,
            ..Qcow2Options::default()
        },
    )
    .unwrap();
    let size = 4 * MIB;
    let volume = backend.create(&v("a"), size).unwrap();
    let mut model: Vec<u8> = (0..size).map(|i| (i / 100) as u8 | 1).collect();
    write(&*volume, 0, &model);
    backend.freeze(&v("a"), &l("l"), Durability::Now).unwrap();
    write(&*volume, 10, b"before");
    model[10..16].copy_from_slice(b"before");
    volume.flush().unwrap();

    let filler = mounted.path().join("filler");
    let mut size_of_piece = MIB as usize;
    let mut file = std::fs::File::create(&filler).unwrap();
    while size_of_piece > 0 {
        use std::io::Write;
        if file.write_all(&vec![1; size_of_piece]).is_err() {
            size_of_piece /= 2;
        }
    }
    file.sync_all().ok();
    let mut refused = 0;
    for cluster in 1..(size >> 16) {
        let at = (cluster << 16) + 77;
        let error = volume
            .write_vectored_at(&[std::io::IoSlice::new(&[0xfe; 100])], at)
            .err();
        match error {
            None => model[at as usize..at as usize + 100].fill(0xfe),
            Some(e) => {
                assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
                refused += 1;
                let mut found = vec![0; 65536];
                found.copy_from_slice(&read(&*volume, cluster << 16, 65536));
                // Each byte of the range old or new; the rest as it was.
                found[77..177].copy_from_slice(&model[at as usize..at as usize + 100]);
                assert!(found == model[(cluster << 16) as usize..][..65536]);
            }
        }
    }
    assert!(refused > 0, "the file system was not full");
    // Some of the refused ranges may have been written in part: make them known.
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    for cluster in 1..(size >> 16) {
        let at = (cluster << 16) + 77;
        write(&*volume, at, &[0xfd; 100]);
        model[at as usize..at as usize + 100].fill(0xfd);
    }
    volume.flush().unwrap();
    same(&*volume, &model);
    drop(volume);
    same(&*backend.open(&v("a"), Access::ReadWrite).unwrap(), &model);
    backend.check(&v("a")).unwrap();
}

/// The child of a fork(2) has the disks of its parent, without their threads.
#[test]
fn a_forked_child_uses_an_inherited_disk_and_lets_go_of_another() {
    let place = Place::new();
    let backend = open(&place, ENGINE);
    let parents = backend.create(&v("parents"), MIB).unwrap();
    let childs = backend.create(&v("childs"), MIB).unwrap();
    let fresh = backend.create(&v("fresh"), MIB).unwrap();
    write(&*parents, 0, &[1; 1000]);
    write(&*childs, 0, &[2; 1000]);

    // SAFETY: the child runs on this thread only, uses what fork(2) leaves usable, and ends by
    // `_exit`.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let work = || -> std::io::Result<bool> {
            drop(parents);
            let mut buf = [0; 1000];
            let mut bufs = [std::io::IoSliceMut::new(&mut buf)];
            childs.read_vectored_at(&mut bufs, 0)?;
            childs.write_vectored_at(&[std::io::IoSlice::new(&[3; 4096])], 100_000)?;
            childs.flush()?;
            fresh.write_vectored_at(&[std::io::IoSlice::new(&[4; 10])], 5)?;
            fresh.flush()?;
            drop(fresh);
            drop(childs);
            Ok(buf == [2; 1000])
        };
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let status = i32::from(!matches!(done, Ok(Ok(true))));
        // SAFETY: ends the child at once, without any destructor of the harness.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    for _ in 0..1000 {
        // SAFETY: `status` is a place for the status; the child is ours.
        if unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } != 0 {
            break;
        }
        status = -1;
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    if status == -1 {
        // SAFETY: the child is ours and was not waited for yet.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    assert_eq!(status, 0, "the child failed or hangs");

    write(&*parents, 500, &[5; 1000]);
    parents.flush().unwrap();
    assert_eq!(read(&*parents, 499, 2), [1, 5]);
    drop(parents);
    backend.check(&v("parents")).unwrap();
    assert_eq!(
        read(
            &*backend.open(&v("parents"), Access::ReadWrite).unwrap(),
            0,
            1
        ),
        [1]
    );
}
