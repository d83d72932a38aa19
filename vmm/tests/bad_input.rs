//! What a machine is given and cannot use: one clear sentence with its cause, and nothing left behind.

mod support;

use std::borrow::Cow;
use std::error::Error as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use offshoot_pilot::protocol::Request;
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{Access, ErrorKind as StorageErrorKind, VolumeName};
use offshoot_vmm::boot::Image;
use offshoot_vmm::{
    DriveBinding, Error, ErrorKind, Host, Machine, NetHost, NetPeer, SaveOptions, Template,
    VsockHost,
};

use support::{Console, Place, client, config, host};

/// The error of an attempt that must fail.
fn refused(attempt: Result<Machine, Error>) -> Error {
    match attempt {
        Ok(machine) => panic!("{machine:?} was made"),
        Err(error) => error,
    }
}

/// The sentence and its causes in one line.
fn whole(error: &Error) -> String {
    format!("{error:?}")
}

/// No socket, no volume but those named.
fn nothing_left(place: &Place, volumes: &[&str]) {
    let left: Vec<_> = std::fs::read_dir(place.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != "disks")
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let there: Vec<String> = place
        .backend
        .volumes()
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(there, volumes);
    // Whoever failed has let go of the disk.
    for volume in volumes {
        let name = VolumeName::new(*volume).unwrap();
        place.backend.open(&name, Access::ReadWrite).unwrap();
    }
}

fn boot_with_kernel(host: &Arc<Host>, place: &Place, kernel: Image) -> Error {
    let mut config = config(64, 1);
    config.boot.kernel = kernel;
    let name = VolumeName::new("disk").unwrap();
    let volume = match place.backend.open(&name, Access::ReadWrite) {
        Ok(volume) => volume,
        Err(_) => place.backend.create(&name, support::DISK).unwrap(),
    };
    let drive = DriveBinding::volume(Arc::clone(&place.backend), volume);
    refused(Machine::boot(host, &config, place.bindings("s", drive)))
}

#[test]
fn a_kernel_that_is_none() {
    let Some(host) = host() else { return };
    let place = Place::new();
    let cut = &offshoot_pilot::PILOT_ELF[..4096];
    let kernels: [(&str, &'static [u8]); 4] = [
        ("nothing", b""),
        ("text", b"#!/bin/sh\necho I am no kernel\n"),
        ("an ELF header alone", &offshoot_pilot::PILOT_ELF[..64]),
        ("a kernel that was cut off", cut),
    ];
    for (what, bytes) in kernels {
        let error = boot_with_kernel(&host, &place, Image::Bytes(Cow::Borrowed(bytes)));
        assert_eq!(error.kind(), ErrorKind::Boot, "{what}: {error:?}");
        assert_eq!(error.to_string(), "cannot boot the kernel", "{what}");
        assert!(error.source().is_some(), "{what} has a cause");
        nothing_left(&place, &["disk"]);
    }
}

#[test]
fn a_disk_that_is_missing_or_somebody_elses() {
    let Some(host) = host() else { return };
    let place = Place::new();
    let error = place
        .backend
        .open(&VolumeName::new("nowhere").unwrap(), Access::ReadWrite)
        .unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::NotFound);
    assert!(error.to_string().contains("nowhere"), "{error}");

    // Without a disk at all, and with everything else too much or too little: all is listed.
    let mut bindings = place.bindings("s", place.drive("disk", None));
    bindings.drives.clear();
    bindings.nets.clear();
    let other = place.drive("other", None);
    let bindings = bindings.with_drive("other", other);
    let error = refused(Machine::boot(&host, &config(64, 1), bindings));
    assert_eq!(error.kind(), ErrorKind::Bindings);
    let text = whole(&error);
    for part in [
        "drive disk has no volume",
        "no drive other",
        "net has no peer",
    ] {
        assert!(text.contains(part), "{text}");
    }
    nothing_left(&place, &["disk", "other"]);
}

#[test]
fn two_machines_on_one_writable_disk() {
    let Some(host) = host() else { return };
    let place = Place::new();
    let console = Console::default();
    let bindings = place
        .bindings("first", place.drive("disk", None))
        .with_serial(console.clone());
    let machine = Machine::boot(&host, &config(64, 1), bindings).unwrap();
    let running = machine.start().unwrap();
    let name = VolumeName::new("disk").unwrap();
    // Through this store and through another opening of the same directory.
    let again = offshoot_storage::open_backend("copy", &place.dir.path().join("disks")).unwrap();
    for backend in [&place.backend, &again] {
        let error = backend.open(&name, Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::InUse);
        assert!(error.to_string().contains("disk"), "{error}");
        assert_eq!(
            backend.delete(&name).unwrap_err().kind(),
            StorageErrorKind::InUse
        );
    }
    // The first one runs on.
    client(&running, &place.socket("first"), &console)
        .state()
        .unwrap();
    running.stop().wait();
    nothing_left(&place, &["disk"]);
}

#[test]
fn network_peers_that_are_not_there() {
    let Some(host) = host() else { return };
    let place = Place::new();
    let mut drive = place.drive("disk", None);
    for (peer, part) in [
        (
            NetPeer::Tap("offshoot-none".into()),
            "no tap interface \"offshoot-none\"",
        ),
        (
            NetPeer::Tap("a name much too long".into()),
            "cannot be the name of an interface",
        ),
        (NetPeer::Tap("lo".into()), "not a tap interface"),
        (
            NetPeer::Socket(place.socket("nobody")),
            "cannot connect to the network socket",
        ),
    ] {
        let bindings = place
            .bindings("s", drive)
            .with_net("net", NetHost::to(peer));
        let error = refused(Machine::boot(&host, &config(64, 1), bindings));
        let text = whole(&error);
        // Opening /dev/net/tun itself may be forbidden here: that is told, too.
        assert!(
            text.contains(part) || text.contains("/dev/net/tun"),
            "{text}"
        );
        assert!(text.contains("device net"), "{text}");
        nothing_left(&place, &["disk"]);
        let name = VolumeName::new("disk").unwrap();
        let volume = place.backend.open(&name, Access::ReadWrite).unwrap();
        drive = DriveBinding::volume(Arc::clone(&place.backend), volume);
    }
}

#[test]
fn vsock_paths_that_cannot_be() {
    let Some(host) = host() else { return };
    let place = Place::new();
    let taken = place.socket("taken");
    let listener = UnixListener::bind(&taken).unwrap();
    let file = place.socket("file");
    std::fs::write(&file, "not a socket").unwrap();
    let long = place.socket(&"x".repeat(120));
    for (path, part) in [
        (&taken, "in use by a running process"),
        (&file, "is not a socket"),
        (&long, "too long"),
        (&place.socket("no/such/directory"), "vsock"),
    ] {
        let name = VolumeName::new("disk").unwrap();
        let drive = match place.backend.open(&name, Access::ReadWrite) {
            Ok(volume) => DriveBinding::volume(Arc::clone(&place.backend), volume),
            Err(_) => place.drive("disk", None),
        };
        let bindings = place
            .bindings("s", drive)
            .with_vsock("vsock", VsockHost::at(path));
        let error = refused(Machine::boot(&host, &config(64, 1), bindings));
        let text = whole(&error);
        assert!(text.contains(part), "{path:?}: {text}");
    }
    // What was there is there still.
    assert_eq!(std::fs::read(&file).unwrap(), b"not a socket");
    drop(listener);
    std::fs::remove_file(&taken).unwrap();
    std::fs::remove_file(&file).unwrap();
    nothing_left(&place, &["disk"]);
}

/// A tmpfs of a few MiB, mounted until this is dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(mib: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(dir.path());
        if mount.output().is_ok_and(|output| output.status.success()) {
            Some(Self(dir))
        } else {
            support::skipped("a full disk: no tmpfs can be mounted here");
            None
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.path())
            .status();
    }
}

#[test]
fn a_store_without_space() {
    let Some(host) = host() else { return };
    let Some(small) = SmallDisk::new(4) else {
        return;
    };
    let place = Place::new();
    let console = Console::default();
    let bindings = place
        .bindings("source", place.drive("disk", None))
        .with_serial(console.clone());
    let machine = Machine::boot(&host, &config(64, 1), bindings).unwrap();
    let mut running = machine.start().unwrap();
    let mut pilot = client(&running, &place.socket("source"), &console);
    // More than fits.
    let fill = Request::Fill {
        offset: 0,
        len: 16 << 20,
        seed: 1,
    };
    assert_eq!(pilot.work(&fill).unwrap().bad, 0);

    let paused = running.pause().unwrap();
    let error = paused
        .save(small.path(), SaveOptions::new().unwrap())
        .unwrap_err();
    paused.resume().unwrap();
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error:?}");
    assert!(whole(&error).contains("No space left"), "{error:?}");
    // No half-made snapshot, no layer; the guest goes on over the same connection.
    assert!(std::fs::read_dir(small.path()).unwrap().next().is_none());
    assert!(place.backend.layers().unwrap().is_empty());
    let verify = Request::Verify {
        offset: 0,
        len: 16 << 20,
        seed: 1,
    };
    assert_eq!(pilot.work(&verify).unwrap().bad, 0);

    // With space it works, and a snapshot that then loses bytes is refused.
    let store = place.dir.path().join("snapshots");
    std::fs::create_dir(&store).unwrap();
    let paused = running.pause().unwrap();
    let saved = paused.save(&store, SaveOptions::new().unwrap()).unwrap();
    drop(paused);
    for entry in std::fs::read_dir(&saved.path).unwrap() {
        let path = entry.unwrap().path();
        let whole_file = std::fs::read(&path).unwrap();
        let file = std::fs::File::options().write(true).open(&path);
        let file = match file {
            Ok(file) => file,
            Err(error) => panic!("{path:?}: {error}"),
        };
        file.set_len(whole_file.len() as u64 / 2).unwrap();
        let loaded = RawSnapshot::open(&saved.path)
            .map_err(|e| e.to_string())
            .and_then(|raw| Template::load(&host, &raw, Verify::Eager).map_err(|e| whole(&e)));
        let error = loaded.expect_err("half a file is not a snapshot");
        assert!(!error.is_empty());
        std::fs::write(&path, &whole_file).unwrap();
    }
    let raw = RawSnapshot::open(&saved.path).unwrap();
    Template::load(&host, &raw, Verify::Eager).unwrap();
    running.stop().wait();
}
