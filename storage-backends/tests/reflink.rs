//! The reflink backend.

mod support;

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::{ErrorKind, copy, reflink};
use support::{FileSystem, Mounted, entries};

fn conforms(file_system: FileSystem) {
    let Some(mounted) = Mounted::new(file_system, 1024) else {
        return;
    };
    let report = conformance::run(&reflink::open, &mounted.path(), &Options::default());
    assert!(report.passed(), "{report}");
}

#[test]
fn conforms_on_btrfs() {
    let _alone = support::alone();
    conforms(FileSystem::Btrfs);
}

#[test]
fn conforms_on_xfs() {
    let _alone = support::alone();
    conforms(FileSystem::Xfs);
}

/// A copy on a file system that could share blocks is a copy all the same: the suite's case on
/// capabilities measures it.
#[test]
fn copy_shares_nothing_where_it_could() {
    let _alone = support::alone();
    for file_system in [FileSystem::Btrfs, FileSystem::Xfs] {
        let Some(mounted) = Mounted::new(file_system, 1024) else {
            return;
        };
        let mut options = Options::default();
        options.operations = 300;
        let report = conformance::run(&copy::open, &mounted.path(), &options);
        assert!(report.passed(), "{report}");
    }
}

fn refusal(dir: &std::path::Path) -> String {
    let error = reflink::open(&dir.join("store")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(entries(dir), [] as [&str; 0], "a refusal leaves nothing");
    std::error::Error::source(&error).unwrap().to_string()
}

#[test]
fn is_refused_by_name_where_files_cannot_be_cloned() {
    let _alone = support::alone();
    if let Ok(dir) = tempfile::tempdir_in("/dev/shm") {
        let text = refusal(dir.path());
        assert!(text.contains("tmpfs") && text.contains("qcow2"), "{text}");
    }
    if let Some(mounted) = Mounted::new(FileSystem::Ext4, 64) {
        std::fs::remove_dir(mounted.path().join("lost+found")).unwrap();
        let text = refusal(&mounted.path());
        assert!(
            text.contains("ext4") && text.contains("btrfs or XFS"),
            "{text}"
        );
    }
    if let Some(mounted) = Mounted::new(FileSystem::XfsWithoutReflink, 512) {
        let text = refusal(&mounted.path());
        assert!(text.contains("reflink=1"), "{text}");
    }
}
