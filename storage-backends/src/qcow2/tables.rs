//! The walk over an image's tables: refcount table, L1 and L2.
//!
//! Linear in the metadata that is there and bounded: each table is read once, because the second
//! pointer to a cluster is an error, and both the clusters of the file and the bytes of L2 tables
//! have a limit. There is no recursion. The image's libraries have neither bound: one recurses until
//! the stack overflows when a refcount block covers itself wrongly.
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
use super::spec;

pub(super) mod refcounts;

/// Something that the tables of an image are read from. Past the end there are zeroes.
pub trait ReadAt {
    /// Length in bytes.
    ///
    /// # Errors
    /// When it cannot be told.
    fn length(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// When the storage fails.
    fn fill_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn fill_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    offset = offset.saturating_add(n as u64);
                    buf = buf.get_mut(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl ReadAt for [u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn fill_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.fill(0);
        let have = usize::try_from(offset)
            .ok()
            .and_then(|at| self.get(at..))
            .unwrap_or_default();
        buf.iter_mut().zip(have).for_each(|(to, from)| *to = *from);
        Ok(())
    }
}

/// What is wrong with an image's tables.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The storage failed.
    #[error("the tables cannot be read")]
    Io(#[from] io::Error),
    /// The image is larger than what is walked.
    #[error("{what} is {value}, more than the {limit} that are checked")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// An entry breaks a rule of the specification.
    #[error("{table} entry {index} is {value:#x}: {rule}")]
    Entry {
        /// The table.
        table: &'static str,
        /// Index of the entry, in L2 tables that of the guest cluster.
        index: u64,
        /// Its value.
        value: u64,
        /// The rule.
        rule: &'static str,
    },
    /// Refcounts that say free where there is something, or the other way round.
    #[error("{missing} clusters in use are not counted, {leaked} counted clusters are not in use")]
    Refcounts {
        /// Clusters in use with a refcount of 0.
        missing: u64,
        /// Clusters not in use with a refcount.
        leaked: u64,
    },
}

/// Clusters of a file: 64 TiB at 64 KiB a cluster.
const MAX_CLUSTERS: u64 = 1 << 30;
/// Bytes of L2 tables: 8 TiB of guest data at 64 KiB a cluster.
const MAX_L2_BYTES: u64 = 1 << 30;
/// How much of a table is read at once.
const CHUNK: usize = 64 << 10;

/// Which clusters of a file the tables point to.
#[derive(Debug)]
pub(super) struct Used {
    /// Those with exactly one owner.
    owned: Bits,
    /// Those that hold compressed data, perhaps of several guest clusters.
    compressed: Bits,
    /// Clusters of the file.
    clusters: u64,
}

impl Used {
    fn new(header: &Header, len: u64) -> Result<Self, TableError> {
        let clusters = header.clusters_of(len);
        if clusters > MAX_CLUSTERS {
            return Err(TableError::TooLarge {
                what: "the number of clusters",
                value: clusters,
                limit: MAX_CLUSTERS,
            });
        }
        Ok(Self {
            owned: Bits::new(clusters),
            compressed: Bits::new(clusters),
            clusters,
        })
    }

    /// Gives a cluster its one owner.
    fn own(&mut self, cluster: u64) -> Result<(), &'static str> {
        if cluster >= self.clusters {
            return Err("must point inside the file");
        }
        if self.compressed.get(cluster) || self.owned.set(cluster) {
            return Err("points to a cluster that something else uses");
        }
        Ok(())
    }

    /// Whether any cluster holds compressed data.
    pub(super) fn has_compressed(&self) -> bool {
        self.compressed.0.iter().any(|w| *w != 0)
    }

    fn share_compressed(&mut self, cluster: u64) -> Result<(), &'static str> {
        if cluster >= self.clusters {
            return Err("must point inside the file");
        }
        if self.owned.get(cluster) {
            return Err("points to a cluster that something else uses");
        }
        self.compressed.set(cluster);
        Ok(())
    }
}

/// One bit a cluster. Fresh pages of zeroes cost nothing until they are written to.
#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(n: u64) -> Self {
        Self(vec![0; usize::try_from(n.div_ceil(64)).unwrap_or(0)])
    }

    fn get(&self, i: u64) -> bool {
        let word = usize::try_from(i / 64).ok().and_then(|w| self.0.get(w));
        word.is_some_and(|w| w & bit(i) != 0)
    }

    /// Sets the bit and tells whether it was set before.
    fn set(&mut self, i: u64) -> bool {
        let bit = bit(i);
        match usize::try_from(i / 64).ok().and_then(|w| self.0.get_mut(w)) {
            Some(word) => {
                let before = *word & bit != 0;
                *word |= bit;
                before
            }
            None => false,
        }
    }
}

/// The place of bit `i` in its word.
fn bit(i: u64) -> u64 {
    1_u64.wrapping_shl(u32::try_from(i % 64).unwrap_or(0))
}

/// What an L2 entry says about its guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapped {
    /// Nothing: the backing file's content, or zeroes.
    Nothing,
    /// Reads as zeroes.
    Zero,
    /// Data at this offset of the file.
    Data(u64),
    /// Compressed data.
    Compressed,
}

/// Walks all tables of an image whose header is checked, and returns what they use.
///
/// # Errors
/// The first entry that breaks a rule.
pub(super) fn walk<F: ReadAt + ?Sized>(file: &F, header: &Header) -> Result<Used, TableError> {
    let mut used = Used::new(header, file.length()?)?;
    own_range(&mut used, header, "header", 0, 1)?;
    let l1_bytes = u64::from(header.l1_entries).saturating_mul(8);
    own_range(
        &mut used,
        header,
        "L1 table",
        header.l1_offset,
        header.clusters_of(l1_bytes),
    )?;
    own_range(
        &mut used,
        header,
        "refcount table",
        header.refcount_table_offset,
        header.refcount_table_clusters.into(),
    )?;

    for_entries(
        file,
        header.refcount_table_offset,
        refcounts::table_entries(header),
        |index, value| {
            if value == 0 {
                return Ok(());
            }
            let bad = |rule| TableError::Entry {
                table: "refcount table",
                index,
                value,
                rule,
            };
            if value & spec::REFTABLE_RESERVED != 0 {
                return Err(bad("reserved bits must be 0"));
            }
            used.own(aligned_cluster(header, value).ok_or_else(|| bad(UNALIGNED))?)
                .map_err(bad)
        },
    )?;

    visit(file, header, |event| match event {
        Event::L2Table {
            index,
            entry,
            cluster,
        } => used.own(cluster).map_err(|rule| TableError::Entry {
            table: "L1",
            index,
            value: entry,
            rule,
        }),
        Event::Entry {
            guest_cluster,
            entry,
            mapped,
        } => {
            let bad = |rule| TableError::Entry {
                table: "L2",
                index: guest_cluster,
                value: entry,
                rule,
            };
            match mapped {
                Mapped::Data(offset) => used
                    .own(offset.wrapping_shr(header.cluster_bits))
                    .map_err(bad),
                Mapped::Compressed => {
                    let (start, len) = compressed_range(header, entry);
                    let first = start.wrapping_shr(header.cluster_bits);
                    let last = start
                        .saturating_add(len)
                        .saturating_sub(1)
                        .wrapping_shr(header.cluster_bits);
                    // "The compressed data may end anywhere in the last sector": that sector, not
                    // the data, may lie past the end of the file.
                    (first..=last.min(used.clusters.saturating_sub(1)).max(first))
                        .try_for_each(|cluster| used.share_compressed(cluster))
                        .map_err(bad)
                }
                // A zero cluster may keep a place in the file.
                Mapped::Zero => match entry & spec::ENTRY_OFFSET {
                    0 => Ok(()),
                    offset => used
                        .own(aligned_cluster(header, offset).ok_or_else(|| bad(UNALIGNED))?)
                        .map_err(bad),
                },
                Mapped::Nothing => Ok(()),
            }
        }
    })?;
    Ok(used)
}

const UNALIGNED: &str = "must be a multiple of the cluster size";

/// What a walk over L1 and L2 comes by.
enum Event {
    L2Table {
        index: u64,
        entry: u64,
        cluster: u64,
    },
    Entry {
        guest_cluster: u64,
        entry: u64,
        mapped: Mapped,
    },
}

/// Comes by every L2 table, before it is read, and by every entry in it that is not 0.
fn visit<F: ReadAt + ?Sized>(
    file: &F,
    header: &Header,
    mut event: impl FnMut(Event) -> Result<(), TableError>,
) -> Result<(), TableError> {
    let l2_entries = header.cluster_size() / 8;
    let mut l2_bytes = 0_u64;
    for_entries(
        file,
        header.l1_offset,
        header.l1_entries.into(),
        |index, entry| {
            if entry == 0 {
                return Ok(());
            }
            let bad = |rule| TableError::Entry {
                table: "L1",
                index,
                value: entry,
                rule,
            };
            if entry & spec::L1_RESERVED != 0 {
                return Err(bad("reserved bits must be 0"));
            }
            let offset = entry & spec::ENTRY_OFFSET;
            if offset == 0 {
                return Ok(());
            }
            l2_bytes = l2_bytes.saturating_add(header.cluster_size());
            if l2_bytes > MAX_L2_BYTES {
                return Err(TableError::TooLarge {
                    what: "the size of the L2 tables",
                    value: l2_bytes,
                    limit: MAX_L2_BYTES,
                });
            }
            let cluster = aligned_cluster(header, offset).ok_or_else(|| bad(UNALIGNED))?;
            event(Event::L2Table {
                index,
                entry,
                cluster,
            })?;
            let first = index.saturating_mul(l2_entries);
            for_entries(file, offset, l2_entries, |i, entry| {
                if entry == 0 {
                    return Ok(());
                }
                let guest_cluster = first.saturating_add(i);
                let mapped = mapped(header, entry).map_err(|rule| TableError::Entry {
                    table: "L2",
                    index: guest_cluster,
                    value: entry,
                    rule,
                })?;
                event(Event::Entry {
                    guest_cluster,
                    entry,
                    mapped,
                })
            })
        },
    )
}

/// Calls `f` with the guest ranges that the image itself says something about: data or zeroes that
/// hide what lies beneath. Ranges come in order, are cut at the virtual size, and neighbours may be
/// apart.
pub(super) fn mapped_ranges<F: ReadAt + ?Sized>(
    file: &F,
    header: &Header,
    mut f: impl FnMut(u64, u64),
) -> Result<(), TableError> {
    visit(file, header, |event| {
        if let Event::Entry {
            guest_cluster,
            mapped,
            ..
        } = event
            && mapped != Mapped::Nothing
        {
            let start = guest_cluster.saturating_mul(header.cluster_size());
            let end = start.saturating_add(header.cluster_size()).min(header.size);
            if start < end {
                f(start, end.saturating_sub(start));
            }
        }
        Ok(())
    })
}

/// Rewrites entries that say the same in a way that an engine cannot deal with, and tells whether there
/// were any: a zero cluster that keeps a place in the file gives it up (its refcount is then too
/// high), and one with data says that it has one owner, as the walk has proven. May be interrupted at
/// any point.
pub(super) fn simplify_entries(file: &File, header: &Header) -> Result<bool, TableError> {
    let l2_entries = header.cluster_size() / 8;
    let mut table = 0_u64;
    let mut changed = false;
    visit(file, header, |event| {
        let (guest_cluster, entry, simple) = match event {
            Event::L2Table { cluster, .. } => {
                table = cluster.wrapping_shl(header.cluster_bits);
                return Ok(());
            }
            Event::Entry {
                guest_cluster,
                entry,
                mapped,
            } => match mapped {
                Mapped::Zero => (guest_cluster, entry, spec::L2_ZERO),
                Mapped::Data(offset) => (guest_cluster, entry, offset | spec::COPIED),
                Mapped::Nothing | Mapped::Compressed => return Ok(()),
            },
        };
        if entry != simple {
            // The number of entries is a power of two.
            let index = guest_cluster & l2_entries.wrapping_sub(1);
            let at = table.saturating_add(index.saturating_mul(8));
            file.write_all_at(&simple.to_be_bytes(), at)?;
            changed = true;
        }
        Ok(())
    })?;
    if changed {
        file.sync_data()?;
    }
    Ok(changed)
}

/// Decodes an L2 entry ("Standard Cluster Descriptor", "Compressed Clusters Descriptor").
fn mapped(header: &Header, entry: u64) -> Result<Mapped, &'static str> {
    if entry & spec::L2_COMPRESSED != 0 {
        return if entry & spec::COPIED == 0 {
            Ok(Mapped::Compressed)
        } else {
            Err("a compressed cluster must not be marked as owned")
        };
    }
    if entry & spec::L2_RESERVED != 0 || (header.version < 3 && entry & spec::L2_ZERO != 0) {
        return Err("reserved bits must be 0");
    }
    if entry & spec::L2_ZERO != 0 {
        return Ok(Mapped::Zero);
    }
    match entry & spec::ENTRY_OFFSET {
        0 => Ok(Mapped::Nothing),
        offset if aligned_cluster(header, offset).is_some() => Ok(Mapped::Data(offset)),
        _ => Err(UNALIGNED),
    }
}

/// Offset and length of a compressed cluster's data, in whole sectors.
fn compressed_range(header: &Header, entry: u64) -> (u64, u64) {
    // x = 62 - (cluster_bits - 8): bits 0 to x-1 are the offset, bits x to 61 count sectors more.
    let x = 62_u32.saturating_sub(header.cluster_bits.saturating_sub(8));
    let descriptor = entry & spec::L2_COMPRESSED.wrapping_sub(1);
    let offset = descriptor & 1_u64.wrapping_shl(x).wrapping_sub(1);
    let sectors = descriptor.wrapping_shr(x).saturating_add(1);
    (
        offset,
        sectors.saturating_mul(512).saturating_sub(offset % 512),
    )
}

fn aligned_cluster(header: &Header, offset: u64) -> Option<u64> {
    let mask = header.cluster_size().wrapping_sub(1);
    (offset & mask == 0).then(|| offset.wrapping_shr(header.cluster_bits))
}

fn own_range(
    used: &mut Used,
    header: &Header,
    table: &'static str,
    offset: u64,
    clusters: u64,
) -> Result<(), TableError> {
    let first = offset.wrapping_shr(header.cluster_bits);
    (first..first.saturating_add(clusters))
        .try_for_each(|cluster| used.own(cluster))
        .map_err(|rule| TableError::Entry {
            table,
            index: 0,
            value: offset,
            rule,
        })
}

/// Calls `f` with index and value of `n` big-endian 64-bit entries from `offset` on.
fn for_entries<F: ReadAt + ?Sized>(
    file: &F,
    offset: u64,
    n: u64,
    mut f: impl FnMut(u64, u64) -> Result<(), TableError>,
) -> Result<(), TableError> {
    let mut chunk = vec![0; CHUNK.min(usize::try_from(n.saturating_mul(8)).unwrap_or(CHUNK))];
    let mut index = 0_u64;
    while index < n {
        let want = n
            .saturating_sub(index)
            .saturating_mul(8)
            .min(chunk.len() as u64);
        let Some(part) = usize::try_from(want).ok().and_then(|w| chunk.get_mut(..w)) else {
            break;
        };
        file.fill_at(part, offset.saturating_add(index.saturating_mul(8)))?;
        for entry in part.chunks_exact(8) {
            let mut raw = [0; 8];
            raw.copy_from_slice(entry);
            f(index, u64::from_be_bytes(raw))?;
            index = index.saturating_add(1);
        }
    }
    Ok(())
}

/// Checks the tables of the image in `bytes` beyond its header, refcounts included: for fuzzing.
///
/// # Errors
/// The first finding.
pub fn check_tables(bytes: &[u8], header: &Header) -> Result<(), TableError> {
    check(bytes, header)
}

/// Checks all tables of an image, refcounts included.
pub(super) fn check<F: ReadAt + ?Sized>(file: &F, header: &Header) -> Result<(), TableError> {
    let used = walk(file, header)?;
    let found = refcounts::compare(file, header, &used)?;
    if found.missing == 0 && found.leaked == 0 {
        Ok(())
    } else {
        Err(TableError::Refcounts {
            missing: found.missing,
            leaked: found.leaked,
        })
    }
}

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "tests may panic"
)]
mod tests;
