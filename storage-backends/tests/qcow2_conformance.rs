//! The conformance suite, for each qcow2 engine of this build.
//!
//! In a program of its own: a process that is started keeps the locks of all that is open until its
//! exec, and tests with `qemu-img` start some.

#![cfg(any(feature = "imago", feature = "qcow2-rs"))]

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::open_backend;
use offshoot_storage::qcow2::EngineKind;

fn conforms(engine: EngineKind) {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let kind = format!("qcow2:{engine}");
    let open = |path: &std::path::Path| open_backend(&kind, path);
    let report = conformance::run(&open, dir.path(), &Options::default());
    assert!(report.passed(), "{report}");
}

#[cfg(feature = "imago")]
#[test]
fn imago() {
    conforms(EngineKind::Imago);
}

#[cfg(feature = "qcow2-rs")]
#[test]
fn qcow2_rs() {
    conforms(EngineKind::Qcow2Rs);
}
