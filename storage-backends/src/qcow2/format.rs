//! Writes new images: a header, an empty L1 table and the refcounts of just these clusters.
//!
//! We write them ourselves because both engines need it (one of them can't create overlays at
//! all), because a fork is on somebody's critical path (this is three small writes, with no reading back
//! and no sync), and because a freeze has to have the overlay complete under a name of its own
//! before it switches to it.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::Header;
use super::spec::{self, extension, field};

/// What a new image is to be.
#[derive(Debug, Clone)]
pub(super) struct NewImage<'a> {
    /// Virtual size in bytes.
    pub(super) size: u64,
    /// Logarithm of the cluster size, 9 to 21.
    pub(super) cluster_bits: u32,
    /// The backing file's name; its format is always qcow2 and always said.
    pub(super) backing: Option<&'a str>,
}

/// Writes an empty image into `file`, which is empty, and returns its header.
///
/// ```text
/// cluster 0        header, extensions, backing file name
/// cluster 1        refcount table
/// cluster 2        the one refcount block (16 bits an entry)
/// cluster 3 ...    L1 table, a hole: the file is only made that long
/// ```
/// One refcount block covers `cluster_size / 2` clusters, which is always more than these: the L1
/// table has 32 MiB at most, and `size` is refused before its L1 table outgrows the block.
pub(super) fn write_new(file: &File, new: &NewImage<'_>) -> io::Result<Header> {
    let too_large = || {
        io::Error::new(
            io::ErrorKind::Unsupported,
            "the size is beyond what this cluster size can map",
        )
    };
    let cluster_size = 1_u64.wrapping_shl(new.cluster_bits);
    let covered_bits = new.cluster_bits.saturating_mul(2).saturating_sub(3);
    let l1_entries = u32::try_from(new.size.div_ceil(1_u64.wrapping_shl(covered_bits)).max(1))
        .ok()
        .filter(|n| *n <= spec::MAX_L1_ENTRIES)
        .ok_or_else(too_large)?;
    let l1_bytes = u64::from(l1_entries).saturating_mul(8);
    let clusters = l1_bytes.div_ceil(cluster_size).saturating_add(3);
    if clusters > cluster_size / 2 {
        return Err(too_large());
    }

    let header = Header {
        version: 3,
        cluster_bits: new.cluster_bits,
        size: new.size,
        l1_entries,
        l1_offset: cluster_size.saturating_mul(3),
        refcount_table_offset: cluster_size,
        refcount_table_clusters: 1,
        refcount_order: spec::V2_REFCOUNT_ORDER,
        autoclear_features: 0,
        backing: new.backing.map(|name| super::header::Backing {
            name: name.to_owned(),
            format: Some("qcow2".to_owned()),
        }),
    };
    let first = header_bytes(&header)?;

    file.set_len(cluster_size.saturating_mul(clusters))?;
    let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    let refblock_offset = cluster_size.saturating_mul(2);
    file.write_all_at(&refcounts, refblock_offset)?;
    file.write_all_at(&refblock_offset.to_be_bytes(), header.refcount_table_offset)?;
    file.write_all_at(&first, 0)?;
    Ok(header)
}

/// The first cluster of an image with this header, up to its last byte that is not zero.
pub(super) fn header_bytes(header: &Header) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; spec::OUR_HEADER_LENGTH as usize];
    let mut put = |at: usize, value: &[u8]| {
        if let Some(room) = at
            .checked_add(value.len())
            .and_then(|end| bytes.get_mut(at..end))
        {
            room.copy_from_slice(value);
        }
    };
    put(field::MAGIC, &spec::MAGIC.to_be_bytes());
    put(field::VERSION, &header.version.to_be_bytes());
    put(field::CLUSTER_BITS, &header.cluster_bits.to_be_bytes());
    put(field::SIZE, &header.size.to_be_bytes());
    put(field::L1_SIZE, &header.l1_entries.to_be_bytes());
    put(field::L1_TABLE_OFFSET, &header.l1_offset.to_be_bytes());
    put(
        field::REFCOUNT_TABLE_OFFSET,
        &header.refcount_table_offset.to_be_bytes(),
    );
    put(
        field::REFCOUNT_TABLE_CLUSTERS,
        &header.refcount_table_clusters.to_be_bytes(),
    );
    put(field::REFCOUNT_ORDER, &header.refcount_order.to_be_bytes());
    put(field::HEADER_LENGTH, &spec::OUR_HEADER_LENGTH.to_be_bytes());

    if let Some(backing) = &header.backing {
        let format = backing.format.as_deref().unwrap_or("qcow2").as_bytes();
        bytes.extend_from_slice(&extension::BACKING_FORMAT.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(format.len()).unwrap_or(0).to_be_bytes());
        bytes.extend_from_slice(format);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend_from_slice(&extension::END.to_be_bytes());
    bytes.extend_from_slice(&0_u32.to_be_bytes());

    if let Some(backing) = &header.backing {
        let at = bytes.len() as u64;
        let len = u32::try_from(backing.name.len())
            .ok()
            .filter(|n| *n <= spec::MAX_BACKING_NAME && *n > 0);
        let len = len.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the backing file name is empty or too long",
            )
        })?;
        bytes.extend_from_slice(backing.name.as_bytes());
        if bytes.len() as u64 > header.cluster_size() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the backing file name does not fit into the first cluster",
            ));
        }
        for (at, value) in [
            (field::BACKING_FILE_OFFSET, &at.to_be_bytes()[..]),
            (field::BACKING_FILE_SIZE, &len.to_be_bytes()[..]),
        ] {
            if let Some(room) = at
                .checked_add(value.len())
                .and_then(|end| bytes.get_mut(at..end))
            {
                room.copy_from_slice(value);
            }
        }
    }
    Ok(bytes)
}
