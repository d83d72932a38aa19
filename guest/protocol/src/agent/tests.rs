//! Round trips of every message, and bytes that no honest peer sends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "tests fail by panicking"
)]

mod strategy;

use std::vec::Vec;

use proptest::prelude::*;

use super::frame::{HEADER, MAGIC, MAX_PAYLOAD, MAX_RAW};
use super::*;
use crate::{WireErrorKind, Writer};

fn split(frame: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = frame.split_first_chunk::<HEADER>().unwrap();
    let header = Header::decode(head).unwrap();
    assert_eq!(header.len, payload.len());
    (header, payload)
}

fn put(put: impl Fn(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = std::vec![0; MAX_PAYLOAD];
    let mut writer = Writer::new(&mut bytes);
    put(&mut writer);
    let written = writer.written();
    bytes.truncate(written);
    bytes
}

proptest! {
    #[test]
    fn requests_survive_and_cut_ones_are_refused(request in strategy::request(), cut in any::<prop::sample::Index>()) {
        let frame = request.to_frame().unwrap();
        let (header, payload) = split(&frame);
        prop_assert_eq!(header.kind, request.kind());
        prop_assert_eq!(Request::decode(header.kind, payload), Ok(request));
        if !payload.is_empty() {
            let cut = cut.index(payload.len());
            let error = Request::decode(header.kind, &payload[..cut]).unwrap_err();
            prop_assert_eq!(error.kind, WireErrorKind::Truncated);
        }
        let longer = [payload, &[0]].concat();
        prop_assert_eq!(Request::decode(header.kind, &longer).unwrap_err().kind, WireErrorKind::LeftOver);
    }

    #[test]
    fn replies_survive_and_cut_ones_are_refused(reply in strategy::reply(), cut in any::<prop::sample::Index>()) {
        let frame = reply.to_frame().unwrap();
        let (header, payload) = split(&frame);
        prop_assert_eq!(Reply::decode(header.kind, payload), Ok(reply));
        if !payload.is_empty() {
            let cut = cut.index(payload.len());
            prop_assert!(Reply::decode(header.kind, &payload[..cut]).is_err());
        }
    }

    /// Arbitrary bytes are an error or mean exactly what they say.
    #[test]
    fn arbitrary_payloads_never_panic(
        request in prop::sample::select(Request::KINDS), reply in prop::sample::select(Reply::KINDS),
        payload in prop::collection::vec(prop_oneof![3 => Just(0u8), 2 => 0u8..5, 1 => any::<u8>()], 0..300),
    ) {
        if let Ok(message) = Request::decode(request.0, &payload) {
            prop_assert_eq!(put(|writer| message.put(writer).unwrap()), payload.clone());
        }
        if let Ok(message) = Reply::decode(reply.0, &payload) {
            prop_assert_eq!(put(|writer| message.put(writer).unwrap()), payload);
        }
    }

    #[test]
    fn one_wrong_byte_never_panics(request in strategy::request(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let frame = request.to_frame().unwrap();
        let (header, payload) = split(&frame);
        let mut spoilt = payload.to_vec();
        if !spoilt.is_empty() {
            let at = at.index(spoilt.len());
            spoilt[at] ^= flip;
            if let Ok(message) = Request::decode(header.kind, &spoilt) {
                prop_assert_eq!(put(|writer| message.put(writer).unwrap()), spoilt);
            }
        }
    }

    #[test]
    fn headers_hold_to_their_bounds(bytes in any::<[u8; HEADER]>(), len in any::<u32>(), kind in any::<u16>()) {
        let _ = Header::decode(&bytes);
        let mut good = [0; HEADER];
        good[..4].copy_from_slice(&len.to_le_bytes());
        good[4..6].copy_from_slice(&MAGIC.to_le_bytes());
        good[6..].copy_from_slice(&kind.to_le_bytes());
        if let Ok(header) = Header::decode(&good) {
            prop_assert!(header.len <= MAX_PAYLOAD);
            prop_assert!(RawKind::of(kind).is_none() || header.len <= MAX_RAW);
            prop_assert_eq!(Header::encode(header.kind, header.len), Ok(good));
        }
    }
}

/// Version 1. A change here breaks every agent that is already in a snapshot or an image.
#[test]
fn kinds_are_frozen() {
    let requests: Vec<_> = Request::KINDS.to_vec();
    assert_eq!(
        requests,
        [
            (1, "Hello"),
            (2, "Identify"),
            (3, "Configure"),
            (4, "Metrics"),
            (5, "SetClock"),
            (6, "Sync"),
            (7, "Power"),
            (8, "Ping"),
            (16, "Exec"),
            (17, "Attach"),
            (18, "Jobs"),
            (19, "Signal"),
            (20, "Resize"),
            (21, "Forget"),
            (32, "Read"),
            (33, "Write"),
            (34, "Stat"),
            (35, "List"),
            (36, "MakeDir"),
            (37, "Remove"),
            (38, "Rename"),
        ]
    );
    let replies: Vec<_> = Reply::KINDS.to_vec();
    assert_eq!(
        replies,
        [
            (129, "Hello"),
            (130, "Ready"),
            (131, "Metrics"),
            (132, "Done"),
            (133, "Started"),
            (134, "Attached"),
            (135, "Exited"),
            (136, "Jobs"),
            (137, "Opened"),
            (138, "Finished"),
            (139, "Stat"),
            (140, "Entries"),
            (255, "Refused"),
        ]
    );
    let raw: Vec<_> = RawKind::ALL.iter().map(|kind| *kind as u16).collect();
    assert_eq!(raw, [64, 65, 66, 67]);
    assert_eq!((PORT, VERSION, OLDEST_VERSION), (1001, 1, 1));
}

/// The bytes of one message of each shape, as `docs/agent.md` has them.
#[test]
fn layouts_are_frozen() {
    let hello = Request::Hello {
        oldest: 1,
        newest: 2,
        generation: Generation([7; 16]),
    };
    let expected = [
        [20, 0, 0, 0, 0x4f, 0x41, 1, 0, 1, 0, 2, 0].as_slice(),
        &[7; 16],
    ]
    .concat();
    assert_eq!(hello.to_frame().unwrap(), expected);

    let refused = Reply::Refused {
        refusal: Refusal {
            code: ErrorCode::Os,
            errno: 2,
            detail: b"ab".to_vec(),
        },
    };
    assert_eq!(
        refused.to_frame().unwrap(),
        [
            11, 0, 0, 0, 0x4f, 0x41, 255, 0, 10, 2, 0, 0, 0, 2, 0, 0, 0, b'a', b'b'
        ]
    );

    let write = Request::Write {
        path: b"/x".to_vec(),
        how: WriteMode::Append,
        mode: Some(0o600),
        owner: None,
        sync: true,
    };
    assert_eq!(
        write.to_frame().unwrap()[HEADER..],
        [2, 0, 0, 0, b'/', b'x', 2, 1, 0x80, 1, 0, 0, 0, 1]
    );
}

#[test]
fn a_count_without_items_costs_its_sender_only() {
    // Four billion arguments are announced, and none comes.
    let payload = [0xff; 4];
    let error = Request::decode(16, &payload).unwrap_err();
    assert_eq!(error.kind, WireErrorKind::Truncated);
}

#[test]
fn messages_above_the_bound_are_not_written() {
    let request = Request::Stat {
        path: std::vec![b'x'; MAX_PAYLOAD],
        follow: false,
    };
    assert_eq!(request.to_frame().unwrap_err().kind, WireErrorKind::TooLong);
    let request = Request::Stat {
        path: std::vec![b'x'; MAX_PAYLOAD - 5],
        follow: false,
    };
    assert_eq!(request.to_frame().unwrap().len(), HEADER + MAX_PAYLOAD);
    assert!(Header::encode(RawKind::Data as u16, MAX_RAW + 1).is_err());
    assert!(Header::encode(RawKind::End as u16, 1).is_err());
}

#[test]
fn a_refusal_cannot_steer_a_terminal() {
    let refusal = Refusal {
        code: ErrorCode::Os,
        errno: 5,
        detail: b"\x1b[2Jgone\xff\n".to_vec(),
    };
    assert_eq!(std::format!("{refusal}"), "os, error 5: [2Jgone");
}
