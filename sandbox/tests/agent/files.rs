use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::thread;
use std::time::Duration;

use offshoot::ErrorKind;
use offshoot::agent::{EntryKind, User, WriteMode, WriteOptions};

use crate::rig::{Rig, eventually, is_root, skipped, soon, within};

/// Bytes that can be told apart at any place, without holding them.
struct Stream {
    at: u64,
    len: u64,
}

fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9) >> 21) as u8
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = buffer.len().min((self.len - self.at) as usize);
        for slot in &mut buffer[..got] {
            *slot = byte(self.at);
            self.at += 1;
        }
        Ok(got)
    }
}

/// Checks them as they come.
#[derive(Default)]
struct Check(u64);

impl Write for Check {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for got in bytes {
            assert_eq!(*got, byte(self.0), "at {}", self.0);
            self.0 += 1;
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn hundreds_of_megabytes_go_both_ways_in_flat_memory() {
    const LEN: u64 = 256 << 20;
    let rig = Rig::new();
    let path = rig.path("large");
    let mut from = Stream { at: 0, len: LEN };
    let options = WriteOptions::default();
    let deadline = within(120_000);
    assert_eq!(
        rig.agent
            .write_from(&path, &options, &mut from, deadline)
            .unwrap(),
        LEN
    );
    let mut check = Check::default();
    assert_eq!(
        rig.agent
            .read_to(&path, 0, u64::MAX, &mut check, deadline)
            .unwrap(),
        LEN
    );
    assert_eq!(check.0, LEN);
    let peak = rig.kib("VmHWM:");
    println!("peak memory of the agent over 256 MiB both ways: {peak} KiB");
    assert!(peak < 5 << 10, "{peak} KiB");
}

#[test]
fn files_are_written_replaced_appended_and_read_in_pieces() {
    let rig = Rig::new();
    let path = rig.path("file");
    rig.agent
        .write_file(&path, b"first version", soon())
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let before = fs::metadata(&path).unwrap().ino();
    rig.agent.write_file(&path, b"second", soon()).unwrap();
    let about = fs::metadata(&path).unwrap();
    assert_eq!((about.mode() & 0o7777, about.len()), (0o600, 6));
    assert_ne!(about.ino(), before, "replaced, not written into");
    rig.agent.append_file(&path, b" and more", soon()).unwrap();
    rig.agent
        .append_file(rig.path("new"), b"x", soon())
        .unwrap();
    assert_eq!(
        rig.agent.read_file(&path, 100, soon()).unwrap(),
        b"second and more"
    );
    assert_eq!(
        rig.agent.read_file(rig.path("new"), 1, soon()).unwrap(),
        b"x"
    );
    let mut piece = Vec::new();
    assert_eq!(
        rig.agent.read_to(&path, 7, 3, &mut piece, soon()).unwrap(),
        3
    );
    assert_eq!(piece, b"and");
    assert_eq!(
        rig.agent
            .read_to(&path, 1000, 3, &mut piece, soon())
            .unwrap(),
        0
    );
    let error = rig.agent.read_file(&path, 5, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);

    let options = WriteOptions {
        how: WriteMode::CreateNew,
        mode: Some(0o4751),
        owner: is_root().then_some(User::Ids { uid: 7, gid: 8 }),
        sync: true,
    };
    let fresh = rig.path("fresh");
    rig.agent
        .write_from(&fresh, &options, &mut b"1".as_slice(), soon())
        .unwrap();
    let about = fs::metadata(&fresh).unwrap();
    assert_eq!(about.mode() & 0o7777, 0o4751);
    if is_root() {
        assert_eq!((about.uid(), about.gid()), (7, 8));
    }
    let again = rig
        .agent
        .write_from(&fresh, &options, &mut b"2".as_slice(), soon());
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(fs::read(&fresh).unwrap(), b"1");
    assert_eq!(leftovers(&rig), 0);
}

#[test]
fn a_link_is_written_through_and_kept() {
    let rig = Rig::new();
    fs::write(rig.path("real"), "old").unwrap();
    symlink("real", rig.path("link")).unwrap();
    rig.agent
        .write_file(rig.path("link"), b"new", soon())
        .unwrap();
    assert_eq!(fs::read(rig.path("real")).unwrap(), b"new");
    assert!(fs::symlink_metadata(rig.path("link")).unwrap().is_symlink());
    symlink("loop", rig.path("loop")).unwrap();
    let error = rig
        .agent
        .write_file(rig.path("loop"), b"", soon())
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.os_error()),
        (ErrorKind::Guest, Some(40))
    );
}

/// Names that only the agent gives.
fn leftovers(rig: &Rig) -> usize {
    let names = fs::read_dir(rig.dir.path()).unwrap();
    names
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().starts_with(".offshoot")
        })
        .count()
}

/// A source that never ends.
struct Endless;

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        buffer.fill(b'n');
        Ok(buffer.len())
    }
}

#[test]
fn a_file_is_whole_or_as_it_was_whoever_dies() {
    let mut rig = Rig::new();
    let path = rig.path("state");
    fs::write(&path, "old and whole").unwrap();
    // The host gives up in the middle.
    let options = WriteOptions::default();
    let error = rig
        .agent
        .write_from(&path, &options, &mut Endless, within(300))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(fs::read(&path).unwrap(), b"old and whole");
    // The agent is killed in the middle.
    let writer = thread::spawn({
        let (agent, path) = (rig.agent.clone(), path.clone());
        move || agent.write_from(&path, &WriteOptions::default(), &mut Endless, soon())
    });
    let io = format!("/proc/{}/io", rig.process.id());
    if fs::read_to_string(&io).is_ok() {
        let written = || {
            let text = fs::read_to_string(&io).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("wchar: "));
            line.unwrap().parse::<u64>().unwrap()
        };
        let before = written();
        eventually("megabytes were written", || written() > before + (4 << 20));
    } else {
        thread::sleep(Duration::from_millis(300));
    }
    rig.process.kill().unwrap();
    rig.process.wait().unwrap();
    assert_eq!(
        writer.join().unwrap().unwrap_err().kind(),
        ErrorKind::Disconnected
    );
    assert_eq!(fs::read(&path).unwrap(), b"old and whole");
    assert_eq!(
        leftovers(&rig),
        0,
        "a file without a name goes with its process"
    );
}

#[test]
fn a_full_disk_ends_a_write_early_and_leaves_the_old_file() {
    if !is_root() {
        return skipped("a full disk (not root)");
    }
    let rig = Rig::start(|listen| {
        // A small disk of its own, in a mount namespace.
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c"]);
        command.arg("mount -t tmpfs -o size=8m none /mnt && exec \"$0\" --listen \"$1\"");
        command.args([crate::rig::program().as_os_str(), listen.as_ref()]);
        command
    });
    rig.agent.write_file("/mnt/file", b"old", soon()).unwrap();
    let options = WriteOptions::default();
    let error = rig
        .agent
        .write_from("/mnt/file", &options, &mut Endless, soon())
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.os_error()),
        (ErrorKind::Guest, Some(28))
    );
    assert_eq!(
        rig.agent.read_file("/mnt/file", 10, soon()).unwrap(),
        b"old"
    );
    let metrics = rig.agent.metrics(&["/mnt"], soon()).unwrap();
    assert_eq!(metrics.disks[0].size, 8 << 20);
    assert!(metrics.disks[0].available > 7 << 20, "the new file is gone");
}

#[test]
fn directories_are_made_listed_renamed_and_removed() {
    let rig = Rig::new();
    let dir = rig.path("a/b/c");
    assert_eq!(
        rig.agent
            .make_dir(&dir, false, 0o755, soon())
            .unwrap_err()
            .kind(),
        ErrorKind::NotFound
    );
    rig.agent.make_dir(&dir, true, 0o750, soon()).unwrap();
    rig.agent.make_dir(&dir, true, 0o750, soon()).unwrap();
    assert_eq!(
        rig.agent
            .make_dir(&dir, false, 0o750, soon())
            .unwrap_err()
            .kind(),
        ErrorKind::Exists
    );
    assert!(rig.agent.list(&dir, soon()).unwrap().is_empty());
    for n in 0..5000 {
        fs::write(dir.join(format!("file-{n:05}-{}", "x".repeat(100))), "").unwrap();
    }
    fs::write(dir.join("f"), "12345").unwrap();
    symlink("/to/where", dir.join("l")).unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    let entries = rig.agent.list(&dir, soon()).unwrap();
    assert_eq!(entries.len(), 5003);
    let by_name: BTreeMap<_, _> = entries.iter().map(|e| (e.name.as_slice(), e)).collect();
    assert_eq!(by_name.len(), 5003);
    let f = by_name[b"f".as_slice()];
    assert_eq!((f.kind, f.size), (EntryKind::File, 5));
    let real = fs::metadata(dir.join("f")).unwrap();
    assert_eq!(
        f.modified_unix_ns,
        real.mtime() as u64 * 1_000_000_000 + real.mtime_nsec() as u64
    );
    let l = by_name[b"l".as_slice()];
    assert_eq!(
        (l.kind, l.target.as_slice()),
        (EntryKind::Symlink, b"/to/where".as_slice())
    );
    assert_eq!(by_name[b"d".as_slice()].kind, EntryKind::Directory);

    let stat = rig.agent.stat(dir.join("l"), false, soon()).unwrap();
    assert_eq!(
        (stat.name.as_slice(), stat.kind),
        (b"l".as_slice(), EntryKind::Symlink)
    );
    let error = rig.agent.stat(dir.join("l"), true, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);

    rig.agent
        .rename(dir.join("f"), rig.path("moved"), soon())
        .unwrap();
    assert_eq!(fs::read(rig.path("moved")).unwrap(), b"12345");
    let error = rig.agent.remove(&dir, false, soon()).unwrap_err();
    assert_eq!(error.os_error(), Some(39), "not empty");
    rig.agent.remove(rig.path("a"), true, soon()).unwrap();
    rig.agent.remove(rig.path("moved"), false, soon()).unwrap();
    assert!(!rig.path("a").exists() && !rig.path("moved").exists());
    let error = rig.agent.remove(rig.path("a"), true, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_removal_does_not_follow_links_and_copes_with_any_depth() {
    let rig = Rig::new();
    let kept = rig.path("kept");
    fs::create_dir(&kept).unwrap();
    fs::write(kept.join("precious"), "").unwrap();
    let tree = rig.path("tree");
    fs::create_dir(&tree).unwrap();
    symlink(&kept, tree.join("link")).unwrap();
    // Deeper than a path can be long, by a walk of its own.
    let script = "cd \"$0\"; i=0; while [ $i -lt 600 ]; do \
                  mkdir dddddddd; : > f; cd -P dddddddd; i=$((i+1)); done 2>/dev/null; true";
    let command = offshoot::agent::Command::new([
        b"/bin/bash".to_vec(),
        b"-c".to_vec(),
        script.into(),
        tree.to_str().unwrap().into(),
    ]);
    rig.agent.run(&command, b"", 1 << 20, soon()).unwrap();
    rig.agent.remove(&tree, true, soon()).unwrap();
    assert!(!tree.exists());
    assert!(kept.join("precious").exists());
}

#[test]
fn what_is_no_file_is_not_read_or_appended_to() {
    let rig = Rig::new();
    let pipe = rig.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert_eq!(
        rig.agent.read_file(&pipe, 1, soon()).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    assert!(rig.agent.append_file(&pipe, b"x", soon()).is_err());
    let error = rig.agent.read_file(rig.dir.path(), 1, soon()).unwrap_err();
    assert_eq!(error.os_error(), Some(21));
    let error = rig
        .agent
        .write_file(rig.dir.path(), b"x", soon())
        .unwrap_err();
    assert_eq!(error.os_error(), Some(21));
    for missing in ["none", "none/deeper"] {
        let error = rig
            .agent
            .read_file(rig.path(missing), 1, soon())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    let error = rig.agent.read_file("a\0b", 1, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    // Files of /proc have no size, and content all the same.
    let version = rig.agent.read_file("/proc/version", 4096, soon()).unwrap();
    assert!(version.starts_with(b"Linux"));
}
