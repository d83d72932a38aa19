//! The agent against a client that lies, stalls or babbles: it goes on serving others, within its
//! memory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use offshoot_protocol::agent::frame::HEADER;
use offshoot_protocol::agent::{
    ErrorCode, Generation, Header, OLDEST_VERSION, RawKind, Reply, Request, VERSION, WriteMode,
};

use crate::rig::{Rig, eventually, is_root, skipped, soon};

fn hello() -> Vec<u8> {
    let hello = Request::Hello {
        oldest: OLDEST_VERSION,
        newest: VERSION,
        generation: Generation::NONE,
    };
    hello.to_frame().unwrap()
}

fn connect(rig: &Rig) -> UnixStream {
    let stream = UnixStream::connect(rig.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

fn reply(stream: &mut UnixStream) -> Option<Reply> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).ok()?;
    let header = Header::decode(&header).unwrap();
    let mut payload = vec![0; header.len];
    stream.read_exact(&mut payload).unwrap();
    Some(Reply::decode(header.kind, &payload).unwrap())
}

#[track_caller]
fn refused(rig: &Rig, bytes: &[u8], expected: ErrorCode) {
    let mut stream = connect(rig);
    let _ = stream.write_all(bytes);
    loop {
        match reply(&mut stream) {
            Some(Reply::Hello { .. }) => {}
            Some(Reply::Refused { refusal }) => {
                break assert_eq!(refusal.code, expected, "{refusal}");
            }
            other => panic!("{other:?} for {bytes:?}"),
        }
    }
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "and that is the end");
}

#[test]
fn broken_conversations_are_refused_with_the_reason() {
    let rig = Rig::new();
    let ping = Request::Ping {}.to_frame().unwrap();
    refused(&rig, &ping, ErrorCode::NoHello);
    refused(&rig, b"GET / HTTP/1.1\r\n\r\n", ErrorCode::Malformed);
    refused(&rig, &[0xff; 64], ErrorCode::Malformed);
    let twice = [hello(), hello()].concat();
    refused(&rig, &twice, ErrorCode::Malformed);
    let unknown = [hello(), Header::encode(99, 0).unwrap().to_vec()].concat();
    refused(&rig, &unknown, ErrorCode::Malformed);
    let stray = [
        hello(),
        Header::encode(RawKind::Data as u16, 0).unwrap().to_vec(),
    ]
    .concat();
    refused(&rig, &stray, ErrorCode::Malformed);
    let mut long = Header::encode(16, 0).unwrap();
    long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    refused(
        &rig,
        &[hello(), long.to_vec()].concat(),
        ErrorCode::Malformed,
    );
    for (oldest, newest) in [(VERSION + 1, VERSION + 5), (0, 0), (5, 2)] {
        let hello = Request::Hello {
            oldest,
            newest,
            generation: Generation::NONE,
        };
        refused(&rig, &hello.to_frame().unwrap(), ErrorCode::Version);
    }
    let write = Request::Write {
        path: rig.path("x").to_str().unwrap().into(),
        how: WriteMode::Replace,
        mode: None,
        owner: None,
        sync: false,
    };
    let mut stream = connect(&rig);
    stream
        .write_all(&[hello(), write.to_frame().unwrap(), ping].concat())
        .unwrap();
    assert!(matches!(reply(&mut stream), Some(Reply::Hello { .. })));
    assert!(matches!(reply(&mut stream), Some(Reply::Opened { .. })));
    assert!(matches!(reply(&mut stream), Some(Reply::Refused { .. })));
    assert!(!rig.path("x").exists());
    rig.agent.ping(soon()).unwrap();
}

#[test]
fn nonsense_from_many_sides_does_not_disturb_the_others() {
    let rig = Rig::new();
    let mut state = 7u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    for round in 0..400 {
        let mut stream = connect(&rig);
        let mut bytes = Vec::new();
        if round % 4 != 0 {
            bytes.extend(hello());
        }
        // Well-formed frames of any kind but those that could do harm here, with any payload.
        let kinds = [
            1u16, 3, 4, 8, 17, 18, 19, 20, 21, 32, 34, 35, 64, 65, 66, 99, 200,
        ];
        let kind = kinds[next() as usize % kinds.len()];
        let len = (next() % 64) as usize;
        let Ok(header) = Header::encode(kind, len) else {
            continue;
        };
        bytes.extend(header);
        bytes.extend((0..len).map(|_| (next() % 4) as u8));
        bytes.truncate(bytes.len() - (next() as usize % 4));
        let _ = stream.write_all(&bytes);
        if round % 3 == 0 {
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
        }
    }
    rig.agent.ping(soon()).unwrap();
    eventually("every thread is gone", || rig.threads() <= 2);
    assert!(rig.kib("VmRSS:") < 5 << 10, "{} KiB", rig.kib("VmRSS:"));
}

#[test]
fn too_many_connections_are_refused_and_the_next_ones_served() {
    let rig = Rig::new();
    let idle: Vec<_> = (0..128).map(|_| connect(&rig)).collect();
    eventually("all are accepted", || rig.threads() >= 129);
    refused(&rig, b"", ErrorCode::Busy);
    drop(idle);
    eventually("their places are free", || rig.agent.ping(soon()).is_ok());
    assert!(
        rig.kib("VmHWM:") < 5 << 10,
        "{} KiB with 128 connections",
        rig.kib("VmHWM:")
    );
}

#[test]
fn a_stalled_client_holds_up_nobody() {
    let rig = Rig::new();
    let mut stalled = Vec::new();
    for n in 0..20 {
        let mut stream = connect(&rig);
        let begun = [
            hello(),
            Header::encode(16, 200_000).unwrap().to_vec(),
            vec![0; n],
        ]
        .concat();
        stream.write_all(&begun).unwrap();
        stalled.push(stream);
    }
    thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| (0..20).for_each(|_| rig.agent.ping(soon()).unwrap()));
        }
    });
}

/// The other half of the test below, in a process of another user.
#[test]
fn as_another_user() {
    let Some(path) = std::env::var_os("OFFSHOOT_TEST_AS_ANOTHER_USER") else {
        return;
    };
    let mut stream = UnixStream::connect(path).unwrap();
    let _ = stream.write_all(&hello());
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) | Err(_) => {}
        Ok(_) => panic!("was answered"),
    }
}

#[test]
fn only_root_and_the_agents_own_user_are_served() {
    if !is_root() {
        return skipped("another user at the agent's socket (not root)");
    }
    // A directory and a socket that are anybody's: who is at the other end is asked of the kernel.
    let open = tempfile::tempdir().unwrap();
    let anybody = || std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(open.path(), anybody()).unwrap();
    let socket = open.path().join("s");
    let mut agent = std::process::Command::new(crate::rig::program())
        .arg("--listen")
        .arg(format!("unix:{}", socket.display()))
        .spawn()
        .unwrap();
    offshoot::agent::Agent::at_socket(&socket)
        .ping(soon())
        .unwrap();
    std::fs::set_permissions(&socket, anybody()).unwrap();
    let program = open.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = std::process::Command::new(program)
        .args(["--exact", "hostile_client::as_another_user"])
        .env("OFFSHOOT_TEST_AS_ANOTHER_USER", &socket)
        .current_dir("/")
        .uid(12345)
        .gid(12345)
        .output();
    agent.kill().unwrap();
    agent.wait().unwrap();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}
