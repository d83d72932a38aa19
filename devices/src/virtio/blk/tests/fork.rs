//! A process whose drive is quiesced can be forked, and the child builds a drive of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::*;

/// What the child does; its number is its exit status. `left` requests are still available. It
/// should not print, for locks of the test harness may have been held at the fork.
fn child(rig: Rig, left: usize, transport: &crate::virtio::TransportState, state: BlkState) -> i32 {
    let Rig {
        ram,
        blk,
        volume,
        mut driver,
    } = rig;
    let queues = std::mem::take(&mut driver.queues);
    // The inherited drive has threads that do not exist here.
    std::mem::forget(driver);
    std::mem::forget(blk);
    let host = BlkHost::new(volume.clone());
    let Ok(blk) = Blk::restore(state, host) else {
        return 2;
    };
    let blk = Arc::new(Mutex::new(blk));
    let Ok(driver) = Driver::restore(&ram, transport, blk.clone(), queues) else {
        return 3;
    };
    let mut rig = Rig {
        ram,
        blk,
        volume,
        driver,
    };
    if rig.driver.transport.resume().is_err() {
        return 4;
    }
    for _ in 0..left {
        rig.wait_used();
    }
    let answer = rig.read(0, 4096);
    if answer.status != OK || answer.data != pattern(1, 4096) {
        return 5;
    }
    if rig.write(64, &pattern(3, 4096)) != OK || rig.read(64, 4096).data != pattern(3, 4096) {
        return 6;
    }
    if rig
        .blk
        .lock()
        .map_or(true, |mut blk| blk.quiesce().is_err())
    {
        return 7;
    }
    // Its own drive can be dropped.
    drop(rig);
    0
}

/// Waits for the child, ten seconds at most.
fn exit_status(pid: libc::pid_t) -> i32 {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        let mut status = 0;
        // SAFETY: `status` is a place for the status; the child is ours.
        match unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } {
            0 if Instant::now() > limit => {
                // SAFETY: the child is ours and was not waited for yet.
                unsafe {
                    libc::kill(pid, libc::SIGKILL);
                    libc::waitpid(pid, &raw mut status, 0);
                }
                panic!("the child hangs");
            }
            0 => std::thread::sleep(Duration::from_millis(2)),
            _ => return status,
        }
    }
}

#[test]
fn a_forked_child_restores_the_drive_over_inherited_memory() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        assert_eq!(rig.write(0, &pattern(1, 4096)), OK);
        for round in 0..10 {
            // Threads are busy up to the quiesce.
            let chains: Vec<_> = (0..16)
                .map(|sector| {
                    let chain = [
                        rig.ram.readable(&header(T_OUT, 100 + sector * 8)),
                        rig.ram.readable(&pattern(round, 4096)),
                        rig.status(),
                    ];
                    rig.submit(&chain);
                    chain
                })
                .collect();
            rig.driver.transport.quiesce().unwrap();
            let transport = rig.driver.transport.save().unwrap();
            let state = rig.blk.lock().unwrap().save();
            while rig.driver.queues[0].pop_used().is_some() {}

            // SAFETY: the child runs on this thread only, uses what fork(2) leaves usable, and ends
            // by `_exit`.
            let pid = unsafe { libc::fork() };
            assert!(pid >= 0);
            if pid == 0 {
                let left = chains
                    .iter()
                    .filter(|chain| rig.ram.read(&chain[2]) == [UNTOUCHED])
                    .count();
                let run = AssertUnwindSafe(|| child(rig, left, &transport, state));
                let result = catch_unwind(run).unwrap_or(9);
                // SAFETY: ends the child at once, without any destructor of the harness.
                unsafe { libc::_exit(result) };
            }
            assert_eq!(exit_status(pid), 0, "{engine:?}, round {round}");

            rig.driver.transport.resume().unwrap();
            for chain in &chains {
                let ram = &rig.ram;
                rig.driver.run_until(|_| ram.read(&chain[2]) == [OK]);
            }
            while rig.driver.queues[0].pop_used().is_some() {}
            assert_eq!(rig.read(0, 4096).data, pattern(1, 4096));
        }
    }
}
