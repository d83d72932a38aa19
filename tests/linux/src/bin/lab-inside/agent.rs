//! The agent as process 1 of a Debian kernel.

use std::time::{Duration, Instant};

use offshoot::agent::{Command, Event, Exit, Process, WindowSize, WriteOptions};

use crate::Failure;
use crate::sandbox::{Place, Sandbox, soon, unix_ns};

/// How much goes through streams.
const STREAM: usize = 3 << 20;
const NS: u64 = 1_000_000_000;

pub(crate) fn runs_commands() -> Result<(), Failure> {
    let (place, mut guest) = Place::boot("agent", 1)?;
    commands(&guest)?;
    streams(&guest)?;
    terminal(&guest)?;
    files(&guest)?;
    figures(&guest)?;
    guest.no_alarm()?;
    let name = guest.name.clone();
    let start = Instant::now();
    guest.power_off()?;
    println!("off after {:?}", start.elapsed());
    place.check_disk(&name, false)?;
    place.end()
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Result<(), Failure> {
    if found == wanted {
        Ok(())
    } else {
        Err(format!("{what}: {found:?}, not {wanted:?}").into())
    }
}

fn exit_of(guest: &Sandbox, command: &Command) -> Result<Exit, Failure> {
    Ok(guest.agent.run(command, b"", 1 << 20, soon())?.exit)
}

fn commands(guest: &Sandbox) -> Result<(), Failure> {
    let argv = Command::new(["printf", "%s|", "a b", "$HOME", ""]);
    let printed = guest.agent.run(&argv, b"", 1 << 10, soon())?.stdout;
    expect("arguments", printed, b"a b|$HOME||".to_vec())?;
    expect(
        "process 1",
        guest.sh("cat /proc/1/comm")?,
        "offshoot-agent\n".into(),
    )?;
    let exit = exit_of(guest, &Command::shell("exit 7"))?;
    expect("exit code", exit.code, Some(7))?;
    let exit = exit_of(guest, &Command::shell("kill -SEGV $$"))?;
    expect("signal", exit.signal, Some(11))?;
    let limited = Command::new(["sleep", "60"]).time_limit(Duration::from_millis(300));
    let exit = exit_of(guest, &limited)?;
    expect("time limit", (exit.timed_out, exit.signal), (true, Some(9)))?;
    // An orphan is reaped by the agent.
    guest.sh("(sleep 0.1 &) ; sleep 0.3; ! grep -q '^State:.*Z' /proc/[0-9]*/status")?;
    Ok(())
}

fn streams(guest: &Sandbox) -> Result<(), Failure> {
    let sent = pattern(STREAM);
    let start = Instant::now();
    let copied = Command::shell("tee /dev/stderr");
    let output = guest.agent.run(&copied, &sent, 2 * STREAM, soon())?;
    println!("{STREAM} bytes in and twice out took {:?}", start.elapsed());
    expect("standard output", output.stdout == sent, true)?;
    expect("standard error", output.stderr == sent, true)
}

fn terminal(guest: &Sandbox) -> Result<(), Failure> {
    let script = "tty; stty size; trap 'echo interrupted; exit 9' INT; echo ready; \
                  while :; do read line && { echo got $line; stty size; }; done";
    let shell = Command::shell(script).terminal(24, 80);
    let process = guest.agent.start(&shell, soon())?;
    let text = shown(&process, "ready")?;
    expect("a terminal", text.starts_with("/dev/pts/"), true)?;
    expect("its size", text.contains("24 80"), true)?;
    let size = WindowSize {
        rows: 50,
        columns: 132,
    };
    guest.agent.resize(process.job(), size, soon())?;
    process.input().write(b"hello\r", soon())?;
    shown(&process, "got hello")?;
    shown(&process, "50 132")?;
    process.input().write(b"\x03", soon())?;
    shown(&process, "interrupted")?;
    loop {
        if let Event::Exited(exit) = process.next(soon())? {
            return expect("exit code", exit.code, Some(9));
        }
    }
}

/// Reads until the terminal has shown this.
fn shown(process: &Process, text: &str) -> Result<String, Failure> {
    let mut all = String::new();
    while !all.contains(text) {
        match process.next(soon())? {
            Event::Stdout(bytes) => all += &String::from_utf8_lossy(&bytes),
            other => return Err(format!("{other:?} before {text:?}: {all:?}").into()),
        }
    }
    Ok(all)
}

fn files(guest: &Sandbox) -> Result<(), Failure> {
    let content = pattern(STREAM);
    let path = "/mnt/content";
    let options = WriteOptions {
        sync: true,
        mode: Some(0o640),
        ..WriteOptions::default()
    };
    let start = Instant::now();
    guest
        .agent
        .write_from(path, &options, &mut &content[..], soon())?;
    println!("{STREAM} bytes on the disk after {:?}", start.elapsed());
    // From the disk, not from memory.
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    let back = guest.agent.read_file(path, 2 * STREAM as u64, soon())?;
    expect("a file", back == content, true)?;
    let entry = guest.agent.stat(path, false, soon())?;
    expect(
        "its entry",
        (entry.size, entry.mode),
        (STREAM as u64, 0o640),
    )?;
    guest.agent.remove(path, false, soon())?;
    let gone = guest.agent.stat(path, false, soon());
    let kind = gone.err().map(|error| error.kind());
    expect("a removed file", kind, Some(offshoot::ErrorKind::NotFound))
}

fn figures(guest: &Sandbox) -> Result<(), Failure> {
    let figures = guest.agent.metrics(&["/mnt"], soon())?;
    println!("{figures:?}");
    expect("processors", figures.cpus, 1)?;
    let memory = figures.memory;
    let sane = memory.available < memory.total && memory.total < 160 << 20;
    expect("memory", sane && memory.available > 0, true)?;
    let size = figures.disks.first().map(|disk| disk.size >> 20);
    expect(
        "the disk",
        size.is_some_and(|mib| (8..=16).contains(&mib)),
        true,
    )?;
    let rss = guest.sh("grep VmRSS /proc/1/status")?;
    println!("the agent's {}", rss.trim());

    let then = 1_000_000_000 * NS;
    let uptime = figures.uptime_ms;
    guest.agent.set_clock(then, soon())?;
    let figures = guest.agent.metrics(&[], soon())?;
    let set = (then..then + 30 * NS).contains(&figures.unix_ns);
    expect("the clock that was set", set, true)?;
    let passed = figures.uptime_ms.checked_sub(uptime);
    expect("uptime", passed.is_some_and(|millis| millis < 30_000), true)?;
    Ok(guest.agent.set_clock(unix_ns()?, soon())?)
}

/// Bytes that are not alike in any two pages.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}
