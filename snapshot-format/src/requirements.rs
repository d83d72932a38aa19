//! The section `REQS`: what a host must offer, readable on its own and checked first.

mod check;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

pub use check::{HostOffers, Mismatch};

use crate::error::Broken;
use crate::limits::{MAX_CPU_REQUIRED, MAX_REQUIRED};
use crate::{Payload, SectionKind, text};

/// The guest's architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Arch {
    /// x86-64.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

/// A register that CPUID fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the registers' names say it all")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Bits of one word of CPUID: as a requirement, all set ones are needed; as an offer, they are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidWord {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; zero for leaves without subleaves.
    pub subleaf: u32,
    /// Which register holds the bits.
    pub register: CpuidRegister,
    /// The bits.
    pub bits: u32,
}

impl CpuidWord {
    fn key(&self) -> (u32, u32, CpuidRegister) {
        (self.leaf, self.subleaf, self.register)
    }
}

/// A capability of KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmCapability {
    /// `KVM_CAP_*` as a number.
    pub number: u32,
    /// Its name, for messages.
    pub name: String,
    /// `KVM_CHECK_EXTENSION` must answer at least this.
    pub minimum: u32,
}

/// The guest's time-stamp counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tsc {
    /// Its frequency in kHz.
    pub khz: u32,
    /// The guest counts on this frequency: the host must run at it or scale to it.
    pub exact: bool,
}

/// A device of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceModel {
    /// The model, which the restoring build must have: `virtio-blk`.
    pub model: String,
    /// The device's name in the machine; unique.
    pub id: String,
}

/// What a host must offer so that the snapshot can run there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirements {
    /// The architecture.
    pub arch: Arch,
    /// The CPU vendor as CPUID leaf 0 gives it.
    pub cpu_vendor: String,
    /// The named CPU model that the guest was shown; informative.
    pub cpu_baseline: String,
    /// CPUID bits that the guest may rely on.
    pub cpuid: Vec<CpuidWord>,
    /// Bytes of the saved XSAVE area.
    pub xsave_size: u32,
    /// Model-specific registers that will be set, ascending.
    pub msrs: Vec<u32>,
    /// What KVM must be able to do.
    pub kvm_capabilities: Vec<KvmCapability>,
    /// The time-stamp counter, where the architecture has one.
    pub tsc: Option<Tsc>,
    /// The machine's devices.
    pub devices: Vec<DeviceModel>,
}

impl Payload for Requirements {
    const KIND: SectionKind = SectionKind(*b"REQS");
    const VERSION: u16 = 1;
}

impl Requirements {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        text::line("the CPU vendor", &self.cpu_vendor)?;
        text::line("the CPU baseline", &self.cpu_baseline)?;
        Broken::if_more("CPUID words", self.cpuid.len(), MAX_CPU_REQUIRED)?;
        let mut words = HashSet::new();
        if !self.cpuid.iter().all(|w| words.insert(w.key())) {
            return Err(Broken::Rule("a CPUID word occurs twice"));
        }
        Broken::if_more("MSRs", self.msrs.len(), MAX_CPU_REQUIRED)?;
        if !self.msrs.is_sorted_by(|a, b| a < b) {
            return Err(Broken::Rule("the MSRs do not ascend"));
        }
        Broken::if_more("capabilities", self.kvm_capabilities.len(), MAX_REQUIRED)?;
        let mut numbers = HashSet::new();
        for capability in &self.kvm_capabilities {
            text::line("a capability's name", &capability.name)?;
            if !numbers.insert(capability.number) {
                return Err(Broken::Rule("a capability occurs twice"));
            }
        }
        Broken::if_more("devices", self.devices.len(), MAX_REQUIRED)?;
        let mut ids = HashSet::new();
        for device in &self.devices {
            text::label("a device's model", &device.model)?;
            text::label("a device's id", &device.id)?;
            if !ids.insert(&device.id) {
                return Err(Broken::Rule("two devices have the same id"));
            }
        }
        Ok(())
    }
}
