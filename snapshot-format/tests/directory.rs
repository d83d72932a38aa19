//! A snapshot's directory: written, published, read, verified; and what hostile hands do to it.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use common::{content, layout, names, noise, section};
use offshoot_snapshot_format::*;

const PAGE: u64 = 4096;

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn id() -> SnapshotId {
    SnapshotId::from_bytes(*b"0123456789abcdef")
}

/// Writes a snapshot whose chunk `i` holds noise if `data(i)`, else zeros.
fn write(store: &Path, layout: MemoryLayout, data: impl Fn(u64) -> bool) -> PathBuf {
    let mut writer = SnapshotWriter::create(store, id()).unwrap();
    let memory = writer.memory_image(layout).unwrap();
    // Backwards, because any order will do.
    for chunk in memory
        .layout()
        .clone()
        .chunks()
        .collect::<Vec<_>>()
        .iter()
        .rev()
    {
        let len = usize::try_from(chunk.length).unwrap();
        let bytes = if data(chunk.index) {
            noise(1, len)
        } else {
            vec![0; len]
        };
        memory.write_chunk(chunk.index, &bytes).unwrap();
    }
    let memory = memory.finish().unwrap();
    writer.publish(memory, content(vec![section(100)])).unwrap()
}

/// Writes to a published file, which its mode forbids to all but root.
fn tamper(file: &Path, bytes: &[u8], offset: u64) {
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn what_is_written_is_read_back() {
    let store = tempfile::tempdir().unwrap();
    let dir = write(store.path(), layout(1 << 20, 40 << 20), |i| i % 5 == 1);
    assert_eq!(dir, store.path().join(id().to_string()));
    assert_eq!(names(store.path()), [id().to_string()]);
    assert_eq!(names(&dir), ["manifest", "memory"]);

    let snapshot = RawSnapshot::open(&dir).unwrap();
    let manifest = snapshot.manifest();
    assert_eq!(manifest.id(), id());
    assert_eq!(manifest.requirements(), &content(vec![]).requirements);
    assert_eq!(manifest.metadata().producer, "tests");
    let mut sections = manifest.sections();
    let state = sections.take_raw(SectionKind(*b"TEST"), 0).unwrap();
    assert_eq!(state.payload, section(100).payload);
    sections.finish().unwrap();

    let (header, requirements) = read_requirements(&dir).unwrap();
    assert_eq!(&header, manifest.header());
    assert_eq!(&requirements, manifest.requirements());
    assert_eq!(read_header(&dir).unwrap(), header);

    let mut told = vec![];
    let file = snapshot
        .memory()
        .prove(Verify::Eager, |p| {
            told.push((p.done, p.total));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(told.len(), 40);
    assert!(told.is_sorted());
    assert_eq!(told.last(), Some(&(40 << 20, 40 << 20)));
    let mut bytes = vec![0; 1 << 20];
    file.read_exact_at(&mut bytes, 6 << 20).unwrap();
    assert_eq!(bytes, noise(1, 1 << 20));
    assert_eq!(
        snapshot.memory().read_chunk(6, &mut bytes).unwrap(),
        1 << 20
    );
    assert_eq!(bytes, noise(1, 1 << 20));

    // 8 of 40 chunks hold data; the rest takes no space.
    let stored = fs::metadata(dir.join("memory")).unwrap().blocks() * 512;
    assert!(stored < 10 << 20, "{stored} bytes are stored");
    for (file, mode) in [
        ("", 0o40700),
        ("manifest", 0o100_400),
        ("memory", 0o100_400),
    ] {
        assert_eq!(fs::metadata(dir.join(file)).unwrap().mode(), mode);
    }
}

#[test]
fn zero_runs_within_a_chunk_are_holes_and_digests_hold() {
    let store = tempfile::tempdir().unwrap();
    let mut writer = SnapshotWriter::create(store.path(), id()).unwrap();
    let memory = writer.memory_image(layout(1 << 20, 1 << 20)).unwrap();
    let mut bytes = vec![0; 1 << 20];
    bytes[200_000] = 1;
    bytes[600_000..800_000].fill(2);
    memory.write_chunk(0, &bytes).unwrap();
    let dir = writer
        .publish(memory.finish().unwrap(), content(vec![]))
        .unwrap();
    let snapshot = RawSnapshot::open(&dir).unwrap();
    snapshot.memory().prove(Verify::Eager, go_on).unwrap();
    let mut read = vec![7; 1 << 20];
    snapshot.memory().read_chunk(0, &mut read).unwrap();
    assert!(read == bytes);
    let stored = fs::metadata(dir.join("memory")).unwrap().blocks() * 512;
    assert!(stored <= 5 * 65536, "{stored} bytes are stored");
}

#[test]
fn several_threads_write_one_image() {
    let store = tempfile::tempdir().unwrap();
    let mut writer = SnapshotWriter::create(store.path(), id()).unwrap();
    let memory = writer.memory_image(layout(1 << 16, 64 << 16)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for chunk in memory.layout().chunks().filter(|c| c.index % 4 == thread) {
                    let seed = u8::try_from(chunk.index).unwrap();
                    memory
                        .write_chunk(chunk.index, &noise(seed, 1 << 16))
                        .unwrap();
                }
            });
        }
    });
    let dir = writer
        .publish(memory.finish().unwrap(), content(vec![]))
        .unwrap();
    let snapshot = RawSnapshot::open(&dir).unwrap();
    let file = snapshot.memory().prove(Verify::Eager, go_on).unwrap();
    for index in 0..64u8 {
        let mut bytes = vec![0; 1 << 16];
        file.read_exact_at(&mut bytes, u64::from(index) << 16)
            .unwrap();
        assert!(bytes == noise(index, 1 << 16), "chunk {index}");
    }
}

#[test]
fn every_wrong_chunk_is_found_and_named() {
    let store = tempfile::tempdir().unwrap();
    let dir = write(store.path(), layout(4096, 12 * PAGE), |i| i % 3 == 0);
    for index in 0..12 {
        for at in [0, 1777, PAGE - 1] {
            let snapshot = RawSnapshot::open(&dir).unwrap();
            let mut old = [0];
            let file = fs::File::open(dir.join("memory")).unwrap();
            file.read_exact_at(&mut old, index * PAGE + at).unwrap();
            tamper(&dir.join("memory"), &[old[0] ^ 0x10], index * PAGE + at);

            let expected = Place::Chunk {
                index,
                file_offset: index * PAGE,
            };
            let error = snapshot.memory().prove(Verify::Eager, go_on).unwrap_err();
            assert_eq!(
                (error.kind(), error.place()),
                (ErrorKind::Checksum, expected)
            );
            let mut bytes = [1; 4096];
            let error = snapshot.memory().read_chunk(index, &mut bytes).unwrap_err();
            assert_eq!(
                (error.kind(), error.place()),
                (ErrorKind::Checksum, expected)
            );
            assert!(bytes == [0; 4096], "unproven bytes were handed out");

            snapshot.memory().prove(Verify::None, go_on).unwrap();
            tamper(&dir.join("memory"), &old, index * PAGE + at);
        }
    }
    let snapshot = RawSnapshot::open(&dir).unwrap();
    snapshot.memory().prove(Verify::Eager, go_on).unwrap();
}

#[test]
fn the_first_of_several_wrong_chunks_is_named_whatever_the_threads_do() {
    let store = tempfile::tempdir().unwrap();
    // Large enough for several threads.
    let dir = write(store.path(), layout(1 << 16, 20 << 20), |_| true);
    for index in [101, 102, 103, 250, 310] {
        tamper(&dir.join("memory"), b"changed", index << 16);
    }
    let snapshot = RawSnapshot::open(&dir).unwrap();
    for _ in 0..20 {
        let error = snapshot.memory().prove(Verify::Eager, go_on).unwrap_err();
        let expected = Place::Chunk {
            index: 101,
            file_offset: 101 << 16,
        };
        assert_eq!(error.place(), expected);
    }
}

#[test]
fn data_where_zeros_must_be_is_found_also_when_it_is_a_hole_elsewhere() {
    let store = tempfile::tempdir().unwrap();
    let dir = write(store.path(), layout(1 << 16, 4 << 16), |i| i == 1);
    // Zeros that are stored are as good as a hole ...
    tamper(&dir.join("memory"), &[0; 1 << 16], 3 << 16);
    let snapshot = RawSnapshot::open(&dir).unwrap();
    snapshot.memory().prove(Verify::Eager, go_on).unwrap();
    // ... and a hole in place of data is not.
    fs::remove_file(dir.join("memory")).unwrap();
    fs::File::create(dir.join("memory"))
        .unwrap()
        .set_len(4 << 16)
        .unwrap();
    let snapshot = RawSnapshot::open(&dir).unwrap();
    let error = snapshot.memory().prove(Verify::Eager, go_on).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
    assert!(matches!(error.place(), Place::Chunk { index: 1, .. }));
}

#[test]
fn a_change_or_a_cut_while_verifying_is_told() {
    let store = tempfile::tempdir().unwrap();
    let dir = write(store.path(), layout(4096, 12 * PAGE), |_| true);
    let memory = dir.join("memory");
    let snapshot = RawSnapshot::open(&dir).unwrap();
    let error = snapshot
        .memory()
        .prove(Verify::Eager, |p| {
            if p.done == p.total {
                // Behind the back of a verifier that has already been here.
                tamper(&memory, b"changed", 0);
            }
            ControlFlow::Continue(())
        })
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.place()),
        (ErrorKind::Changed, Place::Memory)
    );

    let snapshot = RawSnapshot::open(&dir).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&memory)
        .unwrap()
        .set_len(PAGE)
        .unwrap();
    let error = snapshot.memory().read_chunk(5, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed);
}

#[test]
fn verification_can_be_stopped() {
    let store = tempfile::tempdir().unwrap();
    for (chunk, len) in [(4096, 12 * PAGE), (1 << 20, 64 << 20)] {
        let dir = write(store.path(), layout(chunk, len), |_| false);
        let snapshot = RawSnapshot::open(&dir).unwrap();
        let mut calls = 0;
        let error = snapshot
            .memory()
            .prove(Verify::Eager, |_| {
                calls += 1;
                ControlFlow::Break(())
            })
            .unwrap_err();
        assert_eq!((error.kind(), calls), (ErrorKind::Cancelled, 1));
        fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn what_is_no_snapshot_is_refused_without_blocking() {
    let store = tempfile::tempdir().unwrap();
    let missing = RawSnapshot::open(&store.path().join("none")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(
        RawSnapshot::open(store.path()).unwrap_err().kind(),
        ErrorKind::NotFound
    );

    let good = write(store.path(), layout(4096, 4 * PAGE), |_| true);
    for file in ["manifest", "memory"] {
        let place = if file == "manifest" {
            Place::Manifest
        } else {
            Place::Memory
        };
        let bad = store.path().join("bad");
        type Make = fn(&Path, &Path);
        let makes: [Make; 4] = [
            |good, bad| symlink(good, bad).unwrap(),
            |_, bad| fs::create_dir(bad).unwrap(),
            |_, bad| symlink("/dev/zero", bad).unwrap(),
            |_, bad| {
                let status = std::process::Command::new("mkfifo").arg(bad).status();
                assert!(status.unwrap().success());
            },
        ];
        for make in makes {
            fs::create_dir(&bad).unwrap();
            for other in ["manifest", "memory"].iter().filter(|o| **o != file) {
                fs::copy(good.join(other), bad.join(other)).unwrap();
            }
            make(&good.join(file), &bad.join(file));
            let error = RawSnapshot::open(&bad).unwrap_err();
            assert_eq!((error.kind(), error.place()), (ErrorKind::Malformed, place));
            fs::remove_dir_all(&bad).unwrap();
        }
    }
}

#[test]
fn lengths_of_files_are_checked() {
    let store = tempfile::tempdir().unwrap();
    let dir = write(store.path(), layout(4096, 4 * PAGE), |_| true);
    let memory = fs::OpenOptions::new()
        .write(true)
        .open(dir.join("memory"))
        .unwrap();
    for len in [0, PAGE, 4 * PAGE - 1, 4 * PAGE + 1] {
        memory.set_len(len).unwrap();
        let error = RawSnapshot::open(&dir).unwrap_err();
        assert_eq!(
            (error.kind(), error.place()),
            (ErrorKind::Length, Place::Memory)
        );
    }
    let manifest = fs::OpenOptions::new()
        .write(true)
        .open(dir.join("manifest"))
        .unwrap();
    let len = manifest.metadata().unwrap().len();
    manifest.set_len(len + 1).unwrap();
    let error = read_requirements(&dir).unwrap_err();
    assert_eq!(
        (error.kind(), error.place()),
        (ErrorKind::Length, Place::Manifest)
    );
    // Sparse and huge: refused by its size, not read.
    manifest.set_len(1 << 40).unwrap();
    let error = RawSnapshot::open(&dir).unwrap_err();
    assert_eq!(
        (error.kind(), error.place()),
        (ErrorKind::Malformed, Place::Manifest)
    );
    manifest.set_len(100).unwrap();
    let error = read_header(&dir).unwrap_err();
    assert_eq!(
        (error.kind(), error.place()),
        (ErrorKind::Length, Place::Header("reserved"))
    );
    manifest.set_len(0).unwrap();
    assert_eq!(
        read_header(&dir).unwrap_err().kind(),
        ErrorKind::NotASnapshot
    );
}

#[test]
fn requirements_are_readable_when_the_rest_is_not() {
    let store = tempfile::tempdir().unwrap();
    let dir = write(store.path(), layout(4096, 4 * PAGE), |_| true);
    let manifest = dir.join("manifest");
    let len = fs::metadata(&manifest).unwrap().len();
    tamper(&manifest, b"damaged trailer", len - 20);
    read_requirements(&dir).unwrap();
    assert_eq!(RawSnapshot::open(&dir).unwrap_err().place(), Place::Trailer);
    // The requirements themselves: behind the header and five table entries.
    tamper(&manifest, &[0xff], 128 + 5 * 32);
    let error = read_requirements(&dir).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
    assert_eq!(error.place().to_string(), "section REQS/0");
}

#[test]
fn an_id_is_published_once() {
    let store = tempfile::tempdir().unwrap();
    let mut late = SnapshotWriter::create(store.path(), id()).unwrap();
    let memory = late.memory_image(layout(4096, PAGE)).unwrap();
    memory.zero_chunk(0).unwrap();
    let first = write(store.path(), layout(4096, 2 * PAGE), |_| true);

    let error = late
        .publish(memory.finish().unwrap(), content(vec![]))
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.place()),
        (ErrorKind::Exists, Place::Directory)
    );
    assert_eq!(
        SnapshotWriter::create(store.path(), id())
            .unwrap_err()
            .kind(),
        ErrorKind::Exists
    );
    assert_eq!(names(store.path()), [id().to_string()]);
    let snapshot = RawSnapshot::open(&first).unwrap();
    assert_eq!(
        snapshot.manifest().memory_map().layout().image_len(),
        2 * PAGE
    );
}

#[test]
fn misuse_of_the_writer_is_told_and_leaves_nothing() {
    let store = tempfile::tempdir().unwrap();
    let kind = |result: Result<(), Error>| result.unwrap_err().kind();
    let mut writer = SnapshotWriter::create(store.path(), id()).unwrap();
    let memory = writer.memory_image(layout(8192, 20_480)).unwrap();
    assert_eq!(
        writer.memory_image(layout(4096, PAGE)).unwrap_err().kind(),
        ErrorKind::Misuse
    );
    memory.write_chunk(0, &[1; 8192]).unwrap();
    assert_eq!(kind(memory.write_chunk(0, &[1; 8192])), ErrorKind::Misuse);
    assert_eq!(kind(memory.zero_chunk(0)), ErrorKind::Misuse);
    assert_eq!(kind(memory.write_chunk(3, &[1; 4096])), ErrorKind::Misuse);
    assert_eq!(kind(memory.write_chunk(2, &[1; 8192])), ErrorKind::Misuse);
    let error = memory.finish().unwrap_err();
    assert!(
        matches!(error.place(), Place::Chunk { index: 1, .. }),
        "{error}"
    );

    let mut other = SnapshotWriter::create(store.path(), SnapshotId::from_bytes([7; 16])).unwrap();
    let foreign = other.memory_image(layout(4096, PAGE)).unwrap();
    foreign.zero_chunk(0).unwrap();
    let foreign = foreign.finish().unwrap();
    let error = writer.publish(foreign, content(vec![])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misuse);
    drop(other);
    assert_eq!(names(store.path()), [""; 0]);
}

#[test]
fn content_that_a_reader_would_refuse_is_not_published() {
    let store = tempfile::tempdir().unwrap();
    let mut writer = SnapshotWriter::create(store.path(), id()).unwrap();
    let memory = writer.memory_image(layout(4096, PAGE)).unwrap();
    memory.zero_chunk(0).unwrap();
    let mut bad = content(vec![]);
    bad.metadata.name = Some(String::new());
    let error = writer.publish(memory.finish().unwrap(), bad).unwrap_err();
    assert_eq!(error.place().to_string(), "section META/0");
    assert_eq!(names(store.path()), [""; 0]);
}

#[test]
fn clean_up_takes_only_what_dead_writers_left() {
    let store = tempfile::tempdir().unwrap();
    write(store.path(), layout(4096, PAGE), |_| true);
    let mut alive = SnapshotWriter::create(store.path(), SnapshotId::from_bytes([1; 16])).unwrap();
    let memory = alive.memory_image(layout(4096, PAGE)).unwrap();
    memory.zero_chunk(0).unwrap();

    let dead = format!(".{}.partial-0123abcd", SnapshotId::from_bytes([2; 16]));
    fs::create_dir(store.path().join(&dead)).unwrap();
    fs::write(store.path().join(&dead).join("memory"), "half").unwrap();
    let strange = format!(".{}.partial-00000000", SnapshotId::from_bytes([3; 16]));
    fs::create_dir(store.path().join(&strange)).unwrap();
    fs::write(store.path().join(&strange).join("somebody's"), "own").unwrap();
    // Not ours: a link, a file, other names.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("memory"), "precious").unwrap();
    let link = format!(".{}.partial-00000001", SnapshotId::from_bytes([3; 16]));
    symlink(outside.path(), store.path().join(&link)).unwrap();
    for other in [".snap-x.partial-00000000", ".config", "other"] {
        fs::create_dir(store.path().join(other)).unwrap();
    }
    let before = names(store.path());

    let report = clean_partial(store.path()).unwrap();
    assert_eq!(report.removed, std::slice::from_ref(&dead));
    assert_eq!(report.in_use.len(), 1);
    let failed: Vec<_> = report.failed.iter().map(|(name, _)| name).collect();
    assert_eq!(failed, [&strange]);
    let expected: Vec<_> = before.into_iter().filter(|n| *n != dead).collect();
    assert_eq!(names(store.path()), expected);
    assert_eq!(names(outside.path()), ["memory"]);

    // The living one was not disturbed.
    let dir = alive
        .publish(memory.finish().unwrap(), content(vec![]))
        .unwrap();
    RawSnapshot::open(&dir).unwrap();
    assert_eq!(clean_partial(store.path()).unwrap().in_use, [""; 0]);
}
