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
        ChunkDigest::Blake3(Digest([7; 32])),
        ChunkDigest::Zero,
        ChunkDigest::Blake3(Digest([9; 32])),
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
    assert_eq!(manifest.digest().0, bytes[bytes.len() - 32..]);
    assert_eq!(manifest.into_parts(), parts);
}

/// Where the parts of `bytes` are, by the table's own word.
fn map_of(bytes: &[u8]) -> (Range<u64>, Vec<Entry>, u64) {
    let header = Header::parse(bytes).unwrap();
    let range = table::table_range(&header);
    let entries = table::parse(&header, bytes_in(bytes, range.clone()).unwrap()).unwrap();
    (range, entries, header.total_length - TRAILER_LEN as u64)
}

#[test]
fn every_flipped_bit_is_refused_and_its_place_named() {
    let good = sample().encode().unwrap();
    let (table, entries, trailer) = map_of(&good);
    let mut padding_seen = 0;
    for offset in 0..good.len() as u64 {
        let expected = if offset < 8 {
            Place::Header("magic")
        } else if offset < table.start {
            Place::Header("header checksum")
        } else if offset < table.end {
            Place::Table
        } else if offset >= trailer {
            Place::Trailer
        } else if let Some(entry) = entries.iter().find(|e| e.range().contains(&offset)) {
            entry.place()
        } else {
            padding_seen += 1;
            let before = entries.iter().map(|e| e.range().end);
            let offset = before.filter(|end| *end <= offset).max().unwrap();
            Place::Padding { offset }
        };
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[usize::try_from(offset).unwrap()] ^= 1 << bit;
            let error = Manifest::parse(&bad).unwrap_err();
            assert_eq!(
                error.place(),
                expected,
                "bit {bit} of byte {offset}: {error}"
            );
        }
    }
    assert!(padding_seen > 0, "the sample has no padding to damage");
}

#[test]
fn every_cut_is_refused_and_its_place_named() {
    let good = sample().encode().unwrap();
    let (table, entries, trailer) = map_of(&good);
    for len in 0..good.len() as u64 {
        let error = Manifest::parse(&good[..usize::try_from(len).unwrap()]).unwrap_err();
        let place = error.place();
        let in_section = entries.iter().find(|e| e.range().contains(&len));
        let named = match place {
            Place::Header(_) => len < table.start,
            Place::Table => table.contains(&len),
            Place::Section { .. } => in_section.is_some_and(|e| e.place() == place),
            Place::Padding { offset } => in_section.is_none() && offset == len && len < trailer,
            Place::Trailer => len >= trailer,
            _ => false,
        };
        assert!(named, "cut at {len}: {error}");
        let kind = error.kind();
        let expected = [ErrorKind::Length, ErrorKind::NotASnapshot];
        assert!(
            kind == expected[usize::from(len == 0)],
            "cut at {len}: {kind:?}"
        );
    }
    let mut longer = good;
    longer.push(0);
    let error = Manifest::parse(&longer).unwrap_err();
    assert_eq!(
        (error.kind(), error.place()),
        (ErrorKind::Length, Place::Manifest)
    );
}

/// The encodings of the own payloads of format 1. A change here is a change of the format: it needs a new payload version and
/// a decoder for the old one, never another expectation.
#[test]
fn payload_encodings_do_not_drift() {
    let parts = sample();
    assert_eq!((Requirements::KIND.0, Requirements::VERSION), (*b"REQS", 1));
    assert_eq!(
        parts.requirements.encode().unwrap(),
        [
            b"\x00\x0cGenuineIntel\x02v2".as_slice(),
            b"\x01\x07\x01\x02\x80\x06",     // CPUID 7.1 ECX 0x300
            b"\x88\x15",                     // XSAVE 2696
            b"\x02\x10\x80\x81\x80\x80\x0c", // MSRs 0x10, 0xc0000080
            b"\x01\xd0\x01\x0eKVM_CAP_XSAVE2\x01",
            b"\x01\x80\x89\x7a\x01", // 2000000 kHz, exact
            b"\x01\x0avirtio-blk\x03vda",
        ]
        .concat()
    );
    assert_eq!((Wire::KIND.0, Wire::VERSION), (*b"MEMY", 1));
    assert_eq!(
        parts.memory.to_wire().encode().unwrap(),
        [
            b"\x80\x20\x80\x40".as_slice(), // pages of 4096, chunks of 8192
            b"\x02\x00\x80\x60\x80\x80\x80\x80\x10\x80\x40",
            b"\x01\x02", // chunk 1 of 3 is zero
            b"\x40",
            &[7; 32],
            &[9; 32],
        ]
        .concat()
    );
    assert_eq!((Disks::KIND.0, Disks::VERSION), (*b"DISK", 1));
    assert_eq!(
        Disks(parts.disks).encode().unwrap(),
        b"\x01\x03vda\x04copy\x02l1\x80\x08\x00"
    );
    assert_eq!((Metadata::KIND.0, Metadata::VERSION), (*b"META", 1));
    assert_eq!(
        parts.metadata.encode().unwrap(),
        [
            b"\x06test 1\x01\x03sb1\x01".as_slice(),
            &[1; 16],
            b"\x01\x06a name\x01\x01k\x01v",
        ]
        .concat()
    );
}

#[test]
fn enum_numbers_do_not_drift() {
    let number = |value: &[u8]| value.to_vec();
    let arch = |a: Arch| postcard::to_stdvec(&a).unwrap();
    assert_eq!(arch(Arch::X86_64), number(&[0]));
    assert_eq!(arch(Arch::Aarch64), number(&[1]));
    let register = |r: CpuidRegister| postcard::to_stdvec(&r).unwrap();
    assert_eq!(register(CpuidRegister::Eax), number(&[0]));
    assert_eq!(register(CpuidRegister::Ebx), number(&[1]));
    assert_eq!(register(CpuidRegister::Ecx), number(&[2]));
    assert_eq!(register(CpuidRegister::Edx), number(&[3]));
}

/// Every rule of the content: what breaks it, and where it is told.
#[test]
fn content_that_breaks_a_rule_is_refused_by_writer_and_reader_alike() {
    type Break = fn(&mut ManifestParts);
    let cases: &[(&str, Break)] = &[
        ("REQS", |p| p.requirements.cpu_vendor = "a\nb".into()),
        ("REQS", |p| p.requirements.cpu_baseline = "x".repeat(256)),
        ("REQS", |p| {
            p.requirements.cpuid.push(p.requirements.cpuid[0])
        }),
        ("REQS", |p| {
            p.requirements.cpuid = vec![p.requirements.cpuid[0]; 1025];
        }),
        ("REQS", |p| p.requirements.msrs = vec![2, 1]),
        ("REQS", |p| p.requirements.msrs = vec![1, 1]),
        ("REQS", |p| p.requirements.msrs = (0..1025).collect()),
        ("REQS", |p| {
            let again = p.requirements.kvm_capabilities[0].clone();
            p.requirements.kvm_capabilities.push(again);
        }),
        ("REQS", |p| {
            p.requirements.kvm_capabilities[0].name = "\0".into()
        }),
        ("REQS", |p| p.requirements.devices[0].model = String::new()),
        ("REQS", |p| p.requirements.devices[0].id = "../x".into()),
        ("REQS", |p| {
            let again = p.requirements.devices[0].clone();
            p.requirements.devices.push(again);
        }),
        ("DISK", |p| p.disks[0].id = "/dev/sda".into()),
        ("DISK", |p| p.disks[0].backend = "a b".into()),
        ("DISK", |p| p.disks[0].layer = "..".into()),
        ("DISK", |p| p.disks[0].size = 0),
        ("DISK", |p| p.disks[0].size = 513),
        ("DISK", |p| p.disks.push(p.disks[0].clone())),
        ("DISK", |p| {
            p.disks = (0..257)
                .map(|i| Disk {
                    id: format!("d{i}"),
                    ..p.disks[0].clone()
                })
                .collect();
        }),
        ("META", |p| p.metadata.producer = "\u{1b}c".into()),
        ("META", |p| p.metadata.source = Some(String::new())),
        ("META", |p| p.metadata.name = Some(String::new())),
        ("META", |p| p.metadata.name = Some("a\u{202}\u{9b}".into())),
        ("META", |p| {
            p.metadata.labels.insert("a b".into(), String::new());
        }),
        ("META", |p| {
            p.metadata.labels.insert("a".into(), "x".repeat(1025));
        }),
        ("META", |p| {
            p.metadata.labels = (0..65).map(|i| (format!("k{i}"), String::new())).collect();
        }),
    ];
    for (number, (kind, break_it)) in cases.iter().enumerate() {
        let mut parts = sample();
        break_it(&mut parts);
        let error = parts.encode().unwrap_err();
        let named = error.place().to_string();
        assert_eq!(named, format!("section {kind}/0"), "case {number}");
        assert_eq!(error.kind(), ErrorKind::Malformed, "case {number}");
    }
}

#[test]
fn a_list_of_sections_that_breaks_a_rule_is_refused() {
    let section = |kind: &[u8; 4], instance| Section {
        kind: SectionKind(*kind),
        version: 1,
        instance,
        required: true,
        payload: vec![1],
    };
    let cases = [
        (vec![section(b"VCPU", 0), section(b"VCPU", 0)], "instance"),
        (vec![section(b"META", 1)], "kind"),
        (vec![section(b"META", 0)], "instance"),
        (vec![section(b"A\0BC", 0)], "kind"),
        (vec![section(b"A BC", 0)], "kind"),
    ];
    for (sections, expected) in cases {
        let mut parts = sample();
        parts.sections = sections;
        let error = parts.encode().unwrap_err();
        assert!(
            matches!(error.place(), Place::TableEntry { field, .. } if field == expected),
            "{error}"
        );
    }
    let mut parts = sample();
    parts.sections = (0..1021).map(|i| section(b"VCPU", i)).collect();
    let error = parts.encode().unwrap_err();
    assert_eq!(error.place(), Place::Header("section count"));
    parts.sections.pop();
    parts.encode().unwrap();
}

#[test]
fn sections_are_consumed_or_refused() {
    let bytes = sample().encode().unwrap();
    let manifest = Manifest::parse(&bytes).unwrap();
    let (vcpu, hint) = (SectionKind(*b"VCPU"), SectionKind(*b"HINT"));

    let error = manifest.sections().finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeftOver);
    let place = Place::Section {
        kind: vcpu,
        instance: 1,
    };
    assert_eq!(error.place(), place);

    let mut sections = manifest.sections();
    assert_eq!(sections.instances(vcpu).collect::<Vec<_>>(), [1]);
    assert_eq!(
        sections.take_raw(vcpu, 0).unwrap_err().kind(),
        ErrorKind::Missing
    );
    assert_eq!(sections.take_raw(vcpu, 1).unwrap().payload, b"state");
    assert_eq!(
        sections.take_raw(vcpu, 1).unwrap_err().kind(),
        ErrorKind::Missing
    );
    let left = sections.finish().unwrap();
    assert_eq!(left.iter().map(|s| s.kind).collect::<Vec<_>>(), [hint]);

    // This crate's own sections are not the machine's to take.
    assert!(
        manifest
            .sections()
            .take_if_present(Metadata::KIND, 0)
            .is_none()
    );
}

#[test]
fn a_payload_of_another_version_or_with_bytes_left_is_refused() {
    let disks = Disks(sample().disks);
    let mut section = Section::required(0, &disks).unwrap();
    assert_eq!(section.decode::<Disks>().unwrap(), disks);
    assert_eq!(
        section.decode::<Metadata>().unwrap_err().kind(),
        ErrorKind::Malformed
    );
    section.payload.push(0);
    assert_eq!(
        section.decode::<Disks>().unwrap_err().kind(),
        ErrorKind::Malformed
    );
    section.payload.pop();
    section.version = 2;
    assert_eq!(
        section.decode::<Disks>().unwrap_err().kind(),
        ErrorKind::Version
    );
}

#[test]
fn keys_of_labels_ascend() {
    let with_labels = |labels: &[u8]| {
        let bytes = [b"\x00\x00\x00\x00".as_slice(), labels].concat();
        Metadata::decode(1, &bytes)
    };
    assert!(with_labels(b"\x02\x01a\x00\x01b\x00").is_ok());
    assert!(with_labels(b"\x02\x01b\x00\x01a\x00").is_err());
    assert!(with_labels(b"\x02\x01a\x00\x01a\x00").is_err());
}
