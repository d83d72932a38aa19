//! Host programs on real Unix sockets, a guest's driver on real rings, the device between them.

mod guest;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::packet::{HEADER_LEN, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::{GuestCid, Vsock, VsockBinding, VsockState};
use crate::virtio::{SetupError, VirtioDevice};
use guest::{CID, Guest, binding};

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Sends the `CONNECT` line. A device that refuses may close before it is written: the answer shows it.
fn dial(path: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    match writeln!(stream, "CONNECT {port}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => panic!("{error}"),
        _ => stream,
    }
}

/// Reads the `OK` line, byte by byte so that nothing behind it is lost.
fn answer(stream: &mut UnixStream) -> std::io::Result<u32> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(char::from(byte[0]));
    }
    Ok(line
        .strip_prefix("OK ")
        .unwrap()
        .trim_end()
        .parse()
        .unwrap())
}

/// Runs `host` on a thread while the guest's driver runs here.
fn with_host<T: Send + 'static>(
    guest: &mut Guest,
    what: &str,
    host: impl FnOnce() -> T + Send + 'static,
) -> T {
    let thread = std::thread::spawn(host);
    guest.run_until(what, |_| thread.is_finished());
    thread.join().unwrap()
}

/// Bytes that show when one is missing, doubled or moved.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

/// Writes `data` from a thread of its own and reads as much back.
fn echo(stream: &UnixStream, data: Vec<u8>) -> Vec<u8> {
    let mut writer = stream.try_clone().unwrap();
    let mut reader = stream.try_clone().unwrap();
    let mut back = vec![0; data.len()];
    let thread = std::thread::spawn(move || writer.write_all(&data).unwrap());
    reader.read_exact(&mut back).unwrap();
    thread.join().unwrap();
    back
}

#[test]
fn a_host_program_talks_to_the_guest_and_back() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(1024);
    let path = binding(&dir).path;
    let (port, reply, end) = with_host(&mut guest, "echo", move || {
        let mut stream = dial(&path, 1024);
        // What follows the line before the answer belongs to the connection.
        stream.write_all(b"hello").unwrap();
        let port = answer(&mut stream).unwrap();
        let mut reply = [0; 5];
        stream.read_exact(&mut reply).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        (port, reply, rest)
    });
    assert_eq!(&reply, b"hello");
    assert!(end.is_empty());
    assert!(port >= 0x4000_0000);
    guest.run_until("the guest's socket ends", |g| g.socks[&(1024, port)].gone);
}

#[test]
fn the_guest_talks_to_a_host_program() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    let mut name = binding(&dir).path.into_os_string();
    name.push("_99");
    let listener = UnixListener::bind(name).unwrap();
    let key = guest.connect(5000, 99);
    let (mut stream, _) = listener.accept().unwrap();
    guest.run_until("response", |g| g.socks[&key].established);
    let data = pattern(3 << 20, 7);
    guest.socks.get_mut(&key).unwrap().out.extend(&data);
    let got = with_host(&mut guest, "upload", move || {
        let mut got = vec![0; 3 << 20];
        stream.read_exact(&mut got).unwrap();
        stream.write_all(b"thanks").unwrap();
        got
    });
    assert!(got == data, "the data differs");
    // The host program closed: the guest reads the rest, then learns of both directions' end.
    guest.run_until("end", |g| g.socks[&key].peer_shut == 3);
    assert_eq!(guest.take(key), b"thanks");
}

#[test]
fn nobody_listens() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    let key = guest.connect(5000, 77);
    guest.run_until("reset", |g| g.socks[&key].gone);
    assert!(!guest.socks[&key].established);
    let path = binding(&dir).path;
    let refused = with_host(&mut guest, "refusal", move || {
        answer(&mut dial(&path, 7)).unwrap_err().kind()
    });
    assert_eq!(refused, std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn megabytes_both_ways_with_tiny_credit() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    guest.buf_alloc = 1000;
    guest.fragment = true;
    let path = binding(&dir).path;
    let data = pattern(2 << 20, 1);
    let sent = data.clone();
    let back = with_host(&mut guest, "echo", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        echo(&stream, sent)
    });
    assert!(back == data, "the data differs");
}

#[test]
fn hundreds_of_connections_at_once() {
    let dir = dir();
    for event_idx in [true, false] {
        let mut guest = Guest::boot_with(binding(&dir), event_idx, 8);
        guest.echo_ports.insert(9);
        let path = binding(&dir).path;
        let equal = with_host(&mut guest, "echoes", move || {
            let mut streams: Vec<_> = (0..400).map(|_| dial(&path, 9)).collect();
            let ports: std::collections::HashSet<_> =
                streams.iter_mut().map(|s| answer(s).unwrap()).collect();
            assert_eq!(ports.len(), 400);
            let data = |i| pattern(20_000, i);
            for (i, stream) in (0..).zip(&mut streams) {
                stream.write_all(&data(i)).unwrap();
            }
            (0..).zip(&mut streams).all(|(i, stream)| {
                let mut back = vec![0; 20_000];
                stream.read_exact(&mut back).unwrap();
                back == data(i)
            })
        });
        assert!(equal, "the data differs");
    }
}

#[test]
fn the_connection_limit_refuses_and_recovers() {
    let dir = dir();
    let mut limited = binding(&dir);
    limited.max_connections = 3;
    let path = limited.path.clone();
    let mut guest = Guest::boot(limited);
    guest.echo_ports.insert(9);
    let kept = with_host(&mut guest, "limit", {
        let path = path.clone();
        move || {
            let mut kept: Vec<_> = (0..3).map(|_| dial(&path, 9)).collect();
            for stream in &mut kept {
                answer(stream).unwrap();
            }
            assert!(answer(&mut dial(&path, 9)).is_err());
            kept
        }
    });
    // The guest is refused as well.
    let key = guest.connect(5000, 99);
    guest.run_until("reset", |g| g.socks[&key].gone);
    drop(kept);
    guest.run_until("ends", |g| g.socks.values().all(|s| s.gone));
    // The last reset may still be on its way to the device.
    with_host(&mut guest, "again", move || {
        let end = Instant::now() + Duration::from_secs(5);
        while answer(&mut dial(&path, 9)).is_err() {
            assert!(Instant::now() < end, "the places are not given back");
        }
    });
}

#[test]
fn each_direction_closes_on_its_own() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.sink_ports.insert(9);
    let path = binding(&dir).path;
    let mut stream = with_host(&mut guest, "connect", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        stream
    });
    let key = *guest.socks.keys().next().unwrap();
    // The host's half-close reaches the guest as such.
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.run_until("half-close", |g| g.socks[&key].peer_shut != 0);
    assert_eq!(guest.socks[&key].peer_shut, SHUTDOWN_SEND);
    assert_eq!(guest.take(key), b"last words");
    // The other direction still works, and the guest's half-close is an end of file.
    guest.socks.get_mut(&key).unwrap().out.extend(b"answer");
    guest.run_for(Duration::from_millis(20));
    guest.control(key, Op::Shutdown, SHUTDOWN_SEND);
    guest.kick();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"answer");
}

#[test]
fn a_guest_that_receives_no_more_breaks_the_hosts_pipe() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.sink_ports.insert(9);
    let path = binding(&dir).path;
    let mut stream = with_host(&mut guest, "connect", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        stream
    });
    let key = *guest.socks.keys().next().unwrap();
    guest.control(key, Op::Shutdown, SHUTDOWN_RECEIVE);
    guest.kick();
    guest.run_for(Duration::from_millis(30));
    let error = stream.write_all(&[0; 10]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_stalled_host_program_stalls_nobody_else() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.sink_ports.insert(8);
    guest.echo_ports.insert(9);
    let path = binding(&dir).path;
    let first = path.clone();
    let mut stalled = with_host(&mut guest, "connect", move || {
        let mut stream = dial(&first, 8);
        answer(&mut stream).unwrap();
        stream
    });
    let key = *guest.socks.keys().next().unwrap();
    let data = pattern(4 << 20, 3);
    guest.socks.get_mut(&key).unwrap().out.extend(&data);
    guest.run_for(Duration::from_millis(100));
    assert!(
        !guest.socks[&key].out.is_empty(),
        "credit does not hold the guest back"
    );
    with_host(&mut guest, "echo", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        assert_eq!(echo(&stream, b"x".to_vec()), b"x");
    });
    let got = with_host(&mut guest, "drain", move || {
        let mut got = vec![0; 4 << 20];
        stalled.read_exact(&mut got).unwrap();
        got
    });
    assert!(got == data, "the data differs");
}

#[test]
fn a_guest_that_takes_nothing_keeps_nothing_from_the_others_later() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    guest.takes_rx = false;
    // More packets to nowhere than there are receive buffers: each wants a reset.
    for port in 0..5000 {
        let header = guest.header((port, 1), Op::Data);
        guest.send(header, &[]);
    }
    guest.run_for(Duration::from_millis(200));
    guest.takes_rx = true;
    let path = binding(&dir).path;
    with_host(&mut guest, "echo", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        assert_eq!(echo(&stream, b"x".to_vec()), b"x");
    });
}

/// virtio 1.2, 5.10.6.3.1: a sender MUST NOT send more than the receiver's free space.
#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.sink_ports.insert(8);
    let path = binding(&dir).path;
    let mut stream = with_host(&mut guest, "connect", move || {
        let mut stream = dial(&path, 8);
        answer(&mut stream).unwrap();
        stream
    });
    let key = *guest.socks.keys().next().unwrap();
    for _ in 0..64 {
        let mut header = guest.header(key, Op::Data);
        header.len = 64 * 1024;
        guest.send(header, &[7; 64 * 1024]);
    }
    guest.kick();
    guest.run_until("reset", |g| g.socks[&key].gone);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got.len() < 1 << 20);
}

#[test]
fn packets_that_break_the_rules_are_reset_or_dropped() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    let good = guest.header((5, 6), Op::Request);
    let bad = [
        // virtio 1.2, 5.10.6.4.2: an unknown type MUST be answered with a reset.
        Header {
            socket_type: 2,
            ..good
        },
        Header { dst_cid: 3, ..good },
        Header { src_cid: 7, ..good },
        Header { op: 99, ..good },
        Header { op: 0, ..good },
        Header {
            op: Op::Data as u16,
            len: u32::MAX,
            ..good
        },
    ];
    {
        // Straight to the muxer's answers: the driver here would not take wrong CIDs.
        let mut mux = super::mux::Mux::new(
            GuestCid::new(CID).unwrap(),
            VsockBinding::new(dir.path().join("w.sock")),
            0,
        )
        .unwrap();
        for header in bad {
            mux.receive(&header, &mut |_| panic!("no data is wanted"));
            let reply = mux.next_packet(64).unwrap();
            assert_eq!(reply.op, Op::Reset as u16);
            assert_eq!(
                (reply.src_cid, reply.dst_cid),
                (header.dst_cid, header.src_cid)
            );
            assert_eq!((reply.src_port, reply.dst_port), (6, 5));
            assert_eq!(reply.socket_type, header.socket_type);
            assert!(!mux.has_packets());
        }
        mux.receive(
            &Header {
                op: Op::Reset as u16,
                ..bad[1]
            },
            &mut |_| true,
        );
        assert!(!mux.has_packets(), "a reset is never answered");
    }
    // Chains that hold no packet are used up and change nothing.
    let area = 0x4_0000;
    guest.tx.add(&guest.memory, &[(area, 43, false)]).unwrap();
    guest.tx.add(&guest.memory, &[(area, 44, true)]).unwrap();
    guest
        .tx
        .add(&guest.memory, &[(area, 44, false), (area, 44, true)])
        .unwrap();
    guest
        .tx
        .add(&guest.memory, &[(u64::MAX - 10, 44, false)])
        .unwrap();
    let looping = guest.tx.add(&guest.memory, &[(area, 44, false)]).unwrap();
    guest
        .tx
        .descriptor(&guest.memory, looping, (area, 1), 1, looping);
    guest.kick();
    let end = Instant::now() + Duration::from_secs(5);
    let mut used = 0;
    while used < 5 && Instant::now() < end {
        used += usize::from(guest.tx.used(&guest.memory).is_some());
    }
    assert_eq!(used, 5);
    let path = binding(&dir).path;
    with_host(&mut guest, "echo", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        assert_eq!(echo(&stream, b"x".to_vec()), b"x");
    });
    assert!(!guest.device.lock().unwrap().needs_reset());
}

/// virtio 1.2, 2.7.13.3: the available index never runs more than a queue ahead.
#[test]
fn a_wild_available_index_needs_a_reset() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.tx.avail = 4000;
    guest.tx.publish(&guest.memory, 0);
    guest.kick();
    let end = Instant::now() + Duration::from_secs(5);
    while !guest.device.lock().unwrap().needs_reset() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
    guest.device.lock().unwrap().reset();
    assert!(!guest.device.lock().unwrap().needs_reset());
}

#[test]
fn a_restored_guest_answers_new_connections_at_once_ten_times_in_a_row() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    let path = binding(&dir).path;
    let stream = with_host(&mut guest, "connect", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        stream
    });
    let old_key = *guest.socks.keys().next().unwrap();
    let mut seen_ports = vec![old_key.1];
    let mut source = guest;
    for round in 1..=10 {
        let captured = source.capture();
        let at = VsockBinding::new(dir.path().join(format!("copy-{round}.sock")));
        let path = at.path.clone();
        let cid = 100 + round;
        let mut copy = source.restore(&captured, Some(cid), at);
        source.resume();
        // The source's connection lives on through it all (first round: it has one).
        if round == 1 {
            let connection = stream.try_clone().unwrap();
            with_host(&mut source, "the source's echo", move || {
                assert_eq!(echo(&connection, b"still here".to_vec()), b"still here");
            });
        }
        // The host asks before the device runs, before the guest has seen the event.
        let mut early = dial(&path, 9);
        copy.resume();
        let (port, took) = with_host(&mut copy, "the copy's echo", move || {
            let start = Instant::now();
            let port = answer(&mut early).unwrap();
            assert_eq!(echo(&early, b"new".to_vec()), b"new");
            (port, start.elapsed())
        });
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert!(!seen_ports.contains(&port), "a host port was used again");
        seen_ports.push(port);
        assert_eq!(copy.resets_seen, 1);
        assert_eq!(copy.cid, cid);
        assert!(
            round > 1 || copy.socks[&old_key].gone,
            "the old connection lives"
        );
        assert!(!copy.socks[&(9, port)].gone || copy.socks[&(9, port)].peer_shut == 3);
        copy.run_until("end", |g| g.socks[&(9, port)].gone);
        copy.resets_seen = 0;
        source = copy;
    }
}

#[test]
fn packets_in_flight_at_the_capture_are_reset_after_the_restore() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    let path = binding(&dir).path;
    let _stream = with_host(&mut guest, "connect", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        stream
    });
    let key = *guest.socks.keys().next().unwrap();
    let captured = guest.capture();
    // The guest's vCPU wrote these before it stopped; nobody took them.
    let mut header = guest.header(key, Op::Data);
    header.len = 3;
    guest.send(header, b"old");
    let request = guest.connect(6000, 55);
    let mut name = dir.path().join("copy.sock").into_os_string();
    name.push("_55");
    let listener = UnixListener::bind(name).unwrap();
    let at = VsockBinding::new(dir.path().join("copy.sock"));
    let mut copy = guest.restore(&captured, None, at);
    copy.resume();
    copy.run_until("both", |g| {
        g.socks[&key].gone && g.socks[&request].established
    });
    listener.accept().unwrap();
    assert_eq!(copy.resets_seen, 1);
}

/// The guest was captured again before it had handled the first reset.
#[test]
fn two_restores_in_a_row_wait_for_both_resets() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    let captured = guest.capture();
    let first = guest.restore(&captured, None, VsockBinding::new(dir.path().join("a")));
    first.resume();
    let captured = first.capture();
    assert!(captured.1.reset_goal.is_some());
    let mut second = first.restore(&captured, None, VsockBinding::new(dir.path().join("b")));
    second.resume();
    let path = dir.path().join("b");
    with_host(&mut second, "echo", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        assert_eq!(echo(&stream, b"x".to_vec()), b"x");
    });
    assert_eq!(second.resets_seen, 2);
    assert_eq!(second.capture().1.reset_goal, None);
}

#[test]
fn a_guest_without_event_buffers_or_that_keeps_them_gets_its_traffic() {
    let dir = dir();
    for (events, handles) in [(0, true), (8, false)] {
        let mut guest = Guest::boot_with(binding(&dir), true, events);
        guest.echo_ports.insert(9);
        guest.handles_events = handles;
        let captured = guest.capture();
        let mut at = VsockBinding::new(dir.path().join("c"));
        at.reset_timeout = Duration::from_millis(100);
        let mut copy = guest.restore(&captured, None, at);
        copy.resume();
        let path = dir.path().join("c");
        with_host(&mut copy, "echo", move || {
            let mut stream = dial(&path, 9);
            answer(&mut stream).unwrap();
            assert_eq!(echo(&stream, b"x".to_vec()), b"x");
        });
        assert_eq!(copy.resets_seen, 0);
    }
}

#[test]
fn slow_programs_and_silent_guests_are_let_go() {
    let dir = dir();
    let mut quick = binding(&dir);
    quick.greeting_timeout = Duration::from_millis(50);
    quick.connect_timeout = Duration::from_millis(50);
    let path = quick.path.clone();
    let mut guest = Guest::boot(quick);
    guest.takes_rx = false;
    with_host(&mut guest, "timeouts", move || {
        let mut mute = UnixStream::connect(&path).unwrap();
        mute.write_all(b"CONN").unwrap();
        assert_eq!(mute.read(&mut [0]).unwrap(), 0);
        assert!(answer(&mut dial(&path, 9)).is_err());
        let mut babble = UnixStream::connect(&path).unwrap();
        babble.write_all(&[b'x'; 100]).unwrap();
        // Closed with unread bytes: an end of file or a reset.
        assert_eq!(babble.read(&mut [0]).unwrap_or(0), 0);
    });
}

#[test]
fn socket_paths_that_cannot_be_had() {
    let dir = dir();
    let cid = GuestCid::new(CID).unwrap();
    let long = dir.path().join("x".repeat(100));
    let error = Vsock::new(cid, VsockBinding::new(long)).unwrap_err();
    assert!(
        matches!(error, SetupError::PathTooLong { max: 96, .. }),
        "{error}"
    );

    let first = Vsock::new(cid, binding(&dir)).unwrap();
    let mut greedy = binding(&dir);
    greedy.replace_stale = true;
    let error = Vsock::new(cid, greedy.clone()).unwrap_err();
    assert!(matches!(error, SetupError::PathInUse { .. }), "{error}");
    drop(first);
    assert!(!binding(&dir).path.exists(), "our own socket is removed");

    // A listener that goes without removing its path is what a killed process leaves.
    drop(UnixListener::bind(binding(&dir).path).unwrap());
    let error = Vsock::new(cid, binding(&dir)).unwrap_err();
    assert!(matches!(error, SetupError::PathStale { .. }), "{error}");
    drop(Vsock::new(cid, greedy.clone()).unwrap());

    std::fs::write(binding(&dir).path, b"precious").unwrap();
    let error = Vsock::new(cid, greedy).unwrap_err();
    assert!(matches!(error, SetupError::PathNotSocket { .. }), "{error}");
    assert_eq!(std::fs::read(binding(&dir).path).unwrap(), b"precious");

    let missing = VsockBinding::new(dir.path().join("no/such/v.sock"));
    let error = Vsock::new(cid, missing).unwrap_err();
    assert!(matches!(error, SetupError::Host { .. }), "{error}");
}

#[test]
fn reserved_cids_and_foreign_state_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        assert!(GuestCid::new(cid).is_err(), "{cid}");
    }
    let dir = dir();
    let state = VsockState {
        cid: 2,
        last_host_port: u32::MAX,
        reset_goal: Some(7),
    };
    let error = Vsock::restore(&state, None, binding(&dir)).unwrap_err();
    assert!(
        matches!(
            error,
            SetupError::State {
                device: "vsock",
                ..
            }
        ),
        "{error}"
    );
}

/// The header's layout, against the packet type of the rust-vmm crate.
#[test]
fn the_header_is_laid_out_as_the_specification_has_it() {
    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 0x1112_1314_1516_1718,
        src_port: 0x2122_2324,
        dst_port: 0x3132_3334,
        len: 0x4142_4344,
        socket_type: 0x5152,
        op: 0x6162,
        flags: 0x7172_7374,
        buf_alloc: 0x8182_8384,
        fwd_cnt: 0x9192_9394,
    };
    let raw = header.encode();
    assert_eq!(Header::decode(&raw), header);
    assert_eq!(HEADER_LEN, virtio_vsock::packet::PKT_HEADER_SIZE);
    let mut place = [0; HEADER_LEN];
    // SAFETY: `place` outlives the packet and nobody else uses it meanwhile.
    let mut packet = unsafe { virtio_vsock::packet::VsockPacket::new(&mut place, None) }.unwrap();
    packet.set_header_from_raw(&raw).unwrap();
    assert_eq!(packet.src_cid(), header.src_cid);
    assert_eq!(packet.dst_cid(), header.dst_cid);
    assert_eq!(packet.src_port(), header.src_port);
    assert_eq!(packet.dst_port(), header.dst_port);
    assert_eq!(packet.len(), header.len);
    assert_eq!(packet.type_(), header.socket_type);
    assert_eq!(packet.op(), header.op);
    assert_eq!(packet.flags(), header.flags);
    assert_eq!(packet.buf_alloc(), header.buf_alloc);
    assert_eq!(packet.fwd_cnt(), header.fwd_cnt);
}

/// Not a check but a measurement: `cargo test --release vsock::tests::measure -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn measure() {
    let dir = dir();
    let mut guest = Guest::boot(binding(&dir));
    guest.echo_ports.insert(9);
    guest.sink_ports.insert(8);
    let path = binding(&dir).path;
    let report = with_host(&mut guest, "measurement", move || {
        let mut stream = dial(&path, 9);
        answer(&mut stream).unwrap();
        let mut times: Vec<_> = (0..5000)
            .map(|_| {
                let start = Instant::now();
                stream.write_all(&[1; 64]).unwrap();
                stream.read_exact(&mut [0; 64]).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort();
        let start = Instant::now();
        let data = vec![5; 64 << 20];
        let len = data.len();
        assert_eq!(echo(&stream, data).len(), len);
        let both = start.elapsed();
        let megabytes = 2.0 * (len >> 20) as f64 / both.as_secs_f64();
        format!(
            "echo p50 {:?} p99 {:?}; both ways {megabytes:.0} MiB/s",
            times[2500], times[4950]
        )
    });
    println!("{report}");
}
