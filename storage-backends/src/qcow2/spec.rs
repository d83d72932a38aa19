//! The qcow2 format: each on-disk field once, with its offset and meaning.
//!
//! Names and sections are those of QEMU's `docs/interop/qcow2.txt`. All numbers are big-endian.

/// "QFI\xfb".
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// Offsets of the header's fields ("Header").
pub(super) mod field {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const VERSION: usize = 4;
    /// Where the backing file's name is stored; 0 when there is none.
    pub(in super::super) const BACKING_FILE_OFFSET: usize = 8;
    pub(in super::super) const BACKING_FILE_SIZE: usize = 16;
    pub(in super::super) const CLUSTER_BITS: usize = 20;
    /// Virtual disk size in bytes.
    pub(in super::super) const SIZE: usize = 24;
    pub(in super::super) const CRYPT_METHOD: usize = 32;
    /// Entries, not bytes.
    pub(in super::super) const L1_SIZE: usize = 36;
    pub(in super::super) const L1_TABLE_OFFSET: usize = 40;
    pub(in super::super) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(in super::super) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(in super::super) const NB_SNAPSHOTS: usize = 60;
    // 64: snapshots_offset, without meaning while nb_snapshots is 0.

    // Version 3 and later.
    pub(in super::super) const INCOMPATIBLE_FEATURES: usize = 72;
    pub(in super::super) const COMPATIBLE_FEATURES: usize = 80;
    pub(in super::super) const AUTOCLEAR_FEATURES: usize = 88;
    pub(in super::super) const REFCOUNT_ORDER: usize = 96;
    pub(in super::super) const HEADER_LENGTH: usize = 100;
    /// One byte, there when `header_length` reaches past it.
    pub(in super::super) const COMPRESSION_TYPE: usize = 104;
}

/// Length of a version 2 header.
pub(super) const V2_HEADER_LENGTH: u32 = 72;
/// The least length of a version 3 header.
pub(super) const V3_HEADER_LENGTH: u32 = 104;
/// Length of the header that we write: with `compression_type` and its padding.
pub(super) const OUR_HEADER_LENGTH: u32 = 112;

/// `refcount_order` of every version 2 image: 16-bit refcounts.
pub(super) const V2_REFCOUNT_ORDER: u32 = 4;
/// The largest `refcount_order`: 64-bit refcounts.
pub(super) const MAX_REFCOUNT_ORDER: u32 = 6;

/// The least `cluster_bits` of the specification.
pub(super) const MIN_CLUSTER_BITS: u32 = 9;
/// QEMU's largest cluster, and ours: 2 MiB.
pub(super) const MAX_CLUSTER_BITS: u32 = 21;

/// QEMU's limit on the L1 table (32 MiB), and ours.
pub(super) const MAX_L1_ENTRIES: u32 = 4 << 20;
/// QEMU's limit on the refcount table, and ours.
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The longest backing file name.
pub(super) const MAX_BACKING_NAME: u32 = 1023;

/// Bits of `incompatible_features`.
pub(super) mod incompatible {
    pub(in super::super) const DIRTY: u64 = 1 << 0;
    pub(in super::super) const CORRUPT: u64 = 1 << 1;
    pub(in super::super) const EXTERNAL_DATA: u64 = 1 << 2;
    pub(in super::super) const COMPRESSION_TYPE: u64 = 1 << 3;
    pub(in super::super) const EXTENDED_L2: u64 = 1 << 4;
}

/// Bits of `compatible_features`.
pub(super) mod compatible {
    pub(in super::super) const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of `autoclear_features`.
pub(super) mod autoclear {
    pub(in super::super) const RAW_EXTERNAL_DATA: u64 = 1 << 1;
}

/// Types of header extensions ("Header extensions").
pub(super) mod extension {
    pub(in super::super) const END: u32 = 0;
    pub(in super::super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(in super::super) const FULL_DISK_ENCRYPTION: u32 = 0x0537_be77;
    pub(in super::super) const EXTERNAL_DATA_FILE: u32 = 0x4441_5441;
}

/// Bits 9-55 of an L1 entry and of a standard L2 entry: the offset in the file.
pub(super) const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits of an L1 entry.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bit 62 of an L2 entry: a compressed cluster.
pub(super) const L2_COMPRESSED: u64 = 1 << 62;
/// Bit 63 of an L1 or L2 entry: its refcount is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 0 of a standard L2 entry in version 3: reads as zeroes.
pub(super) const L2_ZERO: u64 = 1;
/// Reserved bits of a standard L2 entry, bit 0 aside.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits 0-8 of a refcount table entry.
pub(super) const REFTABLE_RESERVED: u64 = 0x1ff;
