//! Round trips of every message in both forms, and bytes and lines that no honest peer sends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "tests fail by panicking"
)]

use std::format;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use crate::frame::{self, HEADER, Header, MAX_FRAME, MAX_PAYLOAD};
use crate::*;

fn requests() -> Vec<Request> {
    let mut all = vec![
        Request::Hello {
            oldest: 1,
            newest: 3,
        },
        Request::State {},
        Request::Fill {
            offset: 8,
            len: 64,
            seed: u64::MAX,
        },
        Request::Verify {
            offset: 0,
            len: u64::MAX,
            seed: 7,
        },
        Request::Touch {
            offset: 0,
            len: 4096,
        },
        Request::Dirty {
            offset: 0,
            len: 4096,
            rate: 1000,
        },
        Request::NetAddress {
            device: 1,
            ip: Ipv4([10, 0, 0, 255]),
        },
        Request::NetPing {
            device: 0,
            frames: 5,
            len: 64,
            peer: Mac([1, 2, 3, 0xab, 0xcd, 0xef]),
        },
        Request::NetSend {
            device: 0,
            frames: u32::MAX,
            len: 1500,
            peer: Mac([0xff; 6]),
        },
        Request::VsockConnect {
            port: 5000,
            len: 1 << 20,
            seed: 3,
        },
        Request::Random { len: 64 },
        Request::Spin { turns: 1_000_000 },
        Request::Reboot {},
        Request::Balloon {},
        Request::Report {
            offset: 4096,
            len: 8192,
        },
    ];
    all.extend(BlkOp::ALL.iter().map(|op| Request::Blk {
        device: 2,
        op: *op,
        offset: 512,
        len: 1 << 40,
        seed: 9,
        chunk: 4096,
        depth: 20,
    }));
    all.extend(
        Mode::ALL
            .iter()
            .map(|mode| Request::SetMode { mode: *mode }),
    );
    all.extend(Crash::ALL.iter().map(|how| Request::Crash { how: *how }));
    all
}

/// A report with every list full: the longest message there is.
fn full_state() -> State {
    let mut state = State {
        counter: u64::MAX,
        boot_id: Id([0xa5; 16]),
        mode: Mode::Beacon,
        last_error: ErrorCode::Busy,
        connections: 7,
        ..State::default()
    };
    for n in 0..MAX_VCPUS {
        assert!(state.vcpus.push(n as u64));
    }
    for n in 0..MAX_DEVICES {
        let kind = DeviceKind::ALL[n % DeviceKind::ALL.len()];
        let device = Device {
            kind,
            window: n as u64,
            gsi: 5,
            features: u64::MAX,
            value: 1 << n,
        };
        assert!(state.devices.push(device));
    }
    assert!(
        !state.vcpus.push(0) && !state.devices.push(Device::default()),
        "lists are bounded"
    );
    state
}

fn replies() -> Vec<Reply> {
    let mut bytes = Bytes::default();
    assert!((0..64).all(|n| bytes.0.push(n)));
    let outcome = Outcome {
        bytes: 1,
        units: 2,
        received: 3,
        bad: 4,
        first_bad: u64::MAX,
        ticks: 6,
    };
    let mut all = vec![
        Reply::Hello { version: 1 },
        Reply::State {
            state: State::default(),
        },
        Reply::State {
            state: full_state(),
        },
        Reply::Done {},
        Reply::Outcome { outcome },
        Reply::Random {
            bytes: Bytes::default(),
        },
        Reply::Random { bytes },
    ];
    let codes = ErrorCode::ALL.iter();
    all.extend(codes.map(|code| Reply::Refused {
        code: *code,
        detail: u64::MAX,
    }));
    all
}

fn split(frame: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = frame.split_first_chunk::<HEADER>().unwrap();
    let header = Header::decode(head).unwrap();
    assert_eq!(header.len, payload.len());
    (header, payload)
}

#[test]
fn every_request_survives_both_forms() {
    for (tag, request) in (0..).zip(requests()) {
        let mut bytes = [0; MAX_FRAME];
        let len = frame::encode_request(&mut bytes, &request, tag).unwrap();
        let (header, payload) = split(&bytes[..len]);
        assert_eq!((header.kind, header.tag), (request.kind(), tag));
        assert_eq!(Request::decode(header.kind, payload), Ok(request));
        let line = request.to_string();
        assert!(line.len() < MAX_LINE, "{line}");
        assert_eq!(Request::parse(&line), Ok(request), "{line}");
    }
}

#[test]
fn every_reply_survives_both_forms_and_fits_its_frame() {
    for reply in replies() {
        let mut bytes = [0; MAX_FRAME];
        let len = frame::encode_reply(&mut bytes, &reply, 9).unwrap();
        let (header, payload) = split(&bytes[..len]);
        assert_eq!(Reply::decode(header.kind, payload), Ok(reply));
        assert_eq!(Reply::parse(&reply.to_string()), Ok(reply), "{reply}");
    }
}

#[test]
fn kinds_are_frozen() {
    // Version 1. A change here breaks every pilot that is already in a snapshot.
    let request_kinds: Vec<u16> = requests()[..15].iter().map(Request::kind).collect();
    assert_eq!(
        request_kinds,
        [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 16, 17, 18]
    );
    let mut bytes = [0; MAX_FRAME];
    let request = Request::Fill {
        offset: 0x10,
        len: 0x20,
        seed: 0x30,
    };
    let len = frame::encode_request(&mut bytes, &request, 0x0102_0304).unwrap();
    let expected = [
        [24, 0, 0, 0, 0x4f, 0x53, 3, 0].as_slice(),
        &[4, 3, 2, 1],
        &[
            0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0, 0,
        ],
    ];
    assert_eq!(bytes[..len], expected.concat());
}

#[test]
fn truncated_and_overlong_payloads_are_refused() {
    for request in requests() {
        let mut bytes = [0; MAX_FRAME];
        let len = frame::encode_request(&mut bytes, &request, 0).unwrap();
        let (header, payload) = split(&bytes[..len]);
        for cut in 0..payload.len() {
            let error = Request::decode(header.kind, &payload[..cut]).unwrap_err();
            assert_eq!(
                error.kind,
                WireErrorKind::Truncated,
                "{request} cut to {cut}"
            );
        }
        let longer = [payload, &[0]].concat();
        let error = Request::decode(header.kind, &longer).unwrap_err();
        assert_eq!(
            (error.kind, error.at),
            (WireErrorKind::LeftOver, payload.len())
        );
    }
    let mut bytes = [0; MAX_FRAME];
    let len = frame::encode_reply(
        &mut bytes,
        &Reply::State {
            state: full_state(),
        },
        0,
    )
    .unwrap();
    let (header, payload) = split(&bytes[..len]);
    for cut in 0..payload.len() {
        assert!(
            Reply::decode(header.kind, &payload[..cut]).is_err(),
            "cut to {cut}"
        );
    }
}

#[test]
fn a_count_above_the_list_is_refused() {
    let mut bytes = [0; MAX_FRAME];
    let len = frame::encode_reply(
        &mut bytes,
        &Reply::Random {
            bytes: Bytes::default(),
        },
        0,
    )
    .unwrap();
    let (header, _) = split(&bytes[..len]);
    let mut payload = vec![7; 256];
    payload[0] = 65;
    let error = Reply::decode(header.kind, &payload[..66]).unwrap_err();
    assert_eq!(
        error,
        WireError {
            kind: WireErrorKind::BadValue,
            at: 66
        }
    );
}

#[test]
fn headers_are_bounded() {
    let mut bytes = [0; MAX_FRAME];
    frame::encode_request(&mut bytes, &Request::State {}, 5).unwrap();
    let good: [u8; HEADER] = bytes[..HEADER].try_into().unwrap();
    assert_eq!(
        Header::decode(&good),
        Ok(Header {
            len: 0,
            kind: 2,
            tag: 5
        })
    );
    let mut long = good;
    long[..4].copy_from_slice(&u32::try_from(MAX_PAYLOAD + 1).unwrap().to_le_bytes());
    assert_eq!(
        Header::decode(&long).unwrap_err().kind,
        WireErrorKind::TooLong
    );
    long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        Header::decode(&long).unwrap_err().kind,
        WireErrorKind::TooLong
    );
    for at in 4..6 {
        let mut foreign = good;
        foreign[at] ^= 1;
        assert_eq!(
            Header::decode(&foreign).unwrap_err().kind,
            WireErrorKind::BadMagic
        );
    }
    let unknown = Request::decode(999, &[]).unwrap_err();
    assert_eq!(unknown.kind, WireErrorKind::UnknownMessage);
    let short = frame::encode_request(&mut [0; 13], &Request::Random { len: 1 }, 0);
    assert_eq!(short, Ok(13));
    let short = frame::encode_request(&mut [0; 12], &Request::Random { len: 1 }, 0);
    assert_eq!(short.unwrap_err().kind, WireErrorKind::TooLong);
}

#[test]
fn lines_have_defaults_and_errors_that_point() {
    let fill = Request::parse("  fill seed=0xff\r").unwrap();
    assert_eq!(
        fill,
        Request::Fill {
            offset: 0,
            len: u64::MAX,
            seed: 255
        }
    );
    assert_eq!(
        Request::parse("fill len=all seed=1 offset=8")
            .unwrap()
            .to_string(),
        "fill offset=8 len=18446744073709551615 seed=1"
    );
    for (line, kind, at) in [
        ("", WireErrorKind::UnknownMessage, 0),
        ("fil", WireErrorKind::UnknownMessage, 0),
        ("fill", WireErrorKind::Truncated, 0),
        ("fill seed=", WireErrorKind::BadValue, 0),
        ("fill seed=-1", WireErrorKind::BadValue, 0),
        ("fill seed=1 seed=2", WireErrorKind::BadValue, 7),
        ("fill seed=1 size=2", WireErrorKind::BadValue, 7),
        ("fill seed=1 offset", WireErrorKind::BadValue, 7),
        ("fill seed=18446744073709551616", WireErrorKind::BadValue, 0),
        ("mode mode=Halt", WireErrorKind::BadValue, 0),
        ("net-address ip=1.2.3", WireErrorKind::BadValue, 0),
        ("net-address ip=1.2.3.4.5", WireErrorKind::BadValue, 0),
        ("net-address ip=1.2.3.256", WireErrorKind::BadValue, 0),
        ("net-ping peer=1:2:3:4:5:6", WireErrorKind::BadValue, 0),
    ] {
        assert_eq!(
            Request::parse(line),
            Err(WireError { kind, at }),
            "{line:?}"
        );
    }
}

/// splitmix64: enough to make nonsense that repeats from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        pattern::word(self.0, 0)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % 1024).unwrap() % end
    }
}

#[test]
fn nonsense_is_an_error_or_means_what_it_says() {
    let mut random = Random(1);
    for _ in 0..200_000 {
        let len = random.below(80);
        let payload: Vec<u8> = (0..len).map(|_| random.byte()).collect();
        let kind = u16::from(random.byte() % 20);
        if let Ok(request) = Request::decode(kind, &payload) {
            let mut frame = [0; MAX_FRAME];
            let written = frame::encode_request(&mut frame, &request, 0).unwrap();
            assert_eq!(frame[HEADER..written], payload);
        }
        if let Ok(reply) = Reply::decode(128 + kind, &payload) {
            let mut frame = [0; MAX_FRAME];
            let written = frame::encode_reply(&mut frame, &reply, 0).unwrap();
            assert_eq!(frame[HEADER..written], payload);
        }
    }
}

#[test]
fn spoilt_lines_never_panic() {
    let mut random = Random(2);
    let lines: Vec<String> = requests()
        .iter()
        .map(ToString::to_string)
        .chain(replies().iter().map(ToString::to_string))
        .collect();
    for _ in 0..50_000 {
        let mut chars: Vec<char> = lines[random.below(lines.len())].chars().collect();
        for _ in 0..=random.next() % 3 {
            let at = random.below(chars.len());
            chars[at] = ['=', ' ', '0', ',', ':', 'é', '\u{0}', '-'][random.below(8)];
        }
        let line: String = chars.into_iter().collect();
        if let Ok(request) = Request::parse(&line) {
            assert_eq!(Request::parse(&request.to_string()), Ok(request));
        }
        if let Ok(reply) = Reply::parse(&line) {
            assert_eq!(Reply::parse(&reply.to_string()), Ok(reply));
        }
    }
}

#[test]
fn patterns_are_the_same_from_any_start_and_differ_by_seed() {
    let mut whole = [0; 4096];
    pattern::fill(&mut whole, 5, 1 << 40);
    let mut piece = [0; 64];
    pattern::fill(&mut piece, 5, (1 << 40) + 512);
    assert_eq!(whole[512..576], piece);
    assert_eq!(pattern::compare(&whole, 5, 1 << 40), (0, None));
    assert_eq!(pattern::compare(&whole, 6, 1 << 40), (512, Some(1 << 40)));
    assert_eq!(pattern::compare(&whole, 5, 0), (512, Some(0)));
    whole[800] ^= 1;
    assert_eq!(
        pattern::compare(&whole, 5, 1 << 40),
        (1, Some((1 << 40) + 800))
    );
    // The pattern on disks and in streams is frozen.
    assert_eq!(format!("{:016x}", pattern::word(0, 0)), "9ca066f1a4ab2eea");
}

#[test]
fn errors_say_what_and_where() {
    let error = WireError {
        kind: WireErrorKind::Truncated,
        at: 7,
    };
    assert_eq!(error.to_string(), "message ends too early (at byte 7)");
    assert_eq!(
        Refusal::new(ErrorCode::NoDevice, 2).to_string(),
        "no-device (2)"
    );
}
