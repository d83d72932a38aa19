//! What the tests of the directory format share.
#![allow(
    dead_code,
    unused_imports,
    reason = "each test program uses the part of this that it needs"
)]

use std::path::Path;

use offshoot_snapshot_format::*;

mod reseal;

pub(crate) use reseal::*;

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
