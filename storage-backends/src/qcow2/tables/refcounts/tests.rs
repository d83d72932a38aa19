use super::*;
use crate::qcow2::format::{NewImage, write_new};
use crate::qcow2::tables::{check, walk};

#[test]
fn refcounts_of_every_width_are_where_the_specification_puts_them() {
    for order in 0..=6 {
        let mut block = [0; 64];
        for i in [0, 3, 5] {
            set_to_one(&mut block, i, order);
        }
        let counts: Vec<_> = (0..7).map(|i| get(&block, i, order)).collect();
        assert_eq!(counts, [1, 0, 0, 1, 0, 1, 0], "order {order}");
    }
    assert_eq!(get(&[0x12, 0x34], 0, 4), 0x1234);
    assert_eq!(get(&[0b1110_0100], 1, 1), 0b01);
    assert_eq!(get(&[0b1110_0100], 3, 1), 0b11);
}

/// An image of `size` bytes with 512-byte clusters, so that one refcount block covers 256 of them.
fn image(size: u64) -> (File, Header) {
    let file = tempfile::tempfile().unwrap();
    let header = write_new(
        &file,
        &NewImage {
            size,
            cluster_bits: 9,
            backing: None,
        },
    )
    .unwrap();
    (file, header)
}

#[test]
fn counts_that_are_missing_or_leaked_are_found_and_rewritten() {
    let (file, header) = image(64 << 10);
    check(&file, &header).unwrap();
    // Cluster 0 is said to be free, cluster 9 to be used.
    file.set_len(20 * 512).unwrap();
    file.write_all_at(&0_u16.to_be_bytes(), 1024).unwrap();
    file.write_all_at(&1_u16.to_be_bytes(), 1024 + 18).unwrap();
    let mut used = walk(&file, &header).unwrap();
    let found = compare(&file, &header, &used).unwrap();
    assert_eq!(
        found,
        Differences {
            missing: 1,
            leaked: 1
        }
    );
    rewrite(&file, &header, &mut used).unwrap();
    check(&file, &header).unwrap();
}

#[test]
fn refcount_blocks_that_never_reached_the_disk_are_made_anew() {
    let (file, header) = image(64 << 10);
    // The one block is gone, and the file has grown past what one block covers.
    file.write_all_at(&0_u64.to_be_bytes(), header.refcount_table_offset)
        .unwrap();
    file.set_len(700 * 512).unwrap();
    let mut used = walk(&file, &header).unwrap();
    let in_use = compare(&file, &header, &used).unwrap().missing;
    // The header, the refcount table and one cluster of L1.
    assert_eq!(in_use, 3);
    rewrite(&file, &header, &mut used).unwrap();
    check(&file, &header).unwrap();
}
