use super::*;
use crate::qcow2::format::{NewImage, write_new};
use crate::qcow2::header::check_header;

/// The bytes of an empty image of 1 MiB with 512-byte clusters and its header. The L1 table has 32
/// entries and lies in cluster 3.
fn image() -> (Vec<u8>, Header) {
    let file = tempfile::tempfile().unwrap();
    let header = write_new(
        &file,
        &NewImage {
            size: 1 << 20,
            cluster_bits: 9,
            backing: None,
        },
    )
    .unwrap();
    let mut bytes = vec![0; usize::try_from(file.length().unwrap()).unwrap()];
    file.fill_at(&mut bytes, 0).unwrap();
    assert_eq!(check_header(&bytes, bytes.len() as u64).unwrap(), header);
    (bytes, header)
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Adds an L2 table in cluster 4 that maps guest cluster 1 to cluster 5.
fn with_data(bytes: &mut Vec<u8>) {
    bytes.resize(6 * 512, 0);
    put(bytes, 3 * 512, (4 * 512) | spec::COPIED);
    put(bytes, 4 * 512 + 8, (5 * 512) | spec::COPIED);
    for cluster in [4, 5] {
        bytes[2 * 512 + cluster * 2 + 1] = 1;
    }
}

fn rule(bytes: &[u8], header: &Header) -> String {
    match check_tables(bytes, header) {
        Err(TableError::Entry { table, rule, .. }) => format!("{table}: {rule}"),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_sound_image_passes_and_tells_what_it_maps() {
    let (mut bytes, header) = image();
    check_tables(&bytes, &header).unwrap();
    with_data(&mut bytes);
    check_tables(&bytes, &header).unwrap();
    let mut ranges = Vec::new();
    mapped_ranges(&bytes[..], &header, |at, len| ranges.push((at, len))).unwrap();
    assert_eq!(ranges, [(512, 512)]);
}

/// "Refcount table": a block that is listed twice, or that lies in another table, would make a
/// library that trusts it allocate in circles.
#[test]
fn refcount_tables_that_bite_their_tail_are_refused() {
    let used = "refcount table: points to a cluster that something else uses";
    for (index, offset, expected) in [
        (1, 2 * 512, used),
        (1, 512, used),
        (1, 3 * 512, used),
        (0, 512, used),
        (1, 6 * 512, "refcount table: must point inside the file"),
        (1, !511, "refcount table: must point inside the file"),
        (1, 4 * 512 + 1, "refcount table: reserved bits must be 0"),
    ] {
        let (mut bytes, header) = image();
        with_data(&mut bytes);
        put(&mut bytes, 512 + index * 8, offset);
        assert_eq!(
            rule(&bytes, &header),
            expected,
            "entry {index} = {offset:#x}"
        );
    }
}

#[test]
fn l1_and_l2_entries_that_break_a_rule_are_refused() {
    let used = "points to a cluster that something else uses";
    let inside = "must point inside the file";
    let reserved = "reserved bits must be 0";
    for (at, value, expected) in [
        // L1: the L2 table of the neighbour, the header's end of the file, reserved bits.
        (3 * 512 + 8, 4 * 512, format!("L1: {used}")),
        (3 * 512 + 8, 3 * 512, format!("L1: {used}")),
        (3 * 512 + 8, 7 * 512, format!("L1: {inside}")),
        (3 * 512 + 8, (4 * 512) | 1, format!("L1: {reserved}")),
        // L2: data in a table, data of another guest cluster, out of the file, reserved bits.
        (4 * 512, 2 * 512, format!("L2: {used}")),
        (4 * 512, 5 * 512, format!("L2: {used}")),
        (4 * 512, (5 * 512) | spec::L2_ZERO, format!("L2: {used}")),
        (4 * 512, 6 * 512, format!("L2: {inside}")),
        (4 * 512, (5 * 512) | 2, format!("L2: {reserved}")),
        // A compressed cluster in the header, and one marked as owned.
        (4 * 512, spec::L2_COMPRESSED, format!("L2: {used}")),
        (
            4 * 512,
            spec::L2_COMPRESSED | spec::COPIED | (5 * 512),
            "L2: a compressed cluster must not be marked as owned".to_owned(),
        ),
    ] {
        let (mut bytes, header) = image();
        with_data(&mut bytes);
        put(&mut bytes, at, value);
        assert_eq!(rule(&bytes, &header), expected, "{value:#x} at {at:#x}");
    }
}

#[test]
fn an_enormous_sparse_file_is_refused_without_being_read() {
    let file = tempfile::tempfile().unwrap();
    let header = write_new(
        &file,
        &NewImage {
            size: 1 << 20,
            cluster_bits: 9,
            backing: None,
        },
    )
    .unwrap();
    file.set_len(1 << 41).unwrap();
    let error = walk(&file, &header).unwrap_err();
    assert!(
        matches!(
            error,
            TableError::TooLarge {
                what: "the number of clusters",
                ..
            }
        ),
        "{error}"
    );
}

/// Any byte of a sound image changed to any of a few values: never a panic, and what passes is walked
/// to its end.
#[test]
fn mutated_tables_never_panic() {
    let (mut bytes, header) = image();
    with_data(&mut bytes);
    let mut refused = 0;
    for at in 512..bytes.len() {
        for value in [0x00, 0x01, 0x40, 0x80, 0xff] {
            let before = std::mem::replace(&mut bytes[at], value);
            refused += u32::from(check_tables(&bytes, &header).is_err());
            bytes[at] = before;
        }
    }
    assert!(refused > 1000, "only {refused} mutations were refused");
}
