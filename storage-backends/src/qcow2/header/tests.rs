use super::*;
use crate::qcow2::format::{NewImage, write_new};
use crate::qcow2::tables::ReadAt;

/// The bytes of an image of ours, with a backing file.
fn image() -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let new = NewImage {
        size: 10 << 30,
        cluster_bits: 16,
        backing: Some("../layers/base.qcow2"),
    };
    write_new(&file, &new).unwrap();
    let mut bytes = vec![0; usize::try_from(file.length().unwrap()).unwrap()];
    file.fill_at(&mut bytes, 0).unwrap();
    bytes
}

fn check(bytes: &[u8]) -> Result<Header, HeaderError> {
    check_header(bytes, bytes.len() as u64)
}

#[test]
fn what_we_write_passes_and_reads_back() {
    let header = check(&image()).unwrap();
    assert_eq!(
        (header.version, header.cluster_bits, header.size),
        (3, 16, 10 << 30)
    );
    assert_eq!(header.l1_entries, 20);
    let backing = header.backing.unwrap();
    assert_eq!(
        (backing.name.as_str(), backing.format.as_deref()),
        ("../layers/base.qcow2", Some("qcow2"))
    );
}

/// Each rule, broken alone: offset, bytes that are written there, the field that is named.
#[test]
fn each_broken_rule_is_named() {
    let fields: &[(usize, &[u8], &str, Fault)] = &[
        (0, b"QFI\xfa", "magic", Fault::NotQcow2),
        (4, &4_u32.to_be_bytes(), "version", Fault::Unsupported),
        (4, &1_u32.to_be_bytes(), "version", Fault::Unsupported),
        (
            8,
            &100_u64.to_be_bytes(),
            "backing_file_offset",
            Fault::Damaged,
        ),
        (
            8,
            &(65_536_u64 + 8).to_be_bytes(),
            "backing_file_offset",
            Fault::Damaged,
        ),
        (
            16,
            &0_u32.to_be_bytes(),
            "backing_file_size",
            Fault::Damaged,
        ),
        (
            16,
            &1024_u32.to_be_bytes(),
            "backing_file_size",
            Fault::Damaged,
        ),
        (20, &8_u32.to_be_bytes(), "cluster_bits", Fault::Damaged),
        (20, &22_u32.to_be_bytes(), "cluster_bits", Fault::Damaged),
        (20, &u32::MAX.to_be_bytes(), "cluster_bits", Fault::Damaged),
        (24, &u64::MAX.to_be_bytes(), "l1_size", Fault::Damaged),
        (32, &1_u32.to_be_bytes(), "crypt_method", Fault::Unsupported),
        (36, &19_u32.to_be_bytes(), "l1_size", Fault::Damaged),
        (36, &u32::MAX.to_be_bytes(), "l1_size", Fault::Unsupported),
        (
            36,
            &16_384_u32.to_be_bytes(),
            "l1_table_offset",
            Fault::Damaged,
        ),
        (40, &0_u64.to_be_bytes(), "l1_table_offset", Fault::Damaged),
        (
            40,
            &512_u64.to_be_bytes(),
            "l1_table_offset",
            Fault::Damaged,
        ),
        (
            40,
            &(1_u64 << 40).to_be_bytes(),
            "l1_table_offset",
            Fault::Damaged,
        ),
        (
            40,
            &(u64::MAX << 16).to_be_bytes(),
            "l1_table_offset",
            Fault::Damaged,
        ),
        (
            48,
            &0_u64.to_be_bytes(),
            "refcount_table_offset",
            Fault::Damaged,
        ),
        (
            48,
            &(u64::MAX << 16).to_be_bytes(),
            "refcount_table_offset",
            Fault::Damaged,
        ),
        (
            56,
            &0_u32.to_be_bytes(),
            "refcount_table_clusters",
            Fault::Damaged,
        ),
        (
            56,
            &129_u32.to_be_bytes(),
            "refcount_table_clusters",
            Fault::Damaged,
        ),
        (
            56,
            &100_u32.to_be_bytes(),
            "refcount_table_offset",
            Fault::Damaged,
        ),
        (60, &1_u32.to_be_bytes(), "nb_snapshots", Fault::Unsupported),
        (
            72,
            &1_u64.to_be_bytes(),
            "incompatible_features",
            Fault::Unsupported,
        ),
        (
            72,
            &2_u64.to_be_bytes(),
            "incompatible_features",
            Fault::Damaged,
        ),
        (
            72,
            &4_u64.to_be_bytes(),
            "incompatible_features",
            Fault::Unsupported,
        ),
        (
            72,
            &8_u64.to_be_bytes(),
            "incompatible_features",
            Fault::Unsupported,
        ),
        (
            72,
            &16_u64.to_be_bytes(),
            "incompatible_features",
            Fault::Unsupported,
        ),
        (
            72,
            &(1_u64 << 63).to_be_bytes(),
            "incompatible_features",
            Fault::Unsupported,
        ),
        (
            88,
            &2_u64.to_be_bytes(),
            "autoclear_features",
            Fault::Damaged,
        ),
        (96, &7_u32.to_be_bytes(), "refcount_order", Fault::Damaged),
        (100, &72_u32.to_be_bytes(), "header_length", Fault::Damaged),
        (100, &105_u32.to_be_bytes(), "header_length", Fault::Damaged),
        (
            100,
            &(1_u32 << 20).to_be_bytes(),
            "header_length",
            Fault::Damaged,
        ),
        (104, &[1], "compression_type", Fault::Damaged),
        (
            112,
            &0x0537_be77_u32.to_be_bytes(),
            "header extension type",
            Fault::Unsupported,
        ),
        (
            112,
            &0x4441_5441_u32.to_be_bytes(),
            "header extension type",
            Fault::Unsupported,
        ),
        (
            116,
            &u32::MAX.to_be_bytes(),
            "header extension length",
            Fault::Damaged,
        ),
        // The name's first byte.
        (136, &[0xff], "backing_file_offset", Fault::Damaged),
        (136, &[0], "backing_file_offset", Fault::Damaged),
    ];
    for (at, value, field, fault) in fields {
        let mut bytes = image();
        bytes[*at..*at + value.len()].copy_from_slice(value);
        let error = check(&bytes).unwrap_err();
        assert_eq!(
            (error.field, error.fault),
            (*field, *fault),
            "{value:x?} at {at}: {error}"
        );
    }
}

#[test]
fn harmless_features_and_unknown_extensions_pass() {
    let changes: &[(usize, &[u8])] = &[
        (80, &1_u64.to_be_bytes()),            // lazy refcounts, not dirty
        (80, &(1_u64 << 40).to_be_bytes()),    // unknown compatible feature
        (88, &(1_u64 << 40).to_be_bytes()),    // unknown autoclear feature
        (112, &0x1234_5678_u32.to_be_bytes()), // the backing format becomes an unknown extension
    ];
    for (at, value) in changes {
        let mut bytes = image();
        bytes[*at..*at + value.len()].copy_from_slice(value);
        check(&bytes).unwrap();
    }
    // Without the extension the format is unknown, never guessed.
    let mut bytes = image();
    bytes[112..116].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    assert_eq!(check(&bytes).unwrap().backing.unwrap().format, None);
}

#[test]
fn every_truncation_is_refused_or_still_sound() {
    let bytes = image();
    for len in 0..300 {
        let error = check_header(&bytes[..len], bytes.len() as u64);
        if len < 156 {
            assert!(error.is_err(), "{len} bytes of a header passed");
        }
        // The file itself cut short: its tables are gone.
        assert!(check_header(&bytes[..len], len as u64).is_err());
    }
}

#[test]
fn no_mutation_of_a_header_panics() {
    let image = image();
    let mut bytes = image[..512].to_vec();
    let mut state = 1_u64;
    for round in 0..200_000_u64 {
        let at = (state % 512) as usize;
        bytes[at] ^= (state >> 32) as u8;
        let _ = check_header(&bytes, image.len() as u64);
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(round | 1);
        if round % 5 == 0 {
            bytes.copy_from_slice(&image[..512]);
        }
    }
}
