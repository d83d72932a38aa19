//! What an image's header must say before any library sees the image.
//!
//! [`check_header`] takes bytes and the file's length and nothing else, so that it can be fuzzed. Each rule names the
//! field of the specification that it reads. Whoever holds a [`Header`] knows that every table it
//! points to lies inside the file, is aligned and has a bounded size, and that the image asks for
//! no feature that we do not have. What the tables hold is the business of
//! [`tables`](super::tables).
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;

use super::spec::{self, autoclear, compatible, extension, field, incompatible};

/// Why an image is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// There is no qcow2 header here at all.
    NotQcow2,
    /// More of the first cluster is needed than was given.
    Truncated,
    /// A field breaks a rule of the specification or points out of the file.
    Damaged,
    /// The image is valid, or may be, and needs something that we refuse to do.
    Unsupported,
}

/// A header that is refused: the field, its value and the rule that it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("qcow2 header field {field} is {value:#x}: {rule}")]
pub struct HeaderError {
    /// What kind of refusal this is.
    pub fault: Fault,
    /// The field's name in the specification.
    pub field: &'static str,
    /// The value that was found.
    pub value: u64,
    /// The rule that it breaks.
    pub rule: &'static str,
}

/// The backing file that a header names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name as it stands in the image; says nothing about whether to follow it.
    pub name: String,
    /// The format that the header extension gives: never probed when absent.
    pub format: Option<String>,
}

/// A header that has passed every rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Logarithm of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Virtual disk size in bytes.
    pub size: u64,
    /// Entries of the L1 table, enough for `size`.
    pub l1_entries: u32,
    /// Offset of the L1 table in the file; 0 only when it has no entries.
    pub l1_offset: u64,
    /// Offset of the refcount table in the file.
    pub refcount_table_offset: u64,
    /// Clusters that the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Logarithm of the refcounts' width in bits, 0 to 6.
    pub refcount_order: u32,
    /// `autoclear_features`: a writer clears what it does not know.
    pub autoclear_features: u64,
    /// The backing file that is named, if any.
    pub backing: Option<Backing>,
}

impl Header {
    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1_u64.wrapping_shl(self.cluster_bits)
    }

    /// Clusters that a file of `len` bytes has, the last one perhaps in part.
    pub(super) fn clusters_of(&self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }
}

/// Checks the header in `bytes`, the beginning of a file of `file_len` bytes.
///
/// `bytes` need not hold more than the first cluster. Nothing is allocated but the backing file's
/// name (at most 1023 bytes) and format.
///
/// # Errors
/// The first rule that is broken, in the order of the fields.
pub fn check_header(bytes: &[u8], file_len: u64) -> Result<Header, HeaderError> {
    let raw = Raw { bytes, file_len };
    if raw.u32(field::MAGIC, "magic")? != spec::MAGIC {
        return Err(raw.err(
            Fault::NotQcow2,
            "magic",
            u64::from(raw.u32(0, "magic")?),
            "must be \"QFI\\xfb\"",
        ));
    }
    let version = raw.u32(field::VERSION, "version")?;
    if !(2..=3).contains(&version) {
        return Err(raw.err(
            Fault::Unsupported,
            "version",
            version.into(),
            "must be 2 or 3",
        ));
    }
    let cluster_bits = raw.u32(field::CLUSTER_BITS, "cluster_bits")?;
    if !(spec::MIN_CLUSTER_BITS..=spec::MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(raw.err(
            Fault::Damaged,
            "cluster_bits",
            cluster_bits.into(),
            "must be 9 to 21",
        ));
    }
    let v3 = raw.version_3_fields(version)?;
    let cluster_size = 1_u64.wrapping_shl(cluster_bits);
    if u64::from(v3.header_length) > cluster_size {
        return Err(raw.err(
            Fault::Damaged,
            "header_length",
            v3.header_length.into(),
            "must fit into the first cluster",
        ));
    }

    let crypt = raw.u32(field::CRYPT_METHOD, "crypt_method")?;
    if crypt != 0 {
        return Err(raw.err(
            Fault::Unsupported,
            "crypt_method",
            crypt.into(),
            "encrypted images are refused",
        ));
    }
    let snapshots = raw.u32(field::NB_SNAPSHOTS, "nb_snapshots")?;
    if snapshots != 0 {
        return Err(raw.err(
            Fault::Unsupported,
            "nb_snapshots",
            snapshots.into(),
            "images with internal snapshots are refused; delete them or convert the image",
        ));
    }

    let (size, l1_entries, l1_offset) = raw.l1(cluster_bits)?;
    let (refcount_table_offset, refcount_table_clusters) = raw.refcount_table(cluster_bits)?;
    let backing = raw.backing(v3.header_length, cluster_size)?;

    Ok(Header {
        version,
        cluster_bits,
        size,
        l1_entries,
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        refcount_order: v3.refcount_order,
        autoclear_features: v3.autoclear_features,
        backing,
    })
}

/// Reads and checks the header of an open image.
pub(super) fn read_header(file: &File) -> std::io::Result<Result<Header, HeaderError>> {
    /// Enough for every header that we or `qemu-img` write.
    const USUAL: usize = 4096;
    let len = file.metadata()?.len();
    let mut bytes = read_start(file, USUAL)?;
    let mut result = check_header(&bytes, len);
    if matches!(
        result,
        Err(HeaderError {
            fault: Fault::Truncated,
            ..
        })
    ) && bytes.len() == USUAL
    {
        bytes = read_start(file, 1_usize.wrapping_shl(spec::MAX_CLUSTER_BITS))?;
        result = check_header(&bytes, len);
    }
    Ok(result)
}

fn read_start(file: &File, want: usize) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; want];
    let mut have = 0_usize;
    while let Some(rest) = bytes.get_mut(have..).filter(|r| !r.is_empty()) {
        match file.read_at(rest, have as u64) {
            Ok(0) => break,
            Ok(n) => have = have.saturating_add(n),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(have);
    Ok(bytes)
}

/// Version 3's fields, or what version 2 says without them.
struct Version3 {
    refcount_order: u32,
    header_length: u32,
    autoclear_features: u64,
}

struct Raw<'a> {
    bytes: &'a [u8],
    file_len: u64,
}

impl Raw<'_> {
    fn err(
        &self,
        fault: Fault,
        field: &'static str,
        value: u64,
        rule: &'static str,
    ) -> HeaderError {
        HeaderError {
            fault,
            field,
            value,
            rule,
        }
    }

    fn slice(&self, at: u64, len: u64, name: &'static str) -> Result<&[u8], HeaderError> {
        let range = || {
            let start = usize::try_from(at).ok()?;
            let end = start.checked_add(usize::try_from(len).ok()?)?;
            self.bytes.get(start..end)
        };
        range().ok_or_else(|| {
            // The very first field decides whether this is an image at all.
            let fault = if self.bytes.len() < 8 {
                Fault::NotQcow2
            } else {
                Fault::Truncated
            };
            self.err(
                fault,
                name,
                at,
                "lies past the end of the file or of what was read of it",
            )
        })
    }

    fn u32(&self, at: usize, name: &'static str) -> Result<u32, HeaderError> {
        let mut raw = [0; 4];
        raw.copy_from_slice(self.slice(at as u64, 4, name)?);
        Ok(u32::from_be_bytes(raw))
    }

    fn u64(&self, at: usize, name: &'static str) -> Result<u64, HeaderError> {
        let mut raw = [0; 8];
        raw.copy_from_slice(self.slice(at as u64, 8, name)?);
        Ok(u64::from_be_bytes(raw))
    }

    /// The file's length, rounded up to whole clusters: the last one may be short.
    fn end(&self, cluster_bits: u32) -> u64 {
        let mask = 1_u64.wrapping_shl(cluster_bits).wrapping_sub(1);
        self.file_len.saturating_add(mask) & !mask
    }

    fn version_3_fields(&self, version: u32) -> Result<Version3, HeaderError> {
        if version == 2 {
            return Ok(Version3 {
                refcount_order: spec::V2_REFCOUNT_ORDER,
                header_length: spec::V2_HEADER_LENGTH,
                autoclear_features: 0,
            });
        }
        let name = "incompatible_features";
        let features = self.u64(field::INCOMPATIBLE_FEATURES, name)?;
        let refusals = [
            (
                incompatible::CORRUPT,
                Fault::Damaged,
                "the image is marked corrupt; repair it with qemu-img check -r all",
            ),
            (
                incompatible::DIRTY,
                Fault::Unsupported,
                "the image is marked dirty; repair it with qemu-img check -r all",
            ),
            (
                incompatible::EXTERNAL_DATA,
                Fault::Unsupported,
                "images with an external data file are refused",
            ),
            (
                incompatible::COMPRESSION_TYPE,
                Fault::Unsupported,
                "zlib is the only compression that is read",
            ),
            (
                incompatible::EXTENDED_L2,
                Fault::Unsupported,
                "extended L2 entries are refused",
            ),
            (
                u64::MAX,
                Fault::Unsupported,
                "an unknown incompatible feature",
            ),
        ];
        if let Some((_, fault, rule)) = refusals.into_iter().find(|(bits, ..)| features & bits != 0)
        {
            return Err(self.err(fault, name, features, rule));
        }
        // Lazy refcounts alone (bit 0 of compatible_features) are harmless: nobody has to use
        // them, and the dirty bit says when they were left behind. Unknown bits may be ignored.
        let _ = self.u64(field::COMPATIBLE_FEATURES, "compatible_features")?
            & compatible::LAZY_REFCOUNTS;
        let autoclear_features = self.u64(field::AUTOCLEAR_FEATURES, "autoclear_features")?;
        if autoclear_features & autoclear::RAW_EXTERNAL_DATA != 0 {
            return Err(self.err(
                Fault::Damaged,
                "autoclear_features",
                autoclear_features,
                "raw external data without an external data file",
            ));
        }
        let refcount_order = self.u32(field::REFCOUNT_ORDER, "refcount_order")?;
        if refcount_order > spec::MAX_REFCOUNT_ORDER {
            return Err(self.err(
                Fault::Damaged,
                "refcount_order",
                refcount_order.into(),
                "must be 0 to 6",
            ));
        }
        let header_length = self.u32(field::HEADER_LENGTH, "header_length")?;
        if header_length < spec::V3_HEADER_LENGTH || header_length % 8 != 0 {
            return Err(self.err(
                Fault::Damaged,
                "header_length",
                header_length.into(),
                "must be a multiple of 8 and at least 104",
            ));
        }
        if header_length > spec::V3_HEADER_LENGTH {
            let compression = self
                .slice(field::COMPRESSION_TYPE as u64, 1, "compression_type")?
                .first()
                .copied()
                .unwrap_or(0);
            if compression != 0 {
                return Err(self.err(
                    Fault::Damaged,
                    "compression_type",
                    compression.into(),
                    "must be 0 while incompatible feature bit 3 is clear",
                ));
            }
        }
        Ok(Version3 {
            refcount_order,
            header_length,
            autoclear_features,
        })
    }

    /// `size`, `l1_size`, `l1_table_offset`.
    fn l1(&self, cluster_bits: u32) -> Result<(u64, u32, u64), HeaderError> {
        let size = self.u64(field::SIZE, "size")?;
        let entries = self.u32(field::L1_SIZE, "l1_size")?;
        let offset = self.u64(field::L1_TABLE_OFFSET, "l1_table_offset")?;
        if entries > spec::MAX_L1_ENTRIES {
            return Err(self.err(
                Fault::Unsupported,
                "l1_size",
                entries.into(),
                "an L1 table of more than 32 MiB is refused",
            ));
        }
        // One L1 entry covers one L2 table of cluster_size / 8 entries of a cluster each.
        let covered_bits = cluster_bits.saturating_mul(2).saturating_sub(3);
        let needed = size.div_ceil(1_u64.wrapping_shl(covered_bits));
        if u64::from(entries) < needed {
            return Err(self.err(
                Fault::Damaged,
                "l1_size",
                entries.into(),
                "too few entries for the virtual size",
            ));
        }
        if entries == 0 {
            return Ok((size, 0, 0));
        }
        self.aligned("l1_table_offset", offset, cluster_bits)?;
        let end = offset.checked_add(u64::from(entries).saturating_mul(8));
        if end.is_none_or(|end| end > self.end(cluster_bits)) {
            return Err(self.err(
                Fault::Damaged,
                "l1_table_offset",
                offset,
                "the L1 table must lie inside the file",
            ));
        }
        Ok((size, entries, offset))
    }

    /// `refcount_table_offset`, `refcount_table_clusters`.
    fn refcount_table(&self, cluster_bits: u32) -> Result<(u64, u32), HeaderError> {
        let offset = self.u64(field::REFCOUNT_TABLE_OFFSET, "refcount_table_offset")?;
        let clusters = self.u32(field::REFCOUNT_TABLE_CLUSTERS, "refcount_table_clusters")?;
        self.aligned("refcount_table_offset", offset, cluster_bits)?;
        let bytes = u64::from(clusters)
            .checked_shl(cluster_bits)
            .unwrap_or(u64::MAX);
        if clusters == 0
            || bytes > spec::MAX_REFCOUNT_TABLE_BYTES.max(1_u64.wrapping_shl(cluster_bits))
        {
            return Err(self.err(
                Fault::Damaged,
                "refcount_table_clusters",
                clusters.into(),
                "must be 1 cluster to 8 MiB",
            ));
        }
        if offset
            .checked_add(bytes)
            .is_none_or(|end| end > self.end(cluster_bits))
        {
            return Err(self.err(
                Fault::Damaged,
                "refcount_table_offset",
                offset,
                "the refcount table must lie inside the file",
            ));
        }
        Ok((offset, clusters))
    }

    /// A table starts at a cluster boundary and never in the header's cluster.
    fn aligned(
        &self,
        name: &'static str,
        offset: u64,
        cluster_bits: u32,
    ) -> Result<(), HeaderError> {
        let mask = 1_u64.wrapping_shl(cluster_bits).wrapping_sub(1);
        if offset == 0 || offset & mask != 0 {
            return Err(self.err(
                Fault::Damaged,
                name,
                offset,
                "must be a multiple of the cluster size and not 0",
            ));
        }
        Ok(())
    }

    /// `backing_file_offset`, `backing_file_size` and the header extensions.
    fn backing(
        &self,
        header_length: u32,
        cluster_size: u64,
    ) -> Result<Option<Backing>, HeaderError> {
        let offset = self.u64(field::BACKING_FILE_OFFSET, "backing_file_offset")?;
        let limit = if offset == 0 { cluster_size } else { offset };
        if limit < u64::from(header_length) || limit > cluster_size {
            return Err(self.err(
                Fault::Damaged,
                "backing_file_offset",
                offset,
                "must lie behind the header in the first cluster",
            ));
        }
        let format = self.extensions(u64::from(header_length), limit)?;
        if offset == 0 {
            return Ok(None);
        }
        let len = self.u32(field::BACKING_FILE_SIZE, "backing_file_size")?;
        if len == 0 || len > spec::MAX_BACKING_NAME {
            return Err(self.err(
                Fault::Damaged,
                "backing_file_size",
                len.into(),
                "must be 1 to 1023",
            ));
        }
        if offset.saturating_add(len.into()) > cluster_size {
            return Err(self.err(
                Fault::Damaged,
                "backing_file_size",
                len.into(),
                "the name must lie in the first cluster",
            ));
        }
        let name = self.slice(offset, len.into(), "backing_file_offset")?;
        let name = std::str::from_utf8(name).ok().filter(|n| !n.contains('\0'));
        let name = name.ok_or_else(|| {
            self.err(
                Fault::Damaged,
                "backing_file_offset",
                offset,
                "the name must be UTF-8 without NUL",
            )
        })?;
        Ok(Some(Backing {
            name: name.to_owned(),
            format,
        }))
    }

    /// Walks the header extensions between `at` and `limit`; returns the backing format.
    fn extensions(&self, mut at: u64, limit: u64) -> Result<Option<String>, HeaderError> {
        /// Names that a format may have: far shorter than this.
        const MAX_FORMAT: u32 = 64;
        let mut format = None;
        // Every turn moves on by 8 bytes at least, inside one cluster.
        while at.saturating_add(8) <= limit {
            let start = usize::try_from(at).unwrap_or(usize::MAX);
            let kind = self.u32(start, "header extension type")?;
            let len = self.u32(start.saturating_add(4), "header extension length")?;
            at = at.saturating_add(8);
            if kind == extension::END {
                break;
            }
            if at.saturating_add(len.into()) > limit {
                return Err(self.err(
                    Fault::Damaged,
                    "header extension length",
                    len.into(),
                    "must end before the backing file name, in the first cluster",
                ));
            }
            match kind {
                extension::BACKING_FORMAT => {
                    if format.is_some() || len > MAX_FORMAT {
                        return Err(self.err(
                            Fault::Damaged,
                            "backing file format",
                            len.into(),
                            "must be there once and be short",
                        ));
                    }
                    let name = self.slice(at, len.into(), "backing file format")?;
                    let name = std::str::from_utf8(name).map_err(|_| {
                        self.err(Fault::Damaged, "backing file format", at, "must be text")
                    })?;
                    format = Some(name.to_owned());
                }
                extension::FULL_DISK_ENCRYPTION => {
                    return Err(self.err(
                        Fault::Unsupported,
                        "header extension type",
                        kind.into(),
                        "encrypted images are refused",
                    ));
                }
                extension::EXTERNAL_DATA_FILE => {
                    return Err(self.err(
                        Fault::Unsupported,
                        "header extension type",
                        kind.into(),
                        "images with an external data file are refused",
                    ));
                }
                // "Unknown extensions may be ignored": feature names, bitmaps and what is to come.
                _ => {}
            }
            at = at.saturating_add(u64::from(len).next_multiple_of(8));
        }
        Ok(format)
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
