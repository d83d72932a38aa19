//! Properties of the manifest: what is written is read back, and no bytes make the reader panic.

mod common;

use std::collections::BTreeMap;

use offshoot_snapshot_format::*;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

const LABEL: &str = "[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}";
const LINE: &str = "[ -~ä-ü]{0,30}";

fn memory() -> impl Strategy<Value = MemoryMap> {
    let region = (0u64..20, 1u64..20);
    (vec(region, 1..5), 0u32..5, any::<u64>()).prop_map(|(regions, chunk, seed)| {
        let mut next = 0;
        let regions: Vec<_> = regions
            .into_iter()
            .map(|(gap, pages)| {
                let guest_start = next + gap * 4096;
                next = guest_start + pages * 4096;
                Region {
                    guest_start,
                    length: pages * 4096,
                }
            })
            .collect();
        let layout = MemoryLayout::with_sizes(4096, 4096 << chunk, &regions).unwrap();
        let digests: Vec<_> = layout
            .chunks()
            .map(|c| match seed >> (c.index % 64) & 1 {
                0 => ChunkDigest::Zero,
                _ => ChunkDigest::Blake3(Digest::of(&c.index.to_le_bytes())),
            })
            .collect();
        MemoryMap::new(layout, digests).unwrap()
    })
}

fn register() -> impl Strategy<Value = CpuidRegister> {
    use CpuidRegister::*;
    prop_oneof![Just(Eax), Just(Ebx), Just(Ecx), Just(Edx)]
}

fn requirements() -> impl Strategy<Value = Requirements> {
    let arch = prop_oneof![Just(Arch::X86_64), Just(Arch::Aarch64)];
    let cpuid = btree_map((any::<u32>(), any::<u32>(), register()), any::<u32>(), 0..6);
    let capabilities = btree_map(any::<u32>(), (LINE, any::<u32>()), 0..4);
    let tsc = option::of((any::<u32>(), any::<bool>()));
    let devices = btree_map(LABEL, LABEL, 0..4);
    let msrs = btree_set(any::<u32>(), 0..6);
    (
        (arch, LINE, LINE, any::<u32>()),
        (cpuid, msrs, capabilities, tsc, devices),
    )
        .prop_map(
            |(
                (arch, cpu_vendor, cpu_baseline, xsave_size),
                (cpuid, msrs, capabilities, tsc, devices),
            )| Requirements {
                arch,
                cpu_vendor,
                cpu_baseline,
                cpuid: cpuid
                    .into_iter()
                    .map(|((leaf, subleaf, register), bits)| CpuidWord {
                        leaf,
                        subleaf,
                        register,
                        bits,
                    })
                    .collect(),
                xsave_size,
                msrs: msrs.into_iter().collect(),
                kvm_capabilities: capabilities
                    .into_iter()
                    .map(|(number, (name, minimum))| KvmCapability {
                        number,
                        name,
                        minimum,
                    })
                    .collect(),
                tsc: tsc.map(|(khz, exact)| Tsc { khz, exact }),
                devices: devices
                    .into_iter()
                    .map(|(id, model)| DeviceModel { model, id })
                    .collect(),
            },
        )
}

fn disks() -> impl Strategy<Value = Vec<Disk>> {
    let disk = (LABEL, LABEL, 1..u64::MAX / 512, any::<bool>());
    btree_map(LABEL, disk, 0..4).prop_map(|disks| {
        disks
            .into_iter()
            .map(|(id, (backend, layer, sectors, read_only))| Disk {
                id,
                backend,
                layer,
                size: sectors * 512,
                read_only,
            })
            .collect()
    })
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let parent = option::of(any::<[u8; 16]>().prop_map(SnapshotId::from_bytes));
    let labels = btree_map(LABEL, LINE, 0..4);
    let name = option::of("[ -~]{1,30}");
    (LINE, option::of(LABEL), parent, name, labels).prop_map(
        |(producer, source, parent, name, labels)| Metadata {
            producer,
            source,
            parent,
            name,
            labels,
        },
    )
}

fn sections() -> impl Strategy<Value = Vec<Section>> {
    let state = (any::<u16>(), any::<bool>(), vec(any::<u8>(), 0..70));
    btree_map(("[!-~]{3}x", any::<u32>()), state, 0..8).prop_map(
        |sections: BTreeMap<(String, u32), _>| {
            sections
                .into_iter()
                .map(|((kind, instance), (version, required, payload))| Section {
                    kind: SectionKind(kind.as_bytes().try_into().unwrap()),
                    version,
                    instance,
                    required,
                    payload,
                })
                .collect()
        },
    )
}

fn parts() -> impl Strategy<Value = ManifestParts> {
    let created = (0u64..253_402_300_800_000).prop_map(|ms| Timestamp::from_unix_ms(ms).unwrap());
    let id = any::<[u8; 16]>().prop_map(SnapshotId::from_bytes);
    (
        (id, created),
        (requirements(), memory(), disks(), metadata(), sections()),
    )
        .prop_map(
            |((id, created), (requirements, memory, disks, metadata, sections))| ManifestParts {
                id,
                created,
                requirements,
                memory,
                disks,
                metadata,
                sections,
            },
        )
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(parts in parts()) {
        let bytes = parts.encode().unwrap();
        let manifest = Manifest::parse(&bytes).unwrap();
        prop_assert_eq!(manifest.id(), parts.id);
        let again = manifest.into_parts();
        prop_assert_eq!(&again, &parts);
        prop_assert_eq!(again.encode().unwrap(), bytes);
    }

    #[test]
    fn a_damaged_byte_is_refused(parts in parts(), at: prop::sample::Index, xor in 1u8..) {
        let mut bytes = parts.encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= xor;
        prop_assert!(Manifest::parse(&bytes).is_err());
    }

    #[test]
    fn a_cut_is_refused(parts in parts(), at: prop::sample::Index) {
        let bytes = parts.encode().unwrap();
        prop_assert!(Manifest::parse(&bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in vec(any::<u8>(), 0..600)) {
        let mut bytes = bytes;
        prop_assert!(Manifest::parse(&bytes).is_err());
        for (to, from) in bytes.iter_mut().zip(b"\x89OFFSNAP") {
            *to = *from;
        }
        common::reseal(&mut bytes);
        let _ = Manifest::parse(&bytes);
    }

    /// With matching checksums, changes reach the decoders. They may be taken (a changed label is a label), and then they
    /// must mean the same when they are written again.
    #[test]
    fn resealed_damage_does_not_panic(
        parts in parts(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = parts.encode().unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        common::reseal(&mut bytes);
        if let Ok(manifest) = Manifest::parse(&bytes) {
            let parts = manifest.clone().into_parts();
            let again = Manifest::parse(&parts.encode().unwrap()).unwrap();
            prop_assert_eq!(again.into_parts(), parts);
        }
    }

    #[test]
    fn ids_round_trip(bytes: [u8; 16]) {
        let id = SnapshotId::from_bytes(bytes);
        prop_assert_eq!(id.to_string().parse(), Ok(id));
    }
}
