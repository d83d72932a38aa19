//! The host's side against an agent that lies, stalls or babbles: an error of the right kind by
//! the deadline, and no memory or thread lost on it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use offshoot::ErrorKind;
use offshoot::agent::{Agent, Command, Generation, Identity, Settings, WriteOptions};
use offshoot_protocol::agent::frame::{HEADER, MAX_PAYLOAD};
use offshoot_protocol::agent::{Entry, EntryKind, Header, JobId, RawKind, Reply, Report, VERSION};

use crate::rig::within;

/// A handle whose agent is this function, called with each connection after its Hello.
fn lying(act: impl Fn(&mut UnixStream) + Send + Sync + Clone + 'static) -> Agent {
    before_hello(move |stream| {
        let hello = Reply::Hello {
            version: VERSION,
            generation: Generation::NONE,
        };
        let _ = stream.write_all(&hello.to_frame().unwrap());
        swallow(stream);
        act(stream);
    })
}

fn before_hello(act: impl Fn(&mut UnixStream) + Send + Sync + Clone + 'static) -> Agent {
    Agent::over(move |_: Instant| {
        let (ours, mut theirs) = UnixStream::pair()?;
        let act = act.clone();
        thread::spawn(move || {
            swallow(&mut theirs);
            act(&mut theirs);
        });
        Ok(ours)
    })
}

/// Reads one frame.
fn swallow(stream: &mut UnixStream) {
    let mut header = [0; HEADER];
    if stream.read_exact(&mut header).is_ok() {
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0; header.len];
        let _ = stream.read_exact(&mut payload);
    }
}

/// Keeps the stream open without a word.
fn stall(stream: &mut UnixStream) {
    let _ = stream.read(&mut [0]);
    thread::sleep(Duration::from_secs(5));
}

#[track_caller]
fn costs_its_deadline<T: std::fmt::Debug>(
    kinds: &[ErrorKind],
    call: impl FnOnce(Instant) -> Result<T, offshoot::Error>,
) {
    let started = Instant::now();
    let error = call(within(300)).unwrap_err();
    let took = started.elapsed();
    assert!(
        kinds.contains(&error.kind()),
        "{error} ({:?})",
        error.kind()
    );
    assert!(took < Duration::from_secs(2), "{took:?} for {error}");
}

const LATE: &[ErrorKind] = &[ErrorKind::TimedOut];
const LIE: &[ErrorKind] = &[ErrorKind::Untrustworthy];

#[test]
fn silence_costs_the_deadline_at_every_point() {
    for agent in [before_hello(stall), lying(stall)] {
        costs_its_deadline(LATE, |by| agent.ping(by));
        costs_its_deadline(LATE, |by| agent.read_file("/x", 10, by));
        costs_its_deadline(LATE, |by| agent.write_file("/x", b"", by));
        costs_its_deadline(LATE, |by| agent.run(&Command::shell("x"), b"in", 10, by));
    }
    // A byte now and then does not buy time, be it in the header or in the payload.
    let drip = lying(|stream| {
        let frame = Reply::Done {}.to_frame().unwrap();
        for byte in frame.iter().take(HEADER - 1) {
            let _ = stream.write_all(&[*byte]);
            thread::sleep(Duration::from_millis(100));
        }
        stall(stream);
    });
    costs_its_deadline(LATE, |by| drip.ping(by));
    let cut = lying(|stream| {
        let _ = stream.write_all(&Header::encode(131, 1000).unwrap());
        let _ = stream.write_all(&[0; 999]);
        stall(stream);
    });
    costs_its_deadline(LATE, |by| cut.metrics(&[], by));
    let nobody = Agent::at_socket("/no/such/socket");
    costs_its_deadline(LATE, |by| nobody.ping(by));
    let nobody = Agent::at_vsock("/no/such/socket");
    costs_its_deadline(LATE, |by| nobody.ping(by));
}

#[test]
fn a_vsock_that_accepts_and_says_nothing_costs_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let agent = Agent::at_vsock(&path);
    // More than the backlog takes: those that are not even accepted included.
    thread::scope(|scope| {
        for _ in 0..140 {
            scope.spawn(|| costs_its_deadline(LATE, |by| agent.ping(by)));
        }
    });
    drop(listener);
}

#[test]
fn garbage_is_an_error_at_once() {
    let seed = Mutex::new(1u64);
    let seed: &'static Mutex<u64> = Box::leak(Box::new(seed));
    let babble = move |stream: &mut UnixStream| {
        let mut state = {
            let mut seed = seed.lock().unwrap();
            *seed += 1;
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        };
        let bytes: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let _ = stream.write_all(&bytes);
    };
    for agent in [before_hello(babble), lying(babble)] {
        for _ in 0..50 {
            costs_its_deadline(LIE, |by| agent.ping(by));
            costs_its_deadline(LIE, |by| agent.list("/", by));
            costs_its_deadline(LIE, |by| agent.run(&Command::shell("x"), b"", 10, by));
        }
    }
}

#[test]
fn lengths_are_not_believed() {
    for len in [u32::MAX, MAX_PAYLOAD as u32 + 1] {
        let agent = lying(move |stream| {
            let mut header = Header::encode(132, 0).unwrap();
            header[..4].copy_from_slice(&len.to_le_bytes());
            let _ = stream.write_all(&header);
            stall(stream);
        });
        costs_its_deadline(LIE, |by| agent.ping(by));
    }
    // A count of four billion in a short message.
    let agent = lying(|stream| {
        let _ = stream.write_all(&Header::encode(136, 4).unwrap());
        let _ = stream.write_all(&[0xff; 4]);
        stall(stream);
    });
    costs_its_deadline(LIE, |by| agent.jobs(by));
}

#[test]
fn answers_to_other_questions_are_lies() {
    let other = lying(|stream| {
        let _ = stream.write_all(&Reply::Finished { bytes: 0 }.to_frame().unwrap());
        stall(stream);
    });
    costs_its_deadline(LIE, |by| other.ping(by));
    costs_its_deadline(LIE, |by| other.metrics(&[], by));
    costs_its_deadline(LIE, |by| other.start(&Command::shell("x"), by));
    costs_its_deadline(LIE, |by| other.attach(JobId(1), 0, by));
    costs_its_deadline(LIE, |by| other.read_file("/x", 1, by));
    costs_its_deadline(LIE, |by| other.write_file("/x", b"x", by));
    // Ready, but for another generation.
    let ready = lying(|stream| {
        let report = Report {
            generation: Generation([1; 16]),
            steps: Vec::new(),
            micros: 0,
        };
        let _ = stream.write_all(&Reply::Ready { report }.to_frame().unwrap());
        stall(stream);
    });
    let identity = Identity {
        generation: Generation([2; 16]),
        unix_ns: 0,
        seed: vec![0; 32],
        settings: Settings::default(),
        hook_limit_ms: 0,
    };
    costs_its_deadline(LIE, |by| ready.identify(&identity, by));
    // A version that nobody offered.
    let version = before_hello(|stream| {
        let hello = Reply::Hello {
            version: 9,
            generation: Generation::NONE,
        };
        let _ = stream.write_all(&hello.to_frame().unwrap());
        stall(stream);
    });
    costs_its_deadline(LIE, |by| version.ping(by));
}

fn data(stream: &mut UnixStream, kind: RawKind, len: usize) -> bool {
    let header = Header::encode(kind as u16, len).unwrap();
    stream.write_all(&header).is_ok() && stream.write_all(&vec![b'x'; len]).is_ok()
}

#[test]
fn streams_without_end_are_bounded() {
    let file = lying(|stream| {
        let _ = stream.write_all(&Reply::Opened { size: 1 }.to_frame().unwrap());
        while data(stream, RawKind::Data, 65536) {}
    });
    costs_its_deadline(LIE, |by| file.read_file("/x", 1 << 20, by));
    let output = lying(|stream| {
        let started = Reply::Started {
            job: JobId(1),
            pid: 1,
        };
        let _ = stream.write_all(&started.to_frame().unwrap());
        while data(stream, RawKind::Stderr, 65536) {}
    });
    costs_its_deadline(&[ErrorKind::TooLarge], |by| {
        output.run(
            &Command::shell("x"),
            b"input that nobody takes",
            1 << 20,
            by,
        )
    });
    // Empty frames cost the deadline and nothing else.
    let empty = lying(|stream| {
        let _ = stream.write_all(&Reply::Opened { size: 1 }.to_frame().unwrap());
        while data(stream, RawKind::Data, 0) {}
    });
    let started = Instant::now();
    assert!(empty.read_file("/x", 1 << 20, within(300)).is_err());
    assert!(started.elapsed() < Duration::from_secs(2));
    let entries = lying(|stream| {
        let entry = entry(b"x");
        let entries = vec![entry; 1000];
        let frame = Reply::Entries { entries }.to_frame().unwrap();
        while stream.write_all(&frame).is_ok() {}
    });
    let error = entries.list("/", within(20_000)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

fn entry(name: &[u8]) -> Entry {
    Entry {
        name: name.to_vec(),
        kind: EntryKind::File,
        mode: 0,
        uid: 0,
        gid: 0,
        size: 0,
        modified_unix_ns: 0,
        target: Vec::new(),
    }
}

#[test]
fn names_that_lead_elsewhere_are_lies() {
    for name in ["..", ".", "", "/etc/passwd", "a/b", "a\0"] {
        let agent = lying(move |stream| {
            let entries = vec![entry(name.as_bytes())];
            let _ = stream.write_all(&Reply::Entries { entries }.to_frame().unwrap());
            let _ = stream.write_all(&Header::encode(RawKind::End as u16, 0).unwrap());
        });
        costs_its_deadline(LIE, |by| agent.list("/", by));
    }
}

#[test]
fn a_guest_that_takes_nothing_costs_the_writer_its_deadline() {
    let agent = lying(|stream| {
        let _ = stream.write_all(&Reply::Opened { size: 0 }.to_frame().unwrap());
        thread::sleep(Duration::from_secs(5));
    });
    costs_its_deadline(LATE, |by| {
        agent.write_from("/x", &WriteOptions::default(), &mut std::io::repeat(0), by)
    });
    let agent = lying(|stream| {
        let started = Reply::Started {
            job: JobId(1),
            pid: 1,
        };
        let _ = stream.write_all(&started.to_frame().unwrap());
        thread::sleep(Duration::from_secs(5));
    });
    let input = vec![0; 8 << 20];
    costs_its_deadline(LATE, |by| agent.run(&Command::shell("x"), &input, 10, by));
}
