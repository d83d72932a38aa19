//! Caps that bound what a reader takes; the writer refuses what a reader would refuse.

/// Bytes of a manifest.
pub const MAX_MANIFEST_LEN: u64 = 128 << 20;
/// Sections of a manifest.
pub const MAX_SECTIONS: u32 = 1024;
/// Bytes of one section's payload.
pub const MAX_SECTION_LEN: u64 = 64 << 20;
/// Regions of guest memory.
pub const MAX_REGIONS: usize = 256;
/// Bytes of a memory image.
pub const MAX_IMAGE_LEN: u64 = 1 << 40;
/// Chunks of a memory image.
pub const MAX_CHUNKS: u64 = 1 << 20;
/// Bytes of a chunk of a memory image.
pub const MAX_CHUNK_SIZE: u32 = 64 << 20;
/// Disks of a snapshot.
pub const MAX_DISKS: usize = 256;
/// Devices, and KVM capabilities, that a snapshot requires: so many of each.
pub const MAX_REQUIRED: usize = 256;
/// CPUID words, and MSRs, that a snapshot requires: so many of each.
pub const MAX_CPU_REQUIRED: usize = 1024;
/// Labels that the user put on a snapshot.
pub const MAX_LABELS: usize = 64;
/// Bytes of a label's value.
pub const MAX_LABEL_VALUE: usize = 1024;
/// Bytes of each of the sections `REQS`, `DISK` and `META`.
pub const MAX_OWN_SECTION_LEN: u64 = 256 << 10;
