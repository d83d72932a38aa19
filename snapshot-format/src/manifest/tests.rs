use super::*;
use crate::{
    Arch, ChunkDigest, CpuidRegister, CpuidWord, DeviceModel, KvmCapability, MemoryLayout, Region,
    Tsc,
};

/// A small manifest with something in every field.
pub(crate) fn sample() -> ManifestParts {
    let layout = MemoryLayout::with_sizes(
        4096,
        8192,
        &[
            Region {
                guest_start: 0,
                length: 3 * 4096,
            },
            Region {
                guest_start: 1 << 32,
                length: 8192,
            },
        ],
    )
    .unwrap();
    let digests = [
        ChunkDigest::Blake3([7; 32]),
        ChunkDigest::Zero,
        ChunkDigest::Blake3([9; 32]),
    ];
    ManifestParts {
        id: SnapshotId::from_bytes(*b"0123456789abcdef"),
        created: Timestamp::from_unix_ms(1_732_226_276_123).unwrap(),
        requirements: Requirements {
            arch: Arch::X86_64,
            cpu_vendor: "GenuineIntel".into(),
            cpu_baseline: "v2".into(),
            cpuid: vec![CpuidWord {
                leaf: 7,
                subleaf: 1,
                register: CpuidRegister::Ecx,
                bits: 0x300,
            }],
            xsave_size: 2696,
            msrs: vec![0x10, 0xc000_0080],
            kvm_capabilities: vec![KvmCapability {
                number: 208,
                name: "KVM_CAP_XSAVE2".into(),
                minimum: 1,
            }],
            tsc: Some(Tsc {
                khz: 2_000_000,
                exact: true,
            }),
            devices: vec![DeviceModel {
                model: "virtio-blk".into(),
                id: "vda".into(),
            }],
        },
        memory: MemoryMap::new(layout, digests).unwrap(),
        disks: vec![Disk {
            id: "vda".into(),
            backend: "copy".into(),
            layer: "l1".into(),
            size: 1024,
            read_only: false,
        }],
        metadata: Metadata {
            producer: "test 1".into(),
            source: Some("sb1".into()),
            parent: Some(SnapshotId::from_bytes([1; 16])),
            name: Some("a name".into()),
            labels: [("k".into(), "v".into())].into(),
        },
        sections: vec![
            Section {
                kind: SectionKind(*b"VCPU"),
                version: 3,
                instance: 1,
                required: true,
                payload: b"state".to_vec(),
            },
            Section {
                kind: SectionKind(*b"HINT"),
                version: 1,
                instance: 0,
                required: false,
                payload: vec![],
            },
        ],
    }
}

#[test]
fn round_trip() {
    let parts = sample();
    let bytes = parts.encode().unwrap();
    let manifest = Manifest::parse(&bytes).unwrap();
    assert_eq!(manifest.header().section_count, 6);
    assert_eq!(manifest.digest(), bytes[bytes.len() - 32..]);
    assert_eq!(manifest.into_parts(), parts);
}
