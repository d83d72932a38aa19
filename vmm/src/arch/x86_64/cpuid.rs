//! What the guest's processor can do: the host's CPUID as KVM offers it, cut down to a named
//! baseline so that a snapshot can move between hosts, and shaped for each vCPU's place.
//!
//! Leaf and bit numbers are those of the Intel SDM, volume 2A, "CPUID", and of the AMD APM,
//! volume 3, appendix E. Baselines are the micro-architecture levels of the x86-64 psABI.

mod baseline;
#[cfg(test)]
mod tests;
mod topology;

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

pub use baseline::Baseline;
pub use topology::for_vcpu;

/// One of the four registers that CPUID fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Register {
    /// `eax`.
    Eax,
    /// `ebx`.
    Ebx,
    /// `ecx`.
    Ecx,
    /// `edx`.
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

/// Bits of one register of one leaf: features, each a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FeatureWord {
    /// The leaf (`eax` on input).
    pub leaf: u32,
    /// The sub-leaf (`ecx` on input), 0 where the leaf has none.
    pub subleaf: u32,
    /// The register that the bits are in.
    pub register: Register,
    /// The bits.
    pub bits: u32,
}

impl fmt::Display for FeatureWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = match self.register {
            Register::Eax => "eax",
            Register::Ebx => "ebx",
            Register::Ecx => "ecx",
            Register::Edx => "edx",
        };
        write!(
            f,
            "CPUID leaf {:#x}.{:#x} {register} bits {:#x}",
            self.leaf, self.subleaf, self.bits
        )
    }
}

/// Which processor features a machine offers to its guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuProfile {
    /// The upper bound.
    pub baseline: Baseline,
    /// Features taken away besides, whatever the baseline.
    pub masked: Vec<FeatureWord>,
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
                    *word.register.of_mut(entry) &= !word.bits;
                }
            }
        }
        baseline::settle_extended_state(&mut entries);
        entries
    }
}

/// The features that `entries` hold: what a host must support to run a guest that has seen them.
#[must_use]
pub fn features(entries: &[kvm_cpuid_entry2]) -> Vec<FeatureWord> {
    FEATURE_WORDS
        .iter()
        .filter_map(|(leaf, subleaf, register)| {
            let bits = word(entries, *leaf, *subleaf, *register) & !dynamic_bits(*leaf, *register);
            (bits != 0).then_some(FeatureWord {
                leaf: *leaf,
                subleaf: *subleaf,
                register: *register,
                bits,
            })
        })
        .collect()
}

/// Those of `required` that a host with `supported` lacks, all of them.
#[must_use]
pub fn missing(required: &[FeatureWord], supported: &[kvm_cpuid_entry2]) -> Vec<FeatureWord> {
    required
        .iter()
        .filter_map(|word_| {
            let has = word(supported, word_.leaf, word_.subleaf, word_.register)
                | dynamic_bits(word_.leaf, word_.register);
            let bits = word_.bits & !has;
            (bits != 0).then_some(FeatureWord { bits, ..*word_ })
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

fn word(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: Register) -> u32 {
    entries
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
        .map_or(0, |entry| register.of(entry))
}

/// The leaf that holds XCR0's bits and sizes.
const EXTENDED_STATE: u32 = 0xd;
/// KVM's own features.
const KVM_FEATURES: u32 = 0x4000_0001;

/// Every register that holds a feature a bit.
const FEATURE_WORDS: [(u32, u32, Register); 16] = [
    (0x1, 0, Register::Ecx),
    (0x1, 0, Register::Edx),
    (0x6, 0, Register::Eax),
    (0x7, 0, Register::Ebx),
    (0x7, 0, Register::Ecx),
    (0x7, 0, Register::Edx),
    (0x7, 1, Register::Eax),
    (0x7, 1, Register::Edx),
    (0x7, 2, Register::Edx),
    (EXTENDED_STATE, 0, Register::Eax),
    (EXTENDED_STATE, 1, Register::Eax),
    (KVM_FEATURES, 0, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
];

/// Bits that say what the guest or its topology made of it, not what the processor can do:
/// leaf 1 `OSXSAVE`, hypervisor and `HTT`, leaf 7 `OSPKE`.
fn dynamic_bits(leaf: u32, register: Register) -> u32 {
    match (leaf, register) {
        (0x1, Register::Ecx) => 1 << 27 | 1 << 31,
        (0x1, Register::Edx) => 1 << 28,
        (0x7, Register::Ecx) => 1 << 4,
        _ => 0,
    }
}
