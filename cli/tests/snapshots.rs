//! `offshoot inspect` and `offshoot verify` on frozen and on damaged snapshots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn golden(what: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../snapshot-format/tests/golden/format-1")
        .join(what)
}

fn offshoot(arguments: &[&str], snapshot: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_offshoot"))
        .args(arguments)
        .arg(snapshot)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert_eq!(error, "");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a command that failed says: a sentence, and each cause on a line of its own, here joined by colons.
fn sentence(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout, b"");
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    error.trim_end().replace("\n  because: ", ": ")
}

/// A copy of the full golden, to be damaged.
fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["manifest", "memory"] {
        fs::copy(golden("full").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn damage(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn inspect_shows_everything() {
    let text = stdout(&offshoot(&["inspect"], &golden("full")));
    for line in [
        "snap-01jd81w000cxqprs35drppyvk5",
        "  made      2024-11-21T21:57:56.123Z",
        "  name      after apt install, größer",
        "  label     env=test ✓",
        "  CPU       x86-64 of GenuineIntel, shown as x86-64-v2",
        "  CPUID     0x1.0x0 ECX 0x00982203",
        "  TSC       2100000 kHz, exactly",
        "  KVM       KVM_CAP_XSAVE2 (208) of at least 2696",
        "  device    vsock, a virtio-vsock",
        "memory of 20480 bytes, in 3 chunks of up to 8192 bytes, 1 of them zero",
        "  region    0x000100000000, 8192 bytes, at 12288 of the image",
        "  vdb: layer tools_1.2 of backend copy, 512 bytes, read-only",
        "  zzz!/4294967295 version 65535, optional, 16 bytes at 3776, CRC-32C f3d844a4",
    ] {
        assert!(
            text.lines().any(|l| l == line),
            "{line:?} is not in\n{text}"
        );
    }
    assert!(!text.contains("  chunk"));
    let text = stdout(&offshoot(&["inspect", "--digests"], &golden("full")));
    assert!(text.contains("  chunk     1 zero\n"), "{text}");
    assert!(text.contains("  chunk     0 8df16d2b30fe6811"), "{text}");
    stdout(&offshoot(&["inspect"], &golden("minimal")));
}

#[test]
fn inspect_prints_json() {
    let text = stdout(&offshoot(&["inspect", "--json"], &golden("full")));
    let view: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(view["header"]["id"], "snap-01jd81w000cxqprs35drppyvk5");
    assert_eq!(view["header"]["created"], "2024-11-21T21:57:56.123Z");
    assert_eq!(view["header"]["format_version"], 1);
    assert_eq!(view["metadata"]["labels"]["env"], "test ✓");
    assert_eq!(view["requirements"]["devices"][0]["model"], "virtio-blk");
    assert_eq!(view["memory"]["regions"][1]["guest_start"], 1u64 << 32);
    assert_eq!(view["memory"]["digests"][1], serde_json::Value::Null);
    assert_eq!(view["disks"][0]["layer"], "layer-17");
    assert_eq!(view["sections"][4]["kind"], "VCPU");
    assert_eq!(view["sections"].as_array().unwrap().len(), 8);
}

#[test]
fn inspect_does_not_need_the_memory_image() {
    let dir = copy();
    fs::remove_file(dir.path().join("memory")).unwrap();
    stdout(&offshoot(&["inspect"], dir.path()));
    let error = sentence(&offshoot(&["verify"], dir.path()));
    assert!(
        error.contains("memory image: cannot open it: No such file"),
        "{error}"
    );
}

#[test]
fn verify_tells_whole_from_damaged() {
    for what in ["full", "minimal"] {
        let text = stdout(&offshoot(&["verify"], &golden(what)));
        assert!(text.contains(" is whole: "), "{text}");
    }
    let text = stdout(&offshoot(&["verify", "--json"], &golden("full")));
    let proven: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(proven["chunks"], 3);
    assert_eq!(proven["zero_chunks"], 1);

    let dir = copy();
    damage(&dir.path().join("memory"), 13_000);
    let error = sentence(&offshoot(&["verify"], dir.path()));
    assert!(
        error.contains("does not verify: memory image, chunk 2 at byte 12288: its bytes"),
        "{error}"
    );
    // Reading the manifest alone does not find it.
    stdout(&offshoot(&["inspect"], dir.path()));
    damage(&dir.path().join("manifest"), 900);
    for command in ["verify", "inspect"] {
        let error = sentence(&offshoot(&[command], dir.path()));
        assert!(error.contains("section VCPU/0: the payload"), "{error}");
    }
}

#[test]
fn a_snapshot_of_a_later_format_is_named_and_refused() {
    let dir = copy();
    let path = dir.path().join("manifest");
    let mut bytes = fs::read(&path).unwrap();
    (bytes[8], bytes[10]) = (4, 4);
    let sum = crc32c::crc32c(&bytes[..124]).to_le_bytes();
    bytes[124..128].copy_from_slice(&sum);
    fs::write(&path, bytes).unwrap();
    let error = sentence(&offshoot(&["inspect"], dir.path()));
    assert!(
        error.contains("snap-01jd81w000cxqprs35drppyvk5, made 2024-11-21"),
        "{error}"
    );
    assert!(
        error.contains("it has format 4 for readers of format 4"),
        "{error}"
    );
}

#[test]
fn what_is_no_snapshot_gets_a_sentence_and_status_1() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["inspect", "verify"] {
        let error = sentence(&offshoot(&[command], dir.path()));
        assert!(error.starts_with("offshoot: "), "{error}");
        assert!(
            error.contains("manifest: cannot open it: No such file"),
            "{error}"
        );
        let error = sentence(&offshoot(&[command], &dir.path().join("a\u{1b}[2Jb")));
        assert!(
            error.contains("snapshot directory: cannot open it"),
            "{error}"
        );
        assert!(!error.contains('\u{1b}'), "{error:?}");
    }
}

#[test]
fn a_command_line_that_is_none_gets_status_2() {
    for arguments in [&["inspect"][..], &["no-such-command", "x"], &[]] {
        let output = Command::new(env!("CARGO_BIN_EXE_offshoot"))
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_offshoot"))
        .args(["inspect", "--json"])
        .arg(golden("full"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}
