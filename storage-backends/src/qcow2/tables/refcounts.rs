//! Refcounts: whether they say what the mapping tables say, and writing them anew.
//!
//! An image of ours has no internal snapshots, so a cluster's refcount is 1 or 0, and the mapping
//! tables alone decide which. A process that dies, or a power cut, may leave refcounts behind or ahead
//! of them; a count that is too low is dangerous, because the cluster would be handed out a second time.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{ReadAt, TableError, Used, for_entries};
use crate::qcow2::header::Header;

/// How refcounts differ from what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::qcow2) struct Differences {
    /// Clusters in use that are counted as free.
    pub(in crate::qcow2) missing: u64,
    /// Clusters counted as used, or more than once, that are not.
    pub(in crate::qcow2) leaked: u64,
}

/// Entries of the refcount table.
pub(super) fn table_entries(header: &Header) -> u64 {
    u64::from(header.refcount_table_clusters).saturating_mul(header.cluster_size() / 8)
}

/// Refcounts in one refcount block.
fn block_entries(header: &Header) -> u64 {
    header
        .cluster_size()
        .saturating_mul(8)
        .wrapping_shr(header.refcount_order)
}

/// What a cluster's refcount should be.
enum Wanted {
    Exactly(u64),
    /// Compressed data: one for each guest cluster in it, which nobody has counted.
    AtLeastOne,
}

fn wanted(used: &Used, cluster: u64) -> Wanted {
    if used.compressed.get(cluster) {
        Wanted::AtLeastOne
    } else {
        Wanted::Exactly(used.owned.get(cluster).into())
    }
}

/// Compares the refcounts with what the tables use.
pub(in crate::qcow2) fn compare<F: ReadAt + ?Sized>(
    file: &F,
    header: &Header,
    used: &Used,
) -> Result<Differences, TableError> {
    let mut found = Differences::default();
    let mut block = vec![0; usize::try_from(header.cluster_size()).unwrap_or(0)];
    let per_block = block_entries(header);
    let mut covered = 0_u64;
    for_entries(
        file,
        header.refcount_table_offset,
        table_entries(header),
        |index, offset| {
            let first = index.saturating_mul(per_block);
            if offset == 0 && first >= used.clusters {
                return Ok(());
            }
            if offset == 0 {
                block.fill(0);
            } else {
                file.fill_at(&mut block, offset)?;
            }
            covered = covered.max(first.saturating_add(per_block));
            for i in 0..per_block {
                let count = get(&block, i, header.refcount_order);
                match wanted(used, first.saturating_add(i)) {
                    Wanted::Exactly(n) if count < n => {
                        found.missing = found.missing.saturating_add(1)
                    }
                    Wanted::Exactly(n) if count > n => {
                        found.leaked = found.leaked.saturating_add(1)
                    }
                    Wanted::AtLeastOne if count == 0 => {
                        found.missing = found.missing.saturating_add(1)
                    }
                    _ => {}
                }
            }
            Ok(())
        },
    )?;
    for cluster in covered..used.clusters {
        if used.owned.get(cluster) || used.compressed.get(cluster) {
            found.missing = found.missing.saturating_add(1);
        }
    }
    Ok(found)
}

/// Writes the refcounts that the tables imply, and syncs them. May be interrupted at any point: each
/// refcount that it writes is right by itself.
///
/// # Errors
/// `TooLarge` for an image with compressed clusters, or when the refcount table has no room.
pub(in crate::qcow2) fn rewrite(
    file: &File,
    header: &Header,
    used: &mut Used,
) -> Result<(), TableError> {
    if used.has_compressed() {
        return Err(TableError::TooLarge {
            what: "the number of compressed clusters",
            value: 1,
            limit: 0,
        });
    }
    let per_block = block_entries(header);
    let mut table = Vec::new();
    for_entries(
        file,
        header.refcount_table_offset,
        table_entries(header),
        |_, offset| {
            table.push(offset);
            Ok(())
        },
    )?;

    // Blocks that are missing go to the end of the file, where each may need another one.
    let mut added = Vec::new();
    let mut clusters = used.clusters;
    let mut index = 0_u64;
    while index.saturating_mul(per_block) < clusters {
        let limit = table.len() as u64;
        let slot = usize::try_from(index).ok().and_then(|i| table.get_mut(i));
        let slot = slot.ok_or(TableError::TooLarge {
            what: "the number of refcount blocks",
            value: index,
            limit,
        })?;
        if *slot == 0 {
            *slot = clusters.saturating_mul(header.cluster_size());
            added.push((index, *slot));
            clusters = clusters.saturating_add(1);
        }
        index = index.saturating_add(1);
    }
    used.grow(clusters);
    for (_, offset) in &added {
        let _ = used.own(offset.wrapping_shr(header.cluster_bits));
    }

    let mut block = vec![0; usize::try_from(header.cluster_size()).unwrap_or(0)];
    for (index, offset) in (0_u64..).zip(&table).filter(|(_, offset)| **offset != 0) {
        block.fill(0);
        let first = index.saturating_mul(per_block);
        for i in 0..per_block {
            if used.owned.get(first.saturating_add(i)) {
                set_to_one(&mut block, i, header.refcount_order);
            }
        }
        file.write_all_at(&block, *offset)?;
    }
    file.sync_data()?;
    for (index, offset) in &added {
        let at = header
            .refcount_table_offset
            .saturating_add(index.saturating_mul(8));
        file.write_all_at(&offset.to_be_bytes(), at)?;
    }
    Ok(file.sync_data()?)
}

impl Used {
    fn grow(&mut self, clusters: u64) {
        self.clusters = self.clusters.max(clusters);
        let words = usize::try_from(self.clusters.div_ceil(64)).unwrap_or(0);
        for bits in [&mut self.owned, &mut self.compressed] {
            let words = words.max(bits.0.len());
            bits.0.resize(words, 0);
        }
    }
}

/// Entry `i` of a refcount block whose entries are `1 << order` bits wide ("Refcount blocks": narrow
/// ones start at the least significant bit of a byte).
fn get(block: &[u8], i: u64, order: u32) -> u64 {
    let bits = 1_u32.wrapping_shl(order);
    let bit = i.saturating_mul(bits.into());
    let at = usize::try_from(bit / 8).unwrap_or(usize::MAX);
    if bits < 8 {
        let mask = 1_u8.wrapping_shl(bits).wrapping_sub(1);
        return (block.get(at).copied().unwrap_or(0).wrapping_shr(shift(bit)) & mask).into();
    }
    let end = at.saturating_add(bits as usize / 8);
    let bytes = block.get(at..end).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |n, b| n.wrapping_shl(8) | u64::from(*b))
}

fn set_to_one(block: &mut [u8], i: u64, order: u32) {
    let bits = 1_u64.wrapping_shl(order);
    let bit = i.saturating_mul(bits);
    let (byte, one) = if bits < 8 {
        (bit / 8, 1_u8.wrapping_shl(shift(bit)))
    } else {
        // The last byte of the big-endian entry.
        ((bit / 8).saturating_add(bits / 8).saturating_sub(1), 1)
    };
    if let Some(b) = usize::try_from(byte).ok().and_then(|at| block.get_mut(at)) {
        *b |= one;
    }
}

/// The place of a bit in its byte.
fn shift(bit: u64) -> u32 {
    u32::try_from(bit % 8).unwrap_or(0)
}

#[cfg(test)]
mod tests;
