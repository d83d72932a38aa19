use super::*;

/// A host that has everything: all bits of every leaf that matters.
fn everything() -> Vec<kvm_cpuid_entry2> {
    let leaf = |function, index, registers: [u32; 4]| kvm_cpuid_entry2 {
        function,
        index,
        flags: 0,
        eax: registers[0],
        ebx: registers[1],
        ecx: registers[2],
        edx: registers[3],
        ..Default::default()
    };
    const ALL: u32 = u32::MAX;
    vec![
        leaf(0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0xc06f2, 0x0102_0800, ALL, ALL]),
        leaf(4, 3, [0x0400_4163, 0, 0, 0]),
        leaf(6, 0, [ALL; 4]),
        leaf(7, 0, [2, ALL, ALL, ALL]),
        leaf(7, 1, [ALL; 4]),
        leaf(0xa, 0, [ALL; 4]),
        leaf(0xd, 0, [0x6_02e7, 0xa88, 0x2b00, 0]),
        leaf(0xd, 1, [0x1f, 0, 0x1800, 0]),
        leaf(0xd, 2, [0x100, 0x240, 0, 0]),
        leaf(0xd, 5, [0x40, 0x440, 0, 0]),
        leaf(0xd, 6, [0x200, 0x480, 0, 0]),
        leaf(0xd, 7, [0x400, 0x680, 0, 0]),
        leaf(0xd, 9, [8, 0xa80, 0, 0]),
        leaf(0xd, 11, [0x10, 0, 1, 0]),
        leaf(0xd, 18, [0x2000, 0xb00, 0, 0]),
        leaf(0x4000_0001, 0, [ALL, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, ALL, ALL]),
        leaf(0x8000_0008, 0, [0x3039, ALL, 0, 0]),
    ]
}

fn profile(baseline: Baseline) -> CpuProfile {
    CpuProfile {
        baseline,
        masked: Vec::new(),
    }
}

fn has(entries: &[kvm_cpuid_entry2], leaf: u32, register: CpuidRegister, bit: u32) -> bool {
    word(entries, leaf, 0, register) & 1 << bit != 0
}

#[test]
fn each_level_offers_what_the_psabi_says() {
    // (first level that has it, leaf, register, bit): x86-64 psABI, table 3.1.
    let table = [
        (Baseline::V2, 1, CpuidRegister::Ecx, 13),
        (Baseline::V2, 1, CpuidRegister::Ecx, 20),
        (Baseline::V2, 1, CpuidRegister::Ecx, 23),
        (Baseline::V2, 0x8000_0001, CpuidRegister::Ecx, 0),
        (Baseline::V3, 1, CpuidRegister::Ecx, 28),
        (Baseline::V3, 1, CpuidRegister::Ecx, 12),
        (Baseline::V3, 7, CpuidRegister::Ebx, 5),
        (Baseline::V3, 7, CpuidRegister::Ebx, 8),
        (Baseline::V3, 0x8000_0001, CpuidRegister::Ecx, 5),
        (Baseline::V4, 7, CpuidRegister::Ebx, 16),
        (Baseline::V4, 7, CpuidRegister::Ebx, 31),
        (Baseline::Host, 7, CpuidRegister::Ecx, 1),
    ];
    for level in [
        Baseline::V1,
        Baseline::V2,
        Baseline::V3,
        Baseline::V4,
        Baseline::Host,
    ] {
        let entries = profile(level).apply(&everything());
        for (first, leaf, register, bit) in table {
            let found = has(&entries, leaf, register, bit);
            assert_eq!(
                found,
                level >= first,
                "{level}: leaf {leaf:#x} {register:?} bit {bit}"
            );
        }
    }
}

#[test]
fn what_a_snapshot_cannot_carry_is_never_offered() {
    let entries = profile(Baseline::Host).apply(&everything());
    assert!(!has(&entries, 1, CpuidRegister::Ecx, 5), "VMX");
    assert!(!has(&entries, 7, CpuidRegister::Ebx, 2), "SGX");
    assert!(
        !has(&entries, 0x4000_0001, CpuidRegister::Eax, 4),
        "asynchronous page faults"
    );
    assert!(!has(&entries, 0xd, CpuidRegister::Eax, 18), "AMX tiles");
    assert!(
        entries.iter().all(|entry| entry.function != 0xa),
        "performance counters"
    );
}

#[test]
fn extended_state_agrees_with_its_mask() {
    let area = |baseline| {
        let entries = profile(baseline).apply(&everything());
        let components: Vec<_> = entries
            .iter()
            .filter(|entry| entry.function == 0xd && entry.index >= 2)
            .map(|entry| entry.index)
            .collect();
        (word(&entries, 0xd, 0, CpuidRegister::Ecx), components)
    };
    assert_eq!(area(Baseline::V2), (0, vec![]));
    // 0x240 + 0x100: the end of the AVX state.
    assert_eq!(area(Baseline::V3), (0x340, vec![2, 11]));
    assert_eq!(area(Baseline::V4), (0xa88, vec![2, 5, 6, 7, 9, 11]));
    assert_eq!(area(Baseline::Host), (0xa88, vec![2, 5, 6, 7, 9, 11]));
}

#[test]
fn masks_take_single_features_away() {
    let cx16 = CpuidWord {
        leaf: 1,
        subleaf: 0,
        register: CpuidRegister::Ecx,
        bits: 1 << 13,
    };
    let profile = CpuProfile {
        baseline: Baseline::V3,
        masked: vec![cx16],
    };
    let entries = profile.apply(&everything());
    assert!(!has(&entries, 1, CpuidRegister::Ecx, 13));
    assert!(has(&entries, 1, CpuidRegister::Ecx, 20));
}

#[test]
fn features_are_what_a_host_must_offer() {
    let guest = features(&profile(Baseline::V3).apply(&everything()));
    let avx2 = |word: &&CpuidWord| (word.leaf, word.register) == (7, CpuidRegister::Ebx);
    let word = guest.iter().find(avx2).unwrap();
    assert_eq!(
        word.bits & (1 << 3 | 1 << 5 | 1 << 8),
        1 << 3 | 1 << 5 | 1 << 8
    );
    // OSXSAVE mirrors the guest's own CR4, and a place in the topology is no feature.
    let osxsave = |word: &&CpuidWord| (word.leaf, word.register) == (1, CpuidRegister::Ecx);
    assert_eq!(
        guest.iter().find(osxsave).unwrap().bits & (1 << 27 | 1 << 31),
        0
    );
    assert_eq!(
        features(&for_vcpu(&profile(Baseline::V3).apply(&everything()), 1, 4)),
        guest
    );
}

#[test]
fn each_vcpu_knows_its_place() {
    let shared = profile(Baseline::V3).apply(&everything());
    for vcpus in [1_u8, 2, 3, 8, 255] {
        for id in [0, vcpus - 1] {
            let entries = for_vcpu(&shared, id, vcpus);
            assert_eq!(
                word(&entries, 1, 0, CpuidRegister::Ebx) >> 24,
                u32::from(id)
            );
            assert_eq!(word(&entries, 0xb, 1, CpuidRegister::Edx), u32::from(id));
            assert_eq!(word(&entries, 0xb, 1, CpuidRegister::Ebx), u32::from(vcpus));
            let shift = word(&entries, 0xb, 1, CpuidRegister::Eax);
            assert_eq!(u32::from(id) >> shift, 0, "all in one package");
            assert_eq!(has(&entries, 1, CpuidRegister::Edx, 28), vcpus > 1, "HTT");
            assert!(has(&entries, 1, CpuidRegister::Ecx, 31), "hypervisor");
        }
    }
}

#[test]
fn names_are_read_back() {
    for baseline in [
        Baseline::V1,
        Baseline::V2,
        Baseline::V3,
        Baseline::V4,
        Baseline::Host,
    ] {
        assert_eq!(baseline.to_string().parse(), Ok(baseline));
    }
    assert!("x86-64-v9".parse::<Baseline>().is_err());
    assert_eq!(vendor(&everything()), Some(*b"GenuineIntel"));
}
