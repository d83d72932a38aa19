//! The copy backend.

#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::copy;

/// On whatever file system temporary files are: each copy waits for the disk.
#[test]
fn conforms_on_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = Options::default();
    options.operations = 1000;
    let report = conformance::run(&copy::open, dir.path(), &options);
    assert!(report.passed(), "{report}");
}

/// On tmpfs: no disk to wait for, no ZERO_RANGE.
#[test]
fn conforms_on_tmpfs() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: /dev/shm is not there");
        return;
    };
    let report = conformance::run(&copy::open, dir.path(), &Options::default());
    assert!(report.passed(), "{report}");
}
