use std::thread;
use std::time::{Duration, Instant};

use offshoot::ErrorKind;
use offshoot::agent::{Command, Event, Exit};

use crate::rig::{Rig, eventually, is_alive, is_root, skipped, soon, within};

const MOST: usize = 64 << 20;

fn code(code: i32) -> Exit {
    Exit {
        code: Some(code),
        signal: None,
        timed_out: false,
    }
}

#[test]
fn output_exit_code_and_surroundings_are_as_asked_for() {
    let rig = Rig::new();
    let script = "echo out; echo err >&2; pwd; echo $A-$B-$HOME; exit 7";
    let command = Command::shell(script)
        .cwd("/usr")
        .env("A", "1")
        .without_env("HOME");
    let output = rig.agent.run(&command, b"", MOST, soon()).unwrap();
    assert_eq!(output.exit, code(7));
    assert_eq!(output.stdout, b"out\n/usr\n1--\n");
    assert_eq!(output.stderr, b"err\n");

    let command = Command::new(["printf", "%s|", "a b", "", "'$x'"]);
    let output = rig.agent.run(&command, b"", MOST, soon()).unwrap();
    assert_eq!(output.stdout, b"a b||'$x'|");

    let command = Command::new(["/usr/bin/env"])
        .clean_env()
        .env("ONLY", "this");
    let output = rig.agent.run(&command, b"", MOST, soon()).unwrap();
    assert_eq!(output.stdout, b"ONLY=this\n");

    // Own session and group; nothing of the agent's own streams or descriptors.
    let output = rig
        .agent
        .run(
            &Command::shell("ls /proc/self/fd; cat; cut -d' ' -f5,6 /proc/$$/stat; echo $$"),
            b"",
            MOST,
            soon(),
        )
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("0\n1\n2\n3\n"), "{text}");
    let words: Vec<_> = text.split_whitespace().skip(4).collect();
    assert!(words.iter().all(|word| *word == words[0]), "{text}");
}

#[test]
fn what_cannot_be_started_is_refused_with_the_reason() {
    let rig = Rig::new();
    for command in [
        Command::new(["/no/such/program"]),
        Command::new(["no-such-program"]),
        Command::shell("true").cwd("/no/such/directory"),
        Command::shell("true").user("no-such-user"),
    ] {
        let error = rig.agent.start(&command, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error} {command:?}");
    }
    let error = rig
        .agent
        .start(&Command::new(["/etc/passwd"]), soon())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    for command in [
        Command::new::<&str>([]),
        Command::new([""]),
        Command::new(["a\0b"]),
        Command::shell("true").env("A=B", "x"),
        Command::shell("true").env("A", "x\0"),
    ] {
        let error = rig.agent.start(&command, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error} {command:?}");
    }
    assert!(rig.agent.jobs(soon()).unwrap().is_empty());
}

#[test]
fn a_signal_is_told_from_a_code() {
    let rig = Rig::new();
    let output = rig
        .agent
        .run(&Command::shell("kill -TERM $$"), b"", MOST, soon());
    let exit = output.unwrap().exit;
    assert_eq!(
        (exit.code, exit.signal, exit.success()),
        (None, Some(15), false)
    );
}

#[test]
fn megabytes_go_in_and_out_at_once() {
    let rig = Rig::new();
    let input: Vec<u8> = (0..16u32 << 20)
        .map(|n| (n.wrapping_mul(2654435761) >> 13) as u8)
        .collect();
    let output = rig
        .agent
        .run(&Command::new(["cat"]), &input, MOST, soon())
        .unwrap();
    assert!(output.exit.success());
    assert!(output.stdout == input);

    // A command that never reads its input is no reason to wait, and no error.
    let output = rig
        .agent
        .run(&Command::shell("echo done"), &input, MOST, soon())
        .unwrap();
    assert_eq!(output.stdout, b"done\n");
}

#[test]
fn a_slow_client_holds_the_command_back_and_loses_nothing() {
    let rig = Rig::new();
    let script = "head -c 8000000 /dev/zero; echo written >&2; sleep 0.2";
    let process = rig.agent.start(&Command::shell(script), soon()).unwrap();
    // What lies in buffers on the way is far less than that.
    thread::sleep(Duration::from_millis(500));
    let info = rig.agent.jobs(soon()).unwrap();
    assert!(
        info[0].next < 4_000_000 && info[0].exit.is_none(),
        "{info:?}"
    );
    let mut zeros = 0;
    let mut said = Vec::new();
    loop {
        match process.next(soon()).unwrap() {
            Event::Stdout(bytes) => zeros += bytes.len(),
            Event::Stderr(bytes) => said.extend(bytes),
            Event::Exited(exit) => break assert!(exit.success()),
        }
    }
    assert_eq!(
        (zeros, said.as_slice()),
        (8_000_000, b"written\n".as_slice())
    );
}

#[test]
fn more_output_than_allowed_is_an_error_and_ends_the_command() {
    let rig = Rig::new();
    let error = rig
        .agent
        .run(&Command::new(["yes"]), b"", 1 << 20, soon())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    eventually("the command is gone", || {
        rig.agent.jobs(soon()).unwrap().is_empty()
    });
}

#[test]
fn a_time_limit_kills_the_whole_group() {
    let rig = Rig::new();
    let script = "sleep 1000 & echo $!; trap '' TERM; sleep 1000";
    let command = Command::shell(script).time_limit(Duration::from_millis(300));
    let started = Instant::now();
    let output = rig.agent.run(&command, b"", MOST, soon()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(output.exit.signal, Some(9));
    assert!(output.exit.timed_out);
    let background = String::from_utf8(output.stdout).unwrap();
    eventually("the background process is gone", || !is_alive(&background));
}

#[test]
fn a_time_limit_holds_for_a_command_that_nobody_reads() {
    let rig = Rig::new();
    let command = Command::new(["yes"]).time_limit(Duration::from_millis(200));
    let process = rig.agent.start(&command, soon()).unwrap();
    let pid = process.pid().to_string();
    eventually("the command is killed", || !is_alive(&pid));
    let exit = loop {
        if let Event::Exited(exit) = process.next(soon()).unwrap() {
            break exit;
        }
    };
    assert!(exit.timed_out);
}

#[test]
fn a_command_dies_with_its_client_and_a_detached_one_does_not() {
    let rig = Rig::new();
    let command = Command::shell("sleep 1000 & echo $!; wait");
    let process = rig.agent.start(&command, soon()).unwrap();
    let Event::Stdout(background) = process.next(soon()).unwrap() else {
        panic!()
    };
    let background = String::from_utf8(background).unwrap();
    let pid = process.pid().to_string();
    drop(process);
    eventually("both are gone", || {
        !is_alive(&pid) && !is_alive(&background)
    });
    eventually("it is forgotten", || {
        rig.agent.jobs(soon()).unwrap().is_empty()
    });

    let process = rig.agent.start(&command.detached(), soon()).unwrap();
    let (job, pid) = (process.job(), process.pid().to_string());
    drop(process);
    thread::sleep(Duration::from_millis(200));
    assert!(is_alive(&pid));
    rig.agent.kill(job, soon()).unwrap();
    eventually("it is killed", || !is_alive(&pid));
}

#[test]
fn a_background_process_does_not_hold_the_end_of_its_command_back() {
    let rig = Rig::new();
    let started = Instant::now();
    let script = "sleep 3 & seq 20000; exit 4";
    let output = rig
        .agent
        .run(&Command::shell(script), b"", MOST, soon())
        .unwrap();
    assert!(started.elapsed() < Duration::from_millis(2500));
    assert_eq!(output.exit, code(4));
    assert!(
        output.stdout.ends_with(b"\n20000\n"),
        "all that it wrote itself is there"
    );
}

#[test]
fn many_commands_run_at_once_and_do_not_mix() {
    let rig = Rig::new();
    thread::scope(|scope| {
        for n in 0..40 {
            let agent = rig.agent.clone();
            scope.spawn(move || {
                let script = format!("for i in $(seq 200); do echo {n}; done; exit {n}");
                let output = agent
                    .run(&Command::shell(script), b"", MOST, soon())
                    .unwrap();
                assert_eq!(output.exit, code(n));
                assert_eq!(output.stdout, format!("{n}\n").repeat(200).as_bytes());
            });
        }
    });
    eventually("all are forgotten", || {
        rig.agent.jobs(soon()).unwrap().is_empty()
    });
    eventually("every thread is gone", || rig.threads() <= 3);
}

#[test]
fn waiting_can_be_taken_up_again() {
    let rig = Rig::new();
    let process = rig
        .agent
        .start(&Command::shell("sleep 0.4; echo now"), soon())
        .unwrap();
    let mut waits = 0;
    let event = loop {
        match process.next(within(50)) {
            Err(error) if error.kind() == ErrorKind::TimedOut => waits += 1,
            result => break result.unwrap(),
        }
    };
    assert_eq!(event, Event::Stdout(b"now\n".to_vec()));
    assert!(waits >= 3);
    assert_eq!(process.next(soon()).unwrap(), Event::Exited(code(0)));
}

#[test]
fn commands_run_as_users_with_their_groups() {
    if !is_root() {
        return skipped("commands as other users (not root)");
    }
    let rig = Rig::new();
    let run = |command: Command| {
        let output = rig.agent.run(&command, b"", MOST, soon()).unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let script = "id -u; id -g; id -G; echo $HOME $USER";
    let of_name = run(Command::shell(script).user("daemon"));
    assert_eq!(of_name, "1\n1\n1\n/usr/sbin daemon\n");
    let of_ids = run(Command::shell(script).ids(12345, 54321));
    assert_eq!(of_ids, "12345\n54321\n54321\n/ 12345\n");
    let error = rig
        .agent
        .start(&Command::shell("true").ids(u32::MAX, 0), soon());
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn requests_and_commands_take_little_time() {
    let rig = Rig::new();
    let median = |mut run: Box<dyn FnMut() + '_>| {
        let mut times: Vec<_> = (0..101)
            .map(|_| {
                let started = Instant::now();
                run();
                started.elapsed()
            })
            .collect();
        times.sort();
        times[50]
    };
    let ping = median(Box::new(|| rig.agent.ping(soon()).unwrap()));
    let command = Command::new(["/bin/true"]);
    let run = median(Box::new(|| {
        let output = rig.agent.run(&command, b"", MOST, soon()).unwrap();
        assert!(output.exit.success());
    }));
    println!("median of a ping: {ping:?}, of a command from start to exit code: {run:?}");
    assert!(ping < Duration::from_millis(50) && run < Duration::from_millis(200));
}
