//! The conformance suite, for each engine of this build.

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::open_backend;

use crate::basics::engines;

#[test]
fn every_engine_conforms() {
    for engine in engines() {
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let kind = format!("qcow2:{engine}");
        let open = |path: &std::path::Path| open_backend(&kind, path);
        let report = conformance::run(&open, dir.path(), &Options::default());
        assert!(report.passed(), "{engine}\n{report}");
    }
}
