use std::thread;
use std::time::Duration;

use offshoot::ErrorKind;
use offshoot::agent::{Command, Event, JobId, Process};

use crate::rig::{Rig, eventually, soon};

fn rest(process: &Process) -> (Vec<u8>, Option<i32>) {
    let mut all = Vec::new();
    loop {
        match process.next(soon()).unwrap() {
            Event::Stdout(bytes) | Event::Stderr(bytes) => all.extend(bytes),
            Event::Exited(exit) => return (all, exit.code),
        }
    }
}

#[test]
fn a_command_is_found_again_with_output_input_and_exit_code() {
    let rig = Rig::new();
    let script = "echo one; read line; echo got $line; exit 5";
    let command = Command::shell(script).input().detached();
    let process = rig.agent.start(&command, soon()).unwrap();
    let job = process.job();
    assert_eq!(
        process.next(soon()).unwrap(),
        Event::Stdout(b"one\n".to_vec())
    );
    drop(process);

    let jobs = rig.agent.jobs(soon()).unwrap();
    assert_eq!((jobs.len(), jobs[0].job, jobs[0].next), (1, job, 4));
    assert!(jobs[0].title.starts_with(b"/bin/sh -c echo one;"));
    assert!(jobs[0].exit.is_none() && !jobs[0].terminal);
    let error = rig.agent.forget(job, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongState);

    let (process, info) = rig.agent.attach(job, 0, soon()).unwrap();
    assert_eq!((process.from(), info.next), (0, 4));
    process.input().write(b"hello\n", soon()).unwrap();
    assert_eq!(rest(&process), (b"one\ngot hello\n".to_vec(), Some(5)));

    // And once more, after its end, from anywhere in its output.
    for (from, expected) in [(0, "one\ngot hello\n"), (4, "got hello\n"), (u64::MAX, "")] {
        let (process, info) = rig.agent.attach(job, from, soon()).unwrap();
        assert!(info.exit.is_some());
        assert_eq!(rest(&process), (expected.as_bytes().to_vec(), Some(5)));
    }
    let error = rig.agent.signal(job, 15, true, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongState);
    rig.agent.forget(job, soon()).unwrap();
    let error = rig.agent.attach(job, 0, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        rig.agent.forget(JobId(99), soon()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn the_newest_output_is_kept_and_nobody_is_held_up() {
    let rig = Rig::new();
    let script = "seq 200000; echo end";
    let command = Command::shell(script).keep_output(10_000).detached();
    let process = rig.agent.start(&command, soon()).unwrap();
    let job = process.job();
    drop(process);
    eventually("it has ended", || {
        rig.agent.jobs(soon()).unwrap()[0].exit.is_some()
    });
    let (process, info) = rig.agent.attach(job, 0, soon()).unwrap();
    assert_eq!(process.from(), info.first);
    let (kept, code) = rest(&process);
    assert_eq!(code, Some(0));
    assert_eq!(kept.len() as u64, info.next - info.first);
    assert!((1000..=10_000).contains(&kept.len()), "{}", kept.len());
    assert!(kept.ends_with(b"\n200000\nend\n"));
}

#[test]
fn two_clients_see_the_same() {
    let rig = Rig::new();
    let command = Command::shell("read x; seq 30000; exit 3").input();
    let process = rig.agent.start(&command, soon()).unwrap();
    let (second, _) = rig.agent.attach(process.job(), 0, soon()).unwrap();
    second.input().write(b"go\n", soon()).unwrap();
    let of_second = thread::spawn(move || rest(&second));
    let of_first = rest(&process);
    assert_eq!(of_first, of_second.join().unwrap());
    assert_eq!((of_first.0.len(), of_first.1), (168_894, Some(3)));
}

#[test]
fn losing_an_attached_client_is_not_the_end_of_the_command() {
    let rig = Rig::new();
    let process = rig
        .agent
        .start(&Command::new(["cat"]).input(), soon())
        .unwrap();
    let (second, _) = rig.agent.attach(process.job(), 0, soon()).unwrap();
    drop(second);
    thread::sleep(Duration::from_millis(100));
    let mut input = process.input();
    input.write(b"still here", soon()).unwrap();
    input.end(soon()).unwrap();
    assert_eq!(rest(&process), (b"still here".to_vec(), Some(0)));
    // One that is silent does not keep the thread of a client that is gone.
    let silent = rig
        .agent
        .start(&Command::new(["sleep", "1000"]).detached(), soon())
        .unwrap();
    let job = silent.job();
    drop(silent);
    eventually("its threads are gone", || rig.threads() <= 4);
    rig.agent.kill(job, soon()).unwrap();
}

#[test]
fn signals_reach_one_process_or_the_group() {
    let rig = Rig::new();
    let script = "trap 'echo one' USR1; echo ready; while :; do sleep 0.05; done";
    let process = rig.agent.start(&Command::shell(script), soon()).unwrap();
    assert_eq!(
        process.next(soon()).unwrap(),
        Event::Stdout(b"ready\n".to_vec())
    );
    rig.agent.signal(process.job(), 10, false, soon()).unwrap();
    assert_eq!(
        process.next(soon()).unwrap(),
        Event::Stdout(b"one\n".to_vec())
    );
    for signal in [0, 65, 255] {
        let error = rig
            .agent
            .signal(process.job(), signal, true, soon())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    rig.agent.kill(process.job(), soon()).unwrap();
    assert_eq!(rest(&process).1, None);
}

#[test]
fn ended_commands_are_remembered_within_bounds() {
    let rig = Rig::new();
    for _ in 0..80 {
        let process = rig
            .agent
            .start(&Command::shell("echo x").detached(), soon())
            .unwrap();
        assert_eq!(rest(&process).0, b"x\n");
    }
    let jobs = rig.agent.jobs(soon()).unwrap();
    assert!((60..=66).contains(&jobs.len()), "{}", jobs.len());
    assert_eq!(jobs.last().unwrap().job, JobId(80));
    assert!(rig.kib("VmRSS:") < 5 << 10, "{} KiB", rig.kib("VmRSS:"));
}
