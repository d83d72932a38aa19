use super::*;

fn sample() -> Header {
    Header {
        format_version: 1,
        minimum_reader: 1,
        flags: 0,
        total_length: 0x0102_0304,
        table_offset: 128,
        section_count: 5,
        table_checksum: 0xdead_beef,
        id: SnapshotId::from_bytes(*b"0123456789abcdef"),
        created: Timestamp::from_unix_ms(0x0a0b_0c0d).unwrap(),
    }
}

/// `bytes` with a checksum that matches again.
fn resealed(mut bytes: [u8; HEADER_LEN]) -> [u8; HEADER_LEN] {
    let sum = crc32c::crc32c(&bytes[..124]).to_le_bytes();
    bytes[124..].copy_from_slice(&sum);
    bytes
}

#[test]
fn bytes_are_as_documented() {
    let bytes = sample().encode();
    assert_eq!(&bytes[..8], b"\x89OFFSNAP");
    assert_eq!(&bytes[8..16], [1, 0, 1, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[16..24], [4, 3, 2, 1, 0, 0, 0, 0]);
    assert_eq!(&bytes[24..32], [128, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[32..40], [5, 0, 0, 0, 0xef, 0xbe, 0xad, 0xde]);
    assert_eq!(&bytes[40..56], b"0123456789abcdef");
    assert_eq!(&bytes[56..64], [0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0]);
    assert_eq!(&bytes[64..124], [0; 60]);
    assert_eq!(bytes, resealed(bytes));
    assert_eq!(Header::parse(&bytes).unwrap(), sample());
}

#[test]
fn crc_is_castagnoli() {
    // RFC 3720, B.4: 32 bytes of zeros.
    assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
}

#[test]
fn every_cut_names_the_field() {
    let bytes = sample().encode();
    for len in 0..HEADER_LEN {
        let error = Header::parse(&bytes[..len]).unwrap_err();
        let Place::Header(name) = error.place() else {
            panic!("cut at {len}: {error}");
        };
        let field = FIELDS.iter().find(|f| f.name == name).unwrap();
        assert!((field.offset..field.offset + field.size).contains(&len));
    }
}

#[test]
fn a_later_header_is_shown_but_not_read() {
    let mut bytes = sample().encode();
    bytes[8] = 9;
    bytes[10] = 9;
    bytes[100] = 1; // reserved today
    let header = Header::parse(&resealed(bytes)).unwrap();
    assert_eq!(header.format_version, 9);
    let error = header.check_readable().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Version);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("format 9"), "{source}");

    bytes[10] = 1; // ... but it may be read when its writer says so.
    let header = Header::parse(&resealed(bytes)).unwrap();
    header.check_readable().unwrap();
}

#[test]
fn broken_rules_are_named() {
    let cases: [(usize, &[u8], &str, ErrorKind); 9] = [
        (8, &[0, 0, 0, 0], "minimum reader", ErrorKind::Malformed),
        (10, &[2, 0], "minimum reader", ErrorKind::Malformed),
        (12, &[1], "flags", ErrorKind::Version),
        (19, &[0xff], "total length", ErrorKind::Malformed),
        (24, &[144], "table offset", ErrorKind::Malformed),
        (32, &[3], "section count", ErrorKind::Malformed),
        (32, &[1, 4], "section count", ErrorKind::Malformed),
        (63, &[1], "created", ErrorKind::Malformed),
        (64, &[1], "reserved", ErrorKind::Malformed),
    ];
    for (offset, value, name, kind) in cases {
        let mut bytes = sample().encode();
        bytes[offset..offset + value.len()].copy_from_slice(value);
        let error = Header::parse(&resealed(bytes))
            .and_then(|h| h.check_readable())
            .unwrap_err();
        assert_eq!(error.place(), Place::Header(name));
        assert_eq!(error.kind(), kind);
    }
}

#[test]
fn unknown_flags_that_may_be_ignored_are() {
    let mut bytes = sample().encode();
    bytes[14] = 1;
    let header = Header::parse(&resealed(bytes)).unwrap();
    header.check_readable().unwrap();
}
