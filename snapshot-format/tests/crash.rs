//! No space at any point, and death at any point: there is a whole snapshot or none.
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{content, layout, names, noise, section};
use offshoot_snapshot_format::*;

const CHUNK: usize = 8192;
const CHUNKS: u64 = 8;

fn write(store: &Path, id: SnapshotId) -> Result<PathBuf, Error> {
    let mut writer = SnapshotWriter::create(store, id)?;
    let layout = layout(u32::try_from(CHUNK).unwrap(), CHUNKS * CHUNK as u64);
    let memory = writer.memory_image(layout)?;
    for index in 0..CHUNKS {
        memory.write_chunk(index, &noise(u8::try_from(index).unwrap(), CHUNK))?;
    }
    writer.publish(memory.finish()?, content(vec![section(40_000)]))
}

fn open_and_verify(dir: &Path) {
    let snapshot = RawSnapshot::open(dir).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    snapshot.memory().prove(Verify::Eager, go_on).unwrap();
}

/// A small file system that is unmounted on drop.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn tmpfs(options: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can mount a file system");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        mount(&["-t", "tmpfs", "-o", options, "tmpfs"], dir.path());
        Some(Self(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn mount(arguments: &[&str], at: &Path) {
    let status = Command::new("mount").args(arguments).arg(at).status();
    assert!(status.unwrap().success(), "mount {arguments:?}");
}

#[test]
fn without_space_at_any_point_nothing_is_left() {
    let Some(store) = Mounted::tmpfs("size=4k,mode=700") else {
        return;
    };
    let path = store.0.path();
    let (mut failures, mut pages) = (vec![], 1);
    loop {
        mount(
            &["-o", &format!("remount,size={}k", pages * 4), "tmpfs"],
            path,
        );
        let id = SnapshotId::from_bytes([pages; 16]);
        match write(path, id) {
            Ok(dir) => {
                open_and_verify(&dir);
                break;
            }
            Err(error) => {
                assert_eq!(
                    error.kind(),
                    ErrorKind::StorageFull,
                    "{pages} pages: {error}"
                );
                assert_eq!(names(path), [""; 0], "{pages} pages");
                failures.push(error.place());
            }
        }
        pages += 1;
        assert!(pages < 100, "it must fit some time");
    }
    let chunk = |p: &Place| matches!(p, Place::Chunk { .. });
    assert!(failures.iter().any(chunk), "{failures:?}");
    assert!(failures.contains(&Place::Manifest), "{failures:?}");
}

#[test]
fn without_inodes_at_any_point_nothing_is_left() {
    // One for the root, then the directory, `memory`, `manifest`.
    let places = [Place::Directory, Place::Memory, Place::Manifest];
    for (inodes, place) in (1..).zip(places) {
        let Some(store) = Mounted::tmpfs(&format!("nr_inodes={inodes}")) else {
            return;
        };
        let error = write(store.0.path(), SnapshotId::from_bytes([1; 16])).unwrap_err();
        assert_eq!(
            (error.kind(), error.place()),
            (ErrorKind::StorageFull, place)
        );
        assert_eq!(names(store.0.path()), [""; 0]);
    }
}

/// Not a test by itself: what the next test kills. Writes snapshot after snapshot until then.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(store) = std::env::var_os("OFFSHOOT_TEST_STORE") else {
        return;
    };
    println!("\nwriting");
    loop {
        write(Path::new(&store), SnapshotId::generate().unwrap()).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_whole_snapshots_or_none() {
    let store = tempfile::tempdir().unwrap();
    let (mut published, mut abandoned) = (0, 0);
    for round in 0..24 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "child_that_writes_until_it_is_killed",
                "--exact",
                "--nocapture",
            ])
            .env("OFFSHOOT_TEST_STORE", store.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let started = output.lines().any(|line| line.unwrap() == "writing");
        // Each round dies at another point of the writing.
        std::thread::sleep(Duration::from_micros(round * 1300));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(started);

        let report = clean_partial(store.path()).unwrap();
        abandoned += report.removed.len();
        assert!(
            report.failed.is_empty() && report.in_use.is_empty(),
            "{report:?}"
        );
        for name in names(store.path()) {
            let dir = store.path().join(&name);
            name.parse::<SnapshotId>().unwrap();
            open_and_verify(&dir);
            fs::remove_dir_all(dir).unwrap();
            published += 1;
        }
    }
    // Else the test has not killed what it means to kill.
    assert!(abandoned > 0, "no writer died in the middle of writing");
    assert!(published > 0, "no writer got as far as publishing");
}

#[test]
fn clean_up_beside_busy_writers_disturbs_none() {
    let store = tempfile::tempdir().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let cleaner = scope.spawn(|| {
            let mut removed = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                removed += clean_partial(store.path()).unwrap().removed.len();
            }
            removed
        });
        let writers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..40 {
                        let id = SnapshotId::generate().unwrap();
                        open_and_verify(&write(store.path(), id).unwrap());
                    }
                })
            })
            .collect();
        let written: Vec<_> = writers.into_iter().map(|w| w.join()).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        cleaner.join().unwrap();
        assert!(written.iter().all(Result::is_ok));
    });
    assert_eq!(names(store.path()).len(), 80);
}
