//! The frozen snapshots under `golden/`: read for ever, changed never.
#![allow(clippy::print_stdout, reason = "digests of new goldens are shown")]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::noise;
use offshoot_snapshot_format::*;

/// A frozen snapshot: where it is, what it holds, and the BLAKE3 of its two files.
struct Golden {
    path: &'static str,
    manifest: &'static str,
    memory: &'static str,
    id: [u8; 16],
    layout: MemoryLayout,
    chunks: Vec<Vec<u8>>,
    content: SnapshotContent,
}

fn full() -> Golden {
    let regions = [
        Region {
            guest_start: 0,
            length: 3 * 4096,
        },
        Region {
            guest_start: 0x1_0000_0000,
            length: 2 * 4096,
        },
    ];
    let mut half = noise(3, 8192);
    half[4096..].fill(0);
    let section = |kind: &[u8; 4], version, instance, required, len| Section {
        kind: SectionKind(*kind),
        version,
        instance,
        required,
        payload: noise(4, len),
    };
    Golden {
        path: "format-1/full",
        manifest: "6933a4f4d85681ec9c5e0e335c7b2d72939192c8c6955c3a9bdb0832acf94438",
        memory: "382bffa4add23684ab8bfb3d00f513f8ac2089be0b404e979fbc998bacaf0bd8",
        id: *b"\x01\x93\x50\x1e\x00\x00golden-one",
        layout: MemoryLayout::with_sizes(4096, 8192, &regions).unwrap(),
        chunks: vec![half, vec![0; 4096], noise(5, 8192)],
        content: SnapshotContent {
            created: Timestamp::from_unix_ms(1_732_226_276_123).unwrap(),
            requirements: Requirements {
                arch: Arch::X86_64,
                cpu_vendor: "GenuineIntel".into(),
                cpu_baseline: "x86-64-v2".into(),
                cpuid: vec![
                    CpuidWord {
                        leaf: 1,
                        subleaf: 0,
                        register: CpuidRegister::Ecx,
                        bits: 0x0098_2203,
                    },
                    CpuidWord {
                        leaf: 0x8000_0001,
                        subleaf: 0,
                        register: CpuidRegister::Edx,
                        bits: 0x2010_0800,
                    },
                ],
                xsave_size: 2696,
                msrs: vec![0x10, 0x174, 0xc000_0080],
                kvm_capabilities: vec![
                    KvmCapability {
                        number: 208,
                        name: "KVM_CAP_XSAVE2".into(),
                        minimum: 2696,
                    },
                    KvmCapability {
                        number: 36,
                        name: "KVM_CAP_IOEVENTFD".into(),
                        minimum: 1,
                    },
                ],
                tsc: Some(Tsc {
                    khz: 2_100_000,
                    exact: true,
                }),
                devices: vec![
                    DeviceModel {
                        model: "virtio-blk".into(),
                        id: "vda".into(),
                    },
                    DeviceModel {
                        model: "virtio-vsock".into(),
                        id: "vsock".into(),
                    },
                ],
            },
            disks: vec![
                Disk {
                    id: "vda".into(),
                    backend: "qcow2".into(),
                    layer: "layer-17".into(),
                    size: 10 << 30,
                    read_only: false,
                },
                Disk {
                    id: "vdb".into(),
                    backend: "copy".into(),
                    layer: "tools_1.2".into(),
                    size: 512,
                    read_only: true,
                },
            ],
            metadata: Metadata {
                producer: "offshoot 0.1.0".into(),
                source: Some("sb-1".into()),
                parent: Some(SnapshotId::from_bytes([0x11; 16])),
                name: Some("after apt install, größer".into()),
                labels: [
                    ("empty".into(), String::new()),
                    ("env".into(), "test ✓".into()),
                ]
                .into(),
            },
            sections: vec![
                section(b"VCPU", 1, 0, true, 1500),
                section(b"VCPU", 1, 1, true, 1501),
                section(b"CLCK", 7, 0, true, 0),
                section(b"zzz!", u16::MAX, u32::MAX, false, 16),
            ],
        },
    }
}

fn minimal() -> Golden {
    let region = Region {
        guest_start: 0,
        length: 4096,
    };
    Golden {
        path: "format-1/minimal",
        manifest: "039765790cee54ce8f97bcb4b27086f4275a918fc17dd555e7d72fc6239f8a88",
        memory: "b6fb73fc46938c981e2b0b4b1ef282adcfc89854d01bfe3972fdc4785b41b2c7",
        id: [0; 16],
        layout: MemoryLayout::new(&[region]).unwrap(),
        chunks: vec![vec![0; 4096]],
        content: SnapshotContent {
            created: Timestamp::from_unix_ms(0).unwrap(),
            requirements: Requirements {
                arch: Arch::Aarch64,
                cpu_vendor: String::new(),
                cpu_baseline: String::new(),
                cpuid: vec![],
                xsave_size: 0,
                msrs: vec![],
                kvm_capabilities: vec![],
                tsc: None,
                devices: vec![],
            },
            disks: vec![],
            metadata: Metadata::default(),
            sections: vec![],
        },
    }
}

fn directory(golden: &Golden) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    tests.join("golden").join(golden.path)
}

fn digest(file: &Path) -> String {
    blake3::hash(&fs::read(file).unwrap()).to_hex().to_string()
}

/// Writes a golden with today's writer into `store`.
fn write(golden: &Golden, store: &Path) -> PathBuf {
    let mut writer = SnapshotWriter::create(store, SnapshotId::from_bytes(golden.id)).unwrap();
    let memory = writer.memory_image(golden.layout.clone()).unwrap();
    for (index, bytes) in (0..).zip(&golden.chunks) {
        memory.write_chunk(index, bytes).unwrap();
    }
    let memory = memory.finish().unwrap();
    writer.publish(memory, golden.content.clone()).unwrap()
}

fn make_if_asked(golden: &Golden) {
    let at = directory(golden);
    if std::env::var_os("OFFSHOOT_MAKE_GOLDEN").is_none() || at.exists() {
        return;
    }
    let store = tempfile::tempdir().unwrap();
    let made = write(golden, store.path());
    fs::create_dir_all(&at).unwrap();
    for file in ["manifest", "memory"] {
        fs::copy(made.join(file), at.join(file)).unwrap();
        fs::set_permissions(at.join(file), fs::Permissions::from_mode(0o644)).unwrap();
        println!("{} {file} {}", golden.path, digest(&at.join(file)));
    }
}

fn check(golden: &Golden) {
    make_if_asked(golden);
    let dir = directory(golden);
    assert_eq!(
        digest(&dir.join("manifest")),
        golden.manifest,
        "a golden was changed"
    );
    assert_eq!(
        digest(&dir.join("memory")),
        golden.memory,
        "a golden was changed"
    );

    let snapshot = RawSnapshot::open(&dir).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    snapshot.memory().prove(Verify::Eager, go_on).unwrap();
    let manifest = snapshot.manifest();
    assert_eq!(manifest.header().format_version, 1);
    assert_eq!(manifest.header().minimum_reader, 1);
    assert_eq!(manifest.memory_map().layout(), &golden.layout);
    for (index, expected) in (0..).zip(&golden.chunks) {
        let mut bytes = vec![1; expected.len()];
        snapshot.memory().read_chunk(index, &mut bytes).unwrap();
        assert!(bytes == *expected, "chunk {index}");
    }
    let parts = manifest.clone().into_parts();
    assert_eq!(parts.id.to_bytes(), golden.id);
    assert_eq!(parts.created, golden.content.created);
    assert_eq!(parts.requirements, golden.content.requirements);
    assert_eq!(parts.disks, golden.content.disks);
    assert_eq!(parts.metadata, golden.content.metadata);
    assert_eq!(parts.sections, golden.content.sections);
}

/// Today's writer writes today's format as it was frozen, byte for byte. After a new format version, this is for
/// the goldens of the newest one.
fn check_writer(golden: &Golden) {
    let store = tempfile::tempdir().unwrap();
    let written = write(golden, store.path());
    assert_eq!(digest(&written.join("manifest")), golden.manifest);
    assert_eq!(digest(&written.join("memory")), golden.memory);
}

#[test]
fn format_1_full() {
    check(&full());
    check_writer(&full());
}

#[test]
fn format_1_minimal() {
    check(&minimal());
    check_writer(&minimal());
}
