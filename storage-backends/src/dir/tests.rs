#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;

fn open(path: &Path) -> Result<StoreDir, Error> {
    StoreDir::open(path, "copy", "raw")
}

fn store() -> (tempfile::TempDir, StoreDir) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    (dir, store)
}

#[test]
fn the_marker_must_be_exactly_right() {
    for text in [
        &b""[..],
        b"offshoot-store 1 copy",
        b"offshoot-store 2 copy\n",
        b"offshoot-store 1 \n",
        b"offshoot-store 1 co py\n",
        b"offshoot-store 1 copy\nmore\n",
        b"offshoot-store 1 \xff\n",
        &[b'x'; 1 << 16],
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MARKER), text).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ForeignStore, "{text:?}");
    }
}

#[test]
fn a_marker_that_is_a_link_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("elsewhere");
    std::fs::write(&target, "offshoot-store 1 copy\n").unwrap();
    let store = dir.path().join("store");
    std::fs::create_dir(&store).unwrap();
    symlink(&target, store.join(MARKER)).unwrap();
    open(&store).unwrap_err();
}

#[test]
fn a_directory_with_rooms_and_no_marker_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("layers")).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ForeignStore);
    assert!(!dir.path().join(MARKER).exists());
}

#[test]
fn a_room_that_is_a_link_is_not_entered() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MARKER), "offshoot-store 1 copy\n").unwrap();
    symlink(elsewhere.path(), dir.path().join("volumes")).unwrap();
    open(dir.path()).unwrap_err();
    assert!(elsewhere.path().read_dir().unwrap().next().is_none());
}

#[test]
fn only_regular_files_are_opened() {
    let (dir, store) = store();
    let volumes = dir.path().join("volumes");
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "secret").unwrap();
    symlink(&secret, volumes.join("link.raw")).unwrap();
    std::fs::create_dir(volumes.join("dir.raw")).unwrap();
    let fifo = Command::new("mkfifo")
        .arg(volumes.join("fifo.raw"))
        .status();
    assert!(fifo.unwrap().success());
    let socket = std::os::unix::net::UnixListener::bind(volumes.join("socket.raw")).unwrap();
    for name in ["link", "dir", "fifo", "socket"] {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let e = store
                .open_unlocked(Room::Volumes, name, access)
                .unwrap_err();
            let error = store.error("open", Room::Volumes, name, e);
            assert_eq!(error.kind(), ErrorKind::Damaged, "{name} for {access:?}");
        }
    }
    drop(socket);
    // Opening the store again leaves them alone as well.
    open(dir.path()).unwrap();
    assert_eq!(volumes.read_dir().unwrap().count(), 4);
}

#[test]
fn what_a_dead_process_left_goes_and_what_a_living_one_makes_stays() {
    let (dir, store) = store();
    let volumes = dir.path().join("volumes");
    for leftover in [
        "volumes/.offshoot-new-1-0",
        "layers/.offshoot-new-77-3",
        ".offshoot-new-5-5",
    ] {
        std::fs::write(dir.path().join(leftover), "half").unwrap();
    }
    // Named but never synced before a power cut.
    std::fs::write(volumes.join("never-synced.raw"), "").unwrap();
    std::fs::write(volumes.join("whole.raw"), "whole").unwrap();
    std::fs::write(volumes.join("not-ours.txt"), "").unwrap();
    let living = store.new_file(Room::Volumes).unwrap();
    open(dir.path()).unwrap();
    let mut names: Vec<_> = volumes
        .read_dir()
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [living.name(), "not-ours.txt", "whole.raw"]);
    assert_eq!(dir.path().join("layers").read_dir().unwrap().count(), 0);
    assert!(!dir.path().join(".offshoot-new-5-5").exists());
    living.publish("made.raw").unwrap();
}

#[test]
fn many_openers_make_one_store() {
    let parent = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let dir = parent.path().join(round.to_string());
        std::thread::scope(|scope| {
            let openers: Vec<_> = (0..4)
                .map(|index| {
                    let (dir, kind) = (&dir, ["copy", "qcow2"][index % 2]);
                    scope.spawn(move || (kind, StoreDir::open(dir, kind, "raw").map(drop)))
                })
                .collect();
            let outcomes: Vec<_> = openers.into_iter().map(|t| t.join().unwrap()).collect();
            let owner = owner_of(&dir).unwrap().unwrap();
            for (kind, outcome) in outcomes {
                match outcome {
                    Ok(()) => assert_eq!(kind, owner),
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::ForeignStore, "{e:?}");
                        assert_ne!(kind, owner);
                    }
                }
            }
        });
    }
}
