//! A vCPU's place: one package, a core for each vCPU, one thread a core.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 0xb level types (SDM).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// `entries` as vCPU `id` of `vcpus` sees them; its APIC id is `id`.
#[must_use]
pub fn for_vcpu(entries: &[kvm_cpuid_entry2], id: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let (id, vcpus) = (u32::from(id), u32::from(vcpus.max(1)));
    let mut entries: Vec<_> = entries
        .iter()
        .filter(|entry| entry.function != 0xb)
        .copied()
        .collect();
    for entry in &mut entries {
        place(entry, id, vcpus);
    }
    entries.extend(extended_topology(id, vcpus));
    entries
}

fn place(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    match entry.function {
        0x1 => {
            const HYPERVISOR: u32 = 1 << 31;
            const HTT: u32 = 1 << 28;
            // ebx: initial APIC id, logical processors, CLFLUSH line; the brand index is none.
            entry.ebx = id << 24 | vcpus.next_power_of_two().min(255) << 16 | entry.ebx & 0xff00;
            entry.ecx |= HYPERVISOR;
            if vcpus > 1 {
                entry.edx |= HTT;
            } else {
                entry.edx &= !HTT;
            }
        }
        // eax: 31:26 cores in the package less one, 25:14 processors that share the cache less one.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0b111;
            let sharing = if level >= 3 {
                (vcpus - 1).min(0xfff)
            } else {
                0
            };
            let cores = (vcpus.next_power_of_two() - 1).min(0x3f);
            entry.eax = cores << 26 | sharing << 14 | entry.eax & 0x3fff;
        }
        // AMD: ecx 7:0 processors less one, 15:12 bits of the APIC id that tell them apart.
        0x8000_0008 => entry.ecx = apic_id_bits(vcpus) << 12 | (vcpus - 1),
        // AMD: extended APIC id, core id and threads a core less one, node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Leaf 0xb: level 0 is a thread of a core, level 1 a core of the package, level 2 ends the list.
fn extended_topology(id: u32, vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, apic_id_bits(vcpus), vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// How many low bits of the APIC id tell the package's processors apart.
fn apic_id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}
