use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use offshoot::ErrorKind;
use offshoot::agent::{Command, PowerAction};

use crate::rig::{Rig, eventually, in_namespaces, is_root, program, skipped, soon};

/// A root of its own with nothing in it but programs, and the agent as the first process there.
fn machine(arguments: &str) -> Option<Rig> {
    if !is_root() {
        skipped("the agent as init (not root)");
        return None;
    }
    let script = format!(
        "listen=$1; host=$(dirname \"${{listen#unix:}}\"); root=$host/root; mkdir $root; \
         mount -t tmpfs none $root; cd $root; mkdir usr host etc dev proc sys run tmp; \
         mount --bind /usr usr; mount --bind $host host; cp \"$0\" init; \
         for dir in bin sbin lib lib64; do ln -s usr/$dir $dir; done; \
         echo root:x:0:0::/root:/bin/sh > etc/passwd; \
         exec chroot . /init quiet --listen unix:/host/s {arguments}"
    );
    Some(Rig::start(|listen| in_namespaces(&script, listen)))
}

fn sh(rig: &Rig, script: &str) -> String {
    let output = rig
        .agent
        .run(&Command::shell(script), b"", 1 << 20, soon())
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.exit.success(),
        "{text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Sends a signal to the first process from within, which may be the last that is heard of it.
fn signal(rig: &Rig, name: &str) {
    let command = Command::shell(format!("kill -{name} 1"));
    let _ = rig.agent.run(&command, b"", 1000, soon());
}

/// How the namespace's first process ended, by the signal that the kernel turns a reboot of a
/// namespace into (reboot(2)).
fn end(mut rig: Rig) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = rig.process.try_wait().unwrap() {
            return status.signal();
        }
        assert!(Instant::now() < deadline, "the machine is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_init_mounts_what_programs_expect() {
    let Some(rig) = machine("") else { return };
    let text = sh(
        &rig,
        "echo $$; cat /proc/mounts; ls -l /dev/null /dev/fd; ip link show lo",
    );
    for mount in [
        "proc /proc proc",
        "sysfs /sys sysfs",
        "devtmpfs /dev devtmpfs",
        "devpts /dev/pts devpts",
        "tmpfs /dev/shm tmpfs",
        "tmpfs /run tmpfs",
        "tmpfs /tmp tmpfs",
    ] {
        assert!(text.contains(mount), "{mount}: {text}");
    }
    assert!(text.contains("LOOPBACK,UP"), "{text}");
    let init = sh(&rig, "cat /proc/1/comm");
    assert_eq!(init, "init\n");
    let command = Command::shell("tty").terminal(24, 80);
    let output = rig.agent.run(&command, b"", 1000, soon()).unwrap();
    assert_eq!(output.stdout, b"/dev/pts/0\r\n");
}

#[test]
fn orphans_are_reaped() {
    let Some(rig) = machine("") else { return };
    sh(
        &rig,
        "for i in $(seq 50); do (sleep 0.0$i &) ; done; exit 0",
    );
    let zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z' || true";
    eventually("no zombie is left", || sh(&rig, zombies) == "0\n");
}

#[test]
fn power_off_and_reboot_are_told_apart_and_end_every_process() {
    for (action, signal) in [(PowerAction::Off, 2), (PowerAction::Reboot, 1)] {
        let Some(rig) = machine("") else { return };
        // One that ends when asked to and says so, and one that has to be killed.
        let polite = Command::shell(
            "trap 'echo bye > /host/bye; exit' TERM; echo; while :; do sleep 0.1; done",
        );
        let polite = rig.agent.start(&polite.detached(), soon()).unwrap();
        polite.next(soon()).unwrap();
        let dir = rig.path("bye");
        rig.agent.power(action, soon()).unwrap();
        eventually("the polite one has said good-bye", || dir.exists());
        assert_eq!(end(rig), Some(signal), "{action}");
    }
}

#[test]
fn what_does_not_end_when_asked_is_killed() {
    let Some(rig) = machine("") else { return };
    let stubborn = Command::shell("trap '' TERM; echo; while :; do sleep 0.1; done");
    let stubborn = rig.agent.start(&stubborn.detached(), soon()).unwrap();
    stubborn.next(soon()).unwrap();
    rig.agent.power(PowerAction::Off, soon()).unwrap();
    assert_eq!(end(rig), Some(2));
}

#[test]
fn the_main_command_gets_signals_and_its_end_is_the_end() {
    let Some(rig) = machine(
        "-- sh -c 'trap \"echo got > /host/got\" USR1; trap \"exit 0\" TERM; : > /host/up; while :; do sleep 0.05; done'",
    ) else {
        return;
    };
    eventually("the command is up", || rig.path("up").exists());
    // From within: the agent is process 1 there.
    signal(&rig, "USR1");
    eventually("the command got the signal", || rig.path("got").exists());
    rig.agent.ping(soon()).unwrap();
    signal(&rig, "TERM");
    assert_eq!(end(rig), Some(2));
}

#[test]
fn an_init_without_a_command_stops_when_asked_by_signal() {
    for (name, expected) in [("TERM", 2), ("PWR", 2), ("INT", 1)] {
        let Some(rig) = machine("") else { return };
        signal(&rig, name);
        assert_eq!(end(rig), Some(expected), "{name}");
    }
}

#[test]
fn below_another_init_it_ends_with_the_code_of_its_command() {
    let rig = Rig::start(|listen| {
        let mut command = std::process::Command::new(program());
        command.args(["--listen", listen, "--", "sh", "-c"]);
        command.arg("trap 'exit 5' USR1; while :; do sleep 0.05; done");
        command
    });
    let error = rig.agent.power(PowerAction::Off, soon()).unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::WrongState,
        "it must not stop this machine"
    );
    let pid = rustix::process::Pid::from_child(&rig.process);
    std::thread::sleep(Duration::from_millis(200));
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
    let mut rig = rig;
    assert_eq!(rig.process.wait().unwrap().code(), Some(5));
}
