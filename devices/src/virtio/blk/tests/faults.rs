//! What the host's side does wrong.

use super::*;

fn threads_rig(volume: TestVolume) -> Rig {
    Rig::on(
        volume.arc(),
        EngineChoice::Threads,
        BlkConfig::new("d"),
        ALL,
    )
}

#[test]
fn an_error_of_the_volume_is_an_ioerr_and_passes() {
    let mut rig = threads_rig(TestVolume::new(SECTORS * 512));
    rig.write(0, &pattern(1, 4096));
    rig.volume.fail_changes.store(true, Ordering::SeqCst);
    rig.volume.fail_reads.store(true, Ordering::SeqCst);
    assert_eq!(rig.write(0, &pattern(2, 4096)), IOERR);
    assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, IOERR);
    assert_eq!(rig.ask(T_DISCARD, 0, &segment(0, 8, 0), 0).status, IOERR);
    let zeroes = rig.ask(T_WRITE_ZEROES, 0, &segment(0, 8, 0), 0);
    assert_eq!(zeroes.status, IOERR);
    // 2.7.8.2: what is reported as written was, and it is not what a failed read has left.
    let answer = rig.read(0, 4096);
    assert_eq!((answer.status, answer.used), (IOERR, 4097));
    assert_eq!(answer.data, [0; 4096]);
    rig.volume.fail_changes.store(false, Ordering::SeqCst);
    rig.volume.fail_reads.store(false, Ordering::SeqCst);
    assert_eq!(rig.read(0, 4096).data, pattern(1, 4096));
    assert!(!rig.needs_reset());
}

#[test]
fn a_volume_that_panics_fails_its_request_only() {
    let mut rig = threads_rig(TestVolume::new(SECTORS * 512));
    rig.volume.panics.store(true, Ordering::SeqCst);
    for _ in 0..10 {
        assert_eq!(rig.write(0, &pattern(2, 512)), IOERR);
    }
    rig.volume.panics.store(false, Ordering::SeqCst);
    assert_eq!(rig.write(0, &pattern(2, 512)), OK);
}

#[test]
fn a_file_that_is_shorter_than_its_volume_is_an_ioerr() {
    // The kernel reads what there is, and then nothing.
    let file = tempfile::tempfile().unwrap();
    file.set_len(1000).unwrap();
    let mut volume = TestVolume::new(SECTORS * 512);
    volume.raw_instead = Some(file);
    let mut rig = Rig::on(
        volume.arc(),
        EngineChoice::IoUring,
        BlkConfig::new("d"),
        ALL,
    );
    assert_eq!(rig.read(0, 512).status, OK);
    assert_eq!(rig.read(1, 1024).status, IOERR);
    assert_eq!(rig.read(2, 512).status, IOERR);
    assert_eq!(rig.read(0, 512).status, OK);
}

#[test]
fn a_file_that_refuses_is_an_ioerr() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(SECTORS * 512).unwrap();
    let mut volume = TestVolume::new(SECTORS * 512);
    // Open for reading only: the kernel says EBADF to a write.
    volume.raw_instead = Some(std::fs::File::open(path.path()).unwrap());
    let mut rig = Rig::on(
        volume.arc(),
        EngineChoice::IoUring,
        BlkConfig::new("d"),
        ALL,
    );
    assert_eq!(rig.write(0, &pattern(1, 512)), IOERR);
    assert_eq!(rig.read(0, 512).status, OK);
    assert!(!rig.needs_reset());
}

#[test]
fn a_failed_first_flush_is_tried_again_by_the_volume() {
    let mut rig = Rig::new(EngineChoice::IoUring);
    rig.volume.fail_changes.store(true, Ordering::SeqCst);
    assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, IOERR);
    rig.volume.fail_changes.store(false, Ordering::SeqCst);
    assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, OK);
    assert_eq!(rig.volume.flushes.load(Ordering::SeqCst), 2);
    assert_eq!(rig.ask(T_FLUSH, 0, &[], 0).status, OK);
    assert_eq!(rig.volume.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn the_engine_is_what_was_asked_for_or_an_error() {
    let blk = |raw, engine| {
        let mut volume = TestVolume::new(SECTORS * 512);
        volume.raw = raw;
        let host = BlkHost {
            engine,
            ..BlkHost::new(volume.arc())
        };
        Blk::new(BlkConfig::new("d"), host)
    };
    let engine = |raw, choice| blk(raw, choice).unwrap().engine();
    assert_eq!(engine(true, EngineChoice::Auto), EngineKind::IoUring);
    assert_eq!(engine(true, EngineChoice::IoUring), EngineKind::IoUring);
    assert_eq!(engine(true, EngineChoice::Threads), EngineKind::Threads);
    assert_eq!(engine(false, EngineChoice::Auto), EngineKind::Threads);
    assert_eq!(engine(false, EngineChoice::Threads), EngineKind::Threads);
    let error = blk(false, EngineChoice::IoUring).unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::InvalidConfig);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("volume test is not a raw file"), "{source}");
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let refused = |change: &dyn Fn(&mut BlkConfig, &mut BlkHost)| {
        let mut config = BlkConfig::new("d");
        let mut host = BlkHost::new(TestVolume::new(SECTORS * 512).arc());
        change(&mut config, &mut host);
        let error = Blk::new(config, host).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::InvalidConfig);
        std::error::Error::source(&error).unwrap().to_string()
    };
    refused(&|config, _| config.id = String::new());
    refused(&|config, _| config.id = "../x".into());
    refused(&|config, _| config.id = "x".repeat(65));
    refused(&|config, _| config.queues = 0);
    refused(&|config, _| config.queues = 17);
    refused(&|config, _| config.queue_size = 4);
    refused(&|config, _| config.queue_size = 100);
    refused(&|config, _| config.queue_size = 2048);
    refused(&|_, host| host.threads = 0);
    refused(&|_, host| host.threads = 17);
    let why = refused(&|_, host| {
        let mut volume = TestVolume::new(SECTORS * 512);
        volume.read_only = true;
        host.volume = volume.arc();
    });
    assert!(why.contains("is open for reading only"), "{why}");
}
