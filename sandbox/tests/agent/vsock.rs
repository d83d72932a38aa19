//! The way through the host side of a vsock, as a virtual machine monitor has it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::thread;

use offshoot::agent::{Agent, Command, PORT};

use crate::rig::{Rig, eventually, program, skipped, soon};

/// Reads a line byte by byte: what follows is not ours.
fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(char::from(byte[0]));
    }
    Ok(line)
}

fn pass_on(mut from: UnixStream, mut to: UnixStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// Passes connections on to the agent's socket. The first three are not accepted in the "guest".
fn bridge(at: &Path, agent: PathBuf) {
    let listener = UnixListener::bind(at).unwrap();
    thread::spawn(move || {
        for (n, stream) in listener.incoming().enumerate() {
            let mut host = stream.unwrap();
            if line(&mut host).unwrap() != format!("CONNECT {PORT}\n") || n < 3 {
                continue;
            }
            host.write_all(b"OK 1073741824\n").unwrap();
            let guest = UnixStream::connect(&agent).unwrap();
            let (host_too, guest_too) = (host.try_clone().unwrap(), guest.try_clone().unwrap());
            thread::spawn(move || pass_on(host, guest));
            thread::spawn(move || pass_on(guest_too, host_too));
        }
    });
}

#[test]
fn a_guest_is_reached_once_it_listens() {
    let rig = Rig::new();
    let path = rig.path("vsock");
    bridge(&path, rig.socket());
    let agent = Agent::at_vsock(&path);
    let input = vec![7; 3 << 20];
    let output = agent
        .run(&Command::new(["cat"]), &input, 4 << 20, soon())
        .unwrap();
    assert!(output.exit.success() && output.stdout == input);
}

#[test]
fn the_agents_own_port_can_be_had() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut agent = Process::new(program())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&path).unwrap())
        .spawn()
        .unwrap();
    let log = || fs::read_to_string(&path).unwrap();
    eventually("it says what became of it", || log().ends_with('\n'));
    let _ = agent.kill();
    agent.wait().unwrap();
    match log() {
        // No vsock in this kernel, or a port below 1024 for others than root, or a second run.
        log if log.contains("os error") => skipped(&format!("listening on vsock ({})", log.trim())),
        log => assert_eq!(log, format!("offshoot-agent: listening on vsock:{PORT}\n")),
    }
}
