//! Hosts that do not let us have io_uring: a filter on one thread, inherited by those it starts.

use super::*;

/// Runs `test` on a thread for which `syscall` fails with EPERM.
fn without(syscall: libc::c_long, test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        deny(u32::try_from(syscall).unwrap());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn deny(syscall: u32) {
    let op = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let ret = libc::BPF_RET | libc::BPF_K;
    let eperm = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    // The number of the call is the first word of what a filter sees.
    let mut filter = [
        op(load, 0, 0, 0),
        op(equal, 0, 1, syscall),
        op(ret, 0, 0, eperm),
        op(ret, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: both calls change the calling thread only; the program lives through the second one.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program),
            0
        );
    }
}

#[test]
fn without_io_uring_auto_takes_threads_and_says_so() {
    without(libc::SYS_io_uring_setup, || {
        let mut rig = Rig::new(EngineChoice::Auto);
        assert_eq!(rig.blk.lock().unwrap().engine(), EngineKind::Threads);
        assert_eq!(rig.write(0, &pattern(1, 512)), OK);
    });
}

#[test]
fn without_io_uring_asking_for_it_is_an_error() {
    without(libc::SYS_io_uring_setup, || {
        let host = BlkHost {
            engine: EngineChoice::IoUring,
            ..BlkHost::new(TestVolume::new(SECTORS * 512).arc())
        };
        let error = Blk::new(BlkConfig::new("d"), host).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Io);
        let source = std::error::Error::source(&error).unwrap();
        let cause = source.source().unwrap().to_string();
        assert!(source.to_string().contains("io_uring cannot be used"));
        assert!(cause.contains("not permitted"), "{cause}");
    });
}

#[test]
fn a_ring_that_is_taken_away_later_fails_its_requests() {
    // The ring can be made but not entered.
    without(libc::SYS_io_uring_enter, || {
        let mut rig = Rig::new(EngineChoice::IoUring);
        for sector in 0..10 {
            assert_eq!(rig.write(sector, &pattern(1, 512)), IOERR);
        }
        assert_eq!(rig.read(0, 512).status, IOERR);
        // What the volume itself does goes on.
        assert_eq!(rig.ask(T_DISCARD, 0, &segment(0, 8, 0), 0).status, OK);
        assert!(!rig.needs_reset());
        let states = rig.blk.lock().unwrap().quiesce().unwrap();
        assert_eq!(states[0].next_used, 12);
        rig.blk.lock().unwrap().resume().unwrap();
        assert_eq!(rig.driver.negotiate(ALL) & 1, 0);
    });
}
