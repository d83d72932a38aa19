//! What the guest's processor can do: the host's CPUID as KVM offers it, cut down to a named
//! baseline so that a snapshot can move between hosts, and shaped for each vCPU's place.
//!
//! Leaf and bit numbers are those of the Intel SDM, volume 2A, "CPUID", and of the AMD APM,
//! volume 3, appendix E. Baselines are the micro-architecture levels of the x86-64 psABI.

mod baseline;
#[cfg(test)]
mod tests;
mod topology;

use kvm_bindings::kvm_cpuid_entry2;
use offshoot_snapshot_format::{CpuidRegister, CpuidWord};
use serde::{Deserialize, Serialize};

pub use baseline::Baseline;
pub use topology::for_vcpu;

fn register_of(entry: &kvm_cpuid_entry2, register: CpuidRegister) -> u32 {
    match register {
        CpuidRegister::Eax => entry.eax,
        CpuidRegister::Ebx => entry.ebx,
        CpuidRegister::Ecx => entry.ecx,
        CpuidRegister::Edx => entry.edx,
    }
}

fn register_of_mut(entry: &mut kvm_cpuid_entry2, register: CpuidRegister) -> &mut u32 {
    match register {
        CpuidRegister::Eax => &mut entry.eax,
        CpuidRegister::Ebx => &mut entry.ebx,
        CpuidRegister::Ecx => &mut entry.ecx,
        CpuidRegister::Edx => &mut entry.edx,
    }
}

/// Which processor features a machine offers to its guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuProfile {
    /// The upper bound.
    pub baseline: Baseline,
    /// Features taken away besides, whatever the baseline.
    pub masked: Vec<CpuidWord>,
}

impl CpuProfile {
    /// What a guest gets on a host that supports `supported` (`KVM_GET_SUPPORTED_CPUID`): still
    /// the same for all vCPUs, see [`for_vcpu`].
    #[must_use]
    pub fn apply(&self, supported: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let mut entries: Vec<_> = supported
            .iter()
            .filter(|entry| baseline::keeps_leaf(entry.function))
            .copied()
            .collect();
        for entry in &mut entries {
            self.baseline.limit(entry);
            for word in &self.masked {
                if (word.leaf, word.subleaf) == (entry.function, entry.index) {
                    *register_of_mut(entry, word.register) &= !word.bits;
                }
            }
        }
        baseline::settle_extended_state(&mut entries);
        entries
    }
}

/// The features that `entries` hold: of a guest, what a host must offer to run it; of a host, what
/// it offers.
#[must_use]
pub fn features(entries: &[kvm_cpuid_entry2]) -> Vec<CpuidWord> {
    FEATURE_WORDS
        .iter()
        .filter_map(|(leaf, subleaf, register)| {
            let bits = word(entries, *leaf, *subleaf, *register) & !dynamic_bits(*leaf, *register);
            (bits != 0).then_some(CpuidWord {
                leaf: *leaf,
                subleaf: *subleaf,
                register: *register,
                bits,
            })
        })
        .collect()
}

/// The vendor string of leaf 0, "GenuineIntel" for one.
#[must_use]
pub fn vendor(entries: &[kvm_cpuid_entry2]) -> Option<[u8; 12]> {
    let leaf = entries.iter().find(|entry| entry.function == 0)?;
    let mut vendor = [0; 12];
    for (slot, part) in vendor.chunks_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        slot.copy_from_slice(&part.to_le_bytes());
    }
    Some(vendor)
}

fn word(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
    entries
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
        .map_or(0, |entry| register_of(entry, register))
}

/// The leaf that holds XCR0's bits and sizes.
const EXTENDED_STATE: u32 = 0xd;
/// KVM's own features.
const KVM_FEATURES: u32 = 0x4000_0001;

/// Every register that holds a feature a bit.
const FEATURE_WORDS: [(u32, u32, CpuidRegister); 16] = [
    (0x1, 0, CpuidRegister::Ecx),
    (0x1, 0, CpuidRegister::Edx),
    (0x6, 0, CpuidRegister::Eax),
    (0x7, 0, CpuidRegister::Ebx),
    (0x7, 0, CpuidRegister::Ecx),
    (0x7, 0, CpuidRegister::Edx),
    (0x7, 1, CpuidRegister::Eax),
    (0x7, 1, CpuidRegister::Edx),
    (0x7, 2, CpuidRegister::Edx),
    (EXTENDED_STATE, 0, CpuidRegister::Eax),
    (EXTENDED_STATE, 1, CpuidRegister::Eax),
    (KVM_FEATURES, 0, CpuidRegister::Eax),
    (0x8000_0001, 0, CpuidRegister::Ecx),
    (0x8000_0001, 0, CpuidRegister::Edx),
    (0x8000_0007, 0, CpuidRegister::Edx),
    (0x8000_0008, 0, CpuidRegister::Ebx),
];

/// Bits that say what the guest or its topology made of it, not what the processor can do:
/// leaf 1 `OSXSAVE`, hypervisor and `HTT`, leaf 7 `OSPKE`.
fn dynamic_bits(leaf: u32, register: CpuidRegister) -> u32 {
    match (leaf, register) {
        (0x1, CpuidRegister::Ecx) => 1 << 27 | 1 << 31,
        (0x1, CpuidRegister::Edx) => 1 << 28,
        (0x7, CpuidRegister::Ecx) => 1 << 4,
        _ => 0,
    }
}
