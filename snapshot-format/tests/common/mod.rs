//! What the tests of the directory format share.
#![allow(
    dead_code,
    reason = "each test program uses the part of this that it needs"
)]

use std::path::Path;

use offshoot_snapshot_format::*;

/// The manifest's fixed places, as docs/snapshot-format.md gives them.
pub(crate) const HEADER: usize = 128;
pub(crate) const ENTRY: usize = 32;
pub(crate) const TRAILER: usize = 32;

/// Makes all checksums of a manifest match its bytes again, as far as the table's own words allow: what a
/// hostile writer would do.
pub(crate) fn reseal(bytes: &mut [u8]) {
    let u32_at = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
    let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
    if bytes.len() < HEADER + TRAILER {
        return;
    }
    let room = (bytes.len() - HEADER - TRAILER) / ENTRY;
    let count = (u32_at(bytes, 32) as usize).min(room);
    for entry in (0..count).map(|i| HEADER + i * ENTRY) {
        let offset = u64_at(bytes, entry + 16);
        let end = offset.saturating_add(u64_at(bytes, entry + 24));
        if end <= bytes.len() as u64 {
            let range = usize::try_from(offset).unwrap()..usize::try_from(end).unwrap();
            let sum = crc32c::crc32c(&bytes[range]).to_le_bytes();
            bytes[entry + 12..entry + 16].copy_from_slice(&sum);
        }
    }
    let sum = crc32c::crc32c(&bytes[HEADER..HEADER + count * ENTRY]).to_le_bytes();
    bytes[36..40].copy_from_slice(&sum);
    let sum = crc32c::crc32c(&bytes[..124]).to_le_bytes();
    bytes[124..128].copy_from_slice(&sum);
    let trailer = bytes.len() - TRAILER;
    let digest = blake3::hash(&bytes[..trailer]);
    bytes[trailer..].copy_from_slice(digest.as_bytes());
}

/// Bytes that look random and are the same each time.
pub(crate) fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new_keyed(&[seed; 32])
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Content without anything special.
pub(crate) fn content(sections: Vec<Section>) -> SnapshotContent {
    SnapshotContent {
        created: Timestamp::from_unix_ms(1_732_226_276_123).unwrap(),
        requirements: Requirements {
            arch: Arch::X86_64,
            cpu_vendor: "GenuineIntel".into(),
            cpu_baseline: "v2".into(),
            cpuid: vec![],
            xsave_size: 832,
            msrs: vec![],
            kvm_capabilities: vec![],
            tsc: None,
            devices: vec![],
        },
        disks: vec![],
        metadata: Metadata {
            producer: "tests".into(),
            ..Metadata::default()
        },
        sections,
    }
}

/// A section that nobody knows.
pub(crate) fn section(len: usize) -> Section {
    Section {
        kind: SectionKind(*b"TEST"),
        version: 1,
        instance: 0,
        required: true,
        payload: noise(9, len),
    }
}

/// The layout of one region from 0 with small chunks.
pub(crate) fn layout(chunk: u32, len: u64) -> MemoryLayout {
    let region = Region {
        guest_start: 0,
        length: len,
    };
    MemoryLayout::with_sizes(4096, chunk, &[region]).unwrap()
}

/// Names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
