use offshoot::ErrorKind;
use offshoot::agent::{Command, Event, Process, WindowSize};

use crate::rig::{Rig, soon};

/// Reads until the terminal has shown this.
#[track_caller]
fn shown(process: &Process, text: &str) -> String {
    let mut all = Vec::new();
    loop {
        match process.next(soon()).unwrap() {
            Event::Stdout(bytes) => all.extend(bytes),
            other => panic!(
                "{other:?} before {text:?}: {:?}",
                String::from_utf8_lossy(&all)
            ),
        }
        let so_far = String::from_utf8_lossy(&all);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
    }
}

#[test]
fn a_terminal_has_a_size_that_changes_and_controls_its_command() {
    let rig = Rig::new();
    let script = "tty; stty size; trap 'stty size' WINCH; trap 'echo interrupted; exit 9' INT; \
                  echo ready; while :; do sleep 0.02; done";
    let process = rig
        .agent
        .start(&Command::shell(script).terminal(24, 80), soon())
        .unwrap();
    let text = shown(&process, "ready");
    assert!(
        text.starts_with("/dev/pts/") && text.contains("24 80"),
        "{text}"
    );
    let size = WindowSize {
        rows: 50,
        columns: 132,
    };
    rig.agent.resize(process.job(), size, soon()).unwrap();
    shown(&process, "50 132");
    // Control-C: the terminal is the controlling one, and the command is its foreground group.
    process.input().write(b"\x03", soon()).unwrap();
    shown(&process, "interrupted");
    let exit = loop {
        if let Event::Exited(exit) = process.next(soon()).unwrap() {
            break exit;
        }
    };
    assert_eq!(exit.code, Some(9));
}

#[test]
fn all_that_a_terminal_shows_comes_before_the_exit() {
    let rig = Rig::new();
    for _ in 0..5 {
        let command = Command::shell("seq 5000").terminal(24, 80);
        let output = rig.agent.run(&command, b"", 1 << 20, soon()).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.ends_with("\r\n5000\r\n"), "{}", text.len());
    }
}

#[test]
fn the_end_of_input_is_control_d() {
    let rig = Rig::new();
    let command = Command::new(["cat"]).terminal(24, 80);
    let output = rig.agent.run(&command, b"line\n", 1 << 20, soon()).unwrap();
    assert!(output.exit.success());
    assert_eq!(output.stdout, b"line\r\nline\r\n");
}

#[test]
fn only_a_terminal_can_be_resized() {
    let rig = Rig::new();
    let process = rig
        .agent
        .start(&Command::new(["cat"]).input(), soon())
        .unwrap();
    let size = WindowSize {
        rows: 1,
        columns: 1,
    };
    let error = rig.agent.resize(process.job(), size, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
