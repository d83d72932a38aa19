//! The named baselines: which feature bits each lets through.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::{EXTENDED_STATE, KVM_FEATURES};

/// An upper bound on the instructions that the guest's programs may use.
///
/// A guest gets what both the baseline and the host have. What the operating system needs besides
/// (timers, paging, mitigations) comes from the host under every baseline, and a snapshot's
/// requirements list it bit by bit.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
pub enum Baseline {
    /// `x86-64-v1`: the first x86-64 processors.
    V1,
    /// `x86-64-v2`: with SSE4.2, POPCNT, CMPXCHG16B (2009 on).
    V2,
    /// `x86-64-v3`: with AVX2, BMI, FMA (2013 on).
    #[default]
    V3,
    /// `x86-64-v4`: with AVX-512 F, BW, CD, DQ, VL.
    V4,
    /// `host`: all that KVM offers here; such a snapshot may find few other hosts to run on.
    Host,
}

/// The names, as in the psABI.
const NAMES: [(Baseline, &str); 5] = [
    (Baseline::V1, "x86-64-v1"),
    (Baseline::V2, "x86-64-v2"),
    (Baseline::V3, "x86-64-v3"),
    (Baseline::V4, "x86-64-v4"),
    (Baseline::Host, "host"),
];

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        NAMES
            .iter()
            .filter(|(baseline, _)| baseline == self)
            .try_for_each(|(_, name)| f.write_str(name))
    }
}

/// A name that is no baseline's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the CPU baselines are x86-64-v1, x86-64-v2, x86-64-v3, x86-64-v4 and host")]
pub struct UnknownBaseline;

impl FromStr for Baseline {
    type Err = UnknownBaseline;

    fn from_str(name: &str) -> Result<Self, UnknownBaseline> {
        NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(baseline, _)| *baseline)
            .ok_or(UnknownBaseline)
    }
}

/// A set of bit numbers as a mask.
const fn bits(numbers: &[u32]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < numbers.len() {
        mask |= 1 << numbers[index];
        index += 1;
    }
    mask
}

/// What one level adds to the level below it.
struct Level {
    leaf1_ecx: u32,
    leaf7_ebx: u32,
    leaf7_ecx: u32,
    extended_ecx: u32,
    xcr0: u32,
    xsave: u32,
}

/// Bits that every baseline lets through, for the operating system rather than for programs.
mod platform {
    use super::bits;

    /// PCID, x2APIC, TSC deadline, hypervisor.
    pub(super) const LEAF1_ECX: u32 = bits(&[17, 21, 24, 31]);
    /// FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, SMAP.
    pub(super) const LEAF7_EBX: u32 = bits(&[0, 1, 7, 9, 10, 20]);
    /// UMIP, 57-bit addresses, RDPID.
    pub(super) const LEAF7_ECX: u32 = bits(&[2, 16, 22]);
    /// FSRM, MD_CLEAR, SERIALIZE, IBRS/IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
    pub(super) const LEAF7_EDX: u32 = bits(&[4, 10, 14, 26, 27, 28, 29, 31]);
    /// CMP_LEGACY, CR8_LEGACY, PREFETCHW, topology extensions.
    pub(super) const EXTENDED_ECX: u32 = bits(&[1, 4, 8, 22]);
}

const LEVELS: [(Baseline, Level); 4] = [
    (
        Baseline::V1,
        Level {
            leaf1_ecx: 0,
            leaf7_ebx: 0,
            leaf7_ecx: 0,
            extended_ecx: 0,
            xcr0: 0,
            xsave: 0,
        },
    ),
    (
        Baseline::V2,
        Level {
            // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT.
            leaf1_ecx: bits(&[0, 9, 13, 19, 20, 23]),
            leaf7_ebx: 0,
            leaf7_ecx: 0,
            // LAHF.
            extended_ecx: bits(&[0]),
            xcr0: 0,
            xsave: 0,
        },
    ),
    (
        Baseline::V3,
        Level {
            // PCLMULQDQ, FMA, MOVBE, AES, XSAVE, AVX, F16C, RDRAND.
            leaf1_ecx: bits(&[1, 12, 22, 25, 26, 28, 29, 30]),
            // BMI1, AVX2, BMI2.
            leaf7_ebx: bits(&[3, 5, 8]),
            leaf7_ecx: 0,
            // LZCNT.
            extended_ecx: bits(&[5]),
            // x87, SSE, AVX.
            xcr0: bits(&[0, 1, 2]),
            // XSAVEOPT.
            xsave: bits(&[0]),
        },
    ),
    (
        Baseline::V4,
        Level {
            leaf1_ecx: 0,
            // AVX512F, AVX512DQ, RDSEED, ADX, CLFLUSHOPT, CLWB, AVX512CD, AVX512BW, AVX512VL.
            leaf7_ebx: bits(&[16, 17, 18, 19, 23, 24, 28, 30, 31]),
            // PKU.
            leaf7_ecx: bits(&[3]),
            extended_ecx: 0,
            // Opmask, ZMM_Hi256, Hi16_ZMM, PKRU.
            xcr0: bits(&[5, 6, 7, 9]),
            // XSAVEC, XGETBV with ecx = 1.
            xsave: bits(&[1, 2]),
        },
    ),
];

impl Baseline {
    /// The union of a field over this level and all below it.
    fn allowed(self, field: impl Fn(&Level) -> u32) -> u32 {
        LEVELS
            .iter()
            .filter(|(baseline, _)| *baseline <= self)
            .fold(0, |mask, (_, level)| mask | field(level))
    }

    /// Takes out of `entry` what this baseline does not let through.
    pub(super) fn limit(self, entry: &mut kvm_cpuid_entry2) {
        limit_for_capture(entry);
        if self == Self::Host {
            return;
        }
        match (entry.function, entry.index) {
            (0x1, _) => entry.ecx &= platform::LEAF1_ECX | self.allowed(|level| level.leaf1_ecx),
            (0x7, 0) => {
                entry.ebx &= platform::LEAF7_EBX | self.allowed(|level| level.leaf7_ebx);
                entry.ecx &= platform::LEAF7_ECX | self.allowed(|level| level.leaf7_ecx);
                entry.edx &= platform::LEAF7_EDX;
            }
            (0x7, _) => zero(entry),
            (EXTENDED_STATE, 0) => {
                entry.eax &= self.allowed(|level| level.xcr0);
                entry.edx = 0;
            }
            (EXTENDED_STATE, 1) => {
                entry.eax &= self.allowed(|level| level.xsave);
                // Supervisor states are beyond every baseline.
                (entry.ecx, entry.edx) = (0, 0);
            }
            (0x8000_0001, _) => {
                entry.ecx &= platform::EXTENDED_ECX | self.allowed(|level| level.extended_ecx);
            }
            _ => {}
        }
    }
}

/// What no guest gets, for a snapshot could not carry it.
fn limit_for_capture(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        // MONITOR, VMX, SMX, EIST, TM2, PDCM: they need MSRs or threads that are the host's own.
        (0x1, _) => entry.ecx &= !bits(&[3, 5, 6, 7, 8, 15]),
        // Thermal and power management: ARAT alone is a property and not a device.
        (0x6, _) => {
            entry.eax &= bits(&[2]);
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        // SGX, processor trace; SGX launch control; AMX in its three parts.
        (0x7, 0) => {
            entry.ebx &= !bits(&[2, 25]);
            entry.ecx &= !bits(&[30]);
            entry.edx &= !bits(&[22, 24, 25]);
        }
        // XCR0 bits 17 and 18 (AMX tiles) need a permission of the host process.
        (EXTENDED_STATE, 0) => entry.eax &= !bits(&[17, 18]),
        // Asynchronous page faults (bits 4, 10, 14): a token in flight would be lost in a copy,
        // and the task that waits for it would hang.
        (KVM_FEATURES, _) => entry.eax &= !bits(&[4, 10, 14]),
        // SVM.
        (0x8000_0001, _) => entry.ecx &= !bits(&[2]),
        _ => {}
    }
}

/// Leaves that describe the host's own counters, caches of its topology, or devices: performance
/// monitoring, RDT, SGX, PT, TDX, AMX tiles, hybrid cores, V2 topology (leaf 0xb tells the same).
pub(super) fn keeps_leaf(leaf: u32) -> bool {
    !matches!(leaf, 0xa | 0xf | 0x10 | 0x12 | 0x14 | 0x17..=0x1f | 0x20..=0x23 | 0x8000_000a | 0x8000_001f..=0x8000_0022)
}

/// Makes leaf 0xd agree with the XCR0 bits that are left: sub-leaves, and the size that they need
/// together (SDM volume 1, 13.2). Without XSAVE the leaf is empty.
pub(super) fn settle_extended_state(entries: &mut Vec<kvm_cpuid_entry2>) {
    /// The legacy region and the XSAVE header.
    const HEADER_END: u32 = 576;
    const XSAVE: u32 = 1 << 26;
    let has_xsave = entries
        .iter()
        .any(|entry| entry.function == 1 && entry.ecx & XSAVE != 0);
    let xcr0 = super::word(
        entries,
        EXTENDED_STATE,
        0,
        offshoot_snapshot_format::CpuidRegister::Eax,
    );
    entries.retain(|entry| {
        let component = (2..32).contains(&entry.index);
        entry.function != EXTENDED_STATE
            || (has_xsave && (!component || is_kept_state(entry, xcr0)))
    });
    let size = entries
        .iter()
        .filter(|entry| entry.function == EXTENDED_STATE && (2..32).contains(&entry.index))
        .filter(|entry| entry.ecx & 1 == 0)
        .map(|entry| entry.ebx.saturating_add(entry.eax))
        .fold(HEADER_END, u32::max);
    for entry in entries.iter_mut() {
        if (entry.function, entry.index) == (EXTENDED_STATE, 0) {
            // ebx is for the XCR0 in force, 1 after reset; KVM keeps it up to date.
            (entry.ebx, entry.ecx) = (HEADER_END, size);
        }
    }
}

/// A state component stays when XCR0 may hold it, or when it is a supervisor state.
fn is_kept_state(entry: &kvm_cpuid_entry2, xcr0: u32) -> bool {
    const SUPERVISOR: u32 = 1;
    entry.ecx & SUPERVISOR != 0 || xcr0 & (1 << entry.index) != 0
}

fn zero(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}
