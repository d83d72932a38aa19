//! Comparing what a snapshot requires with what a host offers.

use std::fmt;

use super::{Arch, CpuidRegister, CpuidWord, KvmCapability, Requirements};

/// KVM takes TSC frequencies within this many parts per million of each other as equal
/// (`tsc_tolerance_ppm`, its default).
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a host and this build of the machine offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOffers {
    /// The architecture.
    pub arch: Arch,
    /// The CPU vendor as CPUID leaf 0 gives it.
    pub cpu_vendor: String,
    /// CPUID bits that KVM can show a guest (`KVM_GET_SUPPORTED_CPUID`).
    pub cpuid: Vec<CpuidWord>,
    /// Bytes of XSAVE area that KVM can hold (`KVM_CAP_XSAVE2`).
    pub xsave_size: u32,
    /// Model-specific registers that KVM can set (`KVM_GET_MSR_INDEX_LIST`).
    pub msrs: Vec<u32>,
    /// KVM's answers to `KVM_CHECK_EXTENSION`, by number. One that is not here is taken as 0.
    pub kvm_capabilities: Vec<(u32, u32)>,
    /// The host's TSC frequency in kHz, where it is known.
    pub tsc_khz: Option<u32>,
    /// Whether KVM can scale the TSC (`KVM_CAP_TSC_CONTROL`).
    pub tsc_scaling: bool,
    /// The device models of this build.
    pub device_models: Vec<String>,
}

/// A requirement that a host does not meet. Shown as one clause.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mismatch {
    /// Another architecture.
    Arch {
        /// The snapshot's.
        required: Arch,
        /// The host's.
        offered: Arch,
    },
    /// Another CPU vendor.
    CpuVendor {
        /// The snapshot's.
        required: String,
        /// The host's.
        offered: String,
    },
    /// CPUID bits are missing.
    Cpuid {
        /// EAX on entry.
        leaf: u32,
        /// ECX on entry.
        subleaf: u32,
        /// The register.
        register: CpuidRegister,
        /// The bits that are required and not offered.
        missing: u32,
    },
    /// The XSAVE area does not fit.
    XsaveSize {
        /// Bytes that were saved.
        required: u32,
        /// Bytes that the host holds.
        offered: u32,
    },
    /// KVM cannot set a model-specific register.
    Msr(u32),
    /// KVM lacks a capability, or has too little of it.
    KvmCapability {
        /// What is required.
        required: KvmCapability,
        /// What KVM answers.
        offered: u32,
    },
    /// The time-stamp counter runs at another frequency and cannot be scaled.
    Tsc {
        /// The guest's frequency in kHz.
        required_khz: u32,
        /// The host's, where it is known.
        offered_khz: Option<u32>,
    },
    /// This build has no such device model.
    Device {
        /// The model.
        model: String,
        /// The device's name in the machine.
        id: String,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arch { required, offered } => {
                write!(f, "the guest is {required}, the host is {offered}")
            }
            Self::CpuVendor { required, offered } => {
                write!(
                    f,
                    "the guest runs on CPUs of {required:?}, the host's is of {offered:?}"
                )
            }
            Self::Cpuid {
                leaf,
                subleaf,
                register,
                missing,
            } => write!(
                f,
                "CPU features are missing: CPUID {leaf:#x}.{subleaf:#x} {register}, bits {missing:#010x}"
            ),
            Self::XsaveSize { required, offered } => {
                write!(
                    f,
                    "the XSAVE area has {required} bytes, the host holds {offered}"
                )
            }
            Self::Msr(index) => write!(f, "KVM does not set MSR {index:#x}"),
            Self::KvmCapability { required, offered } => write!(
                f,
                "KVM capability {} ({}) must be at least {}, it is {offered}",
                required.name, required.number, required.minimum
            ),
            Self::Tsc {
                required_khz,
                offered_khz: Some(offered),
            } => write!(
                f,
                "the guest counts on a TSC of {required_khz} kHz, the host runs at {offered} kHz and does not scale"
            ),
            Self::Tsc {
                required_khz,
                offered_khz: None,
            } => write!(
                f,
                "the guest counts on a TSC of {required_khz} kHz, the host's frequency is not known and it does not scale"
            ),
            Self::Device { model, id } => {
                write!(
                    f,
                    "device {id} is a {model}, which this build does not have"
                )
            }
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86-64",
            Self::Aarch64 => "aarch64",
        })
    }
}

impl fmt::Display for CpuidRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

impl Requirements {
    /// Every requirement that `host` does not meet; empty when the snapshot can run there.
    #[must_use]
    pub fn unmet(&self, host: &HostOffers) -> Vec<Mismatch> {
        let mut unmet = Vec::new();
        if self.arch != host.arch {
            unmet.push(Mismatch::Arch {
                required: self.arch,
                offered: host.arch,
            });
        }
        if self.cpu_vendor != host.cpu_vendor {
            unmet.push(Mismatch::CpuVendor {
                required: self.cpu_vendor.clone(),
                offered: host.cpu_vendor.clone(),
            });
        }
        unmet.extend(self.cpuid.iter().filter_map(|word| word.missing_on(host)));
        if self.xsave_size > host.xsave_size {
            unmet.push(Mismatch::XsaveSize {
                required: self.xsave_size,
                offered: host.xsave_size,
            });
        }
        let msrs = self.msrs.iter().filter(|msr| !host.msrs.contains(msr));
        unmet.extend(msrs.copied().map(Mismatch::Msr));
        for required in &self.kvm_capabilities {
            let answers = host.kvm_capabilities.iter();
            let offered = answers
                .filter(|(number, _)| *number == required.number)
                .map(|(_, answer)| *answer)
                .max()
                .unwrap_or(0);
            if offered < required.minimum {
                unmet.push(Mismatch::KvmCapability {
                    required: required.clone(),
                    offered,
                });
            }
        }
        if let Some(tsc) = self.tsc
            && tsc.exact
            && !host.tsc_scaling
            && !host.tsc_khz.is_some_and(|khz| close(tsc.khz, khz))
        {
            unmet.push(Mismatch::Tsc {
                required_khz: tsc.khz,
                offered_khz: host.tsc_khz,
            });
        }
        for device in &self.devices {
            if !host.device_models.contains(&device.model) {
                unmet.push(Mismatch::Device {
                    model: device.model.clone(),
                    id: device.id.clone(),
                });
            }
        }
        unmet
    }
}

impl CpuidWord {
    fn missing_on(&self, host: &HostOffers) -> Option<Mismatch> {
        let offered = host
            .cpuid
            .iter()
            .filter(|word| word.key() == self.key())
            .fold(0, |bits, word| bits | word.bits);
        let missing = self.bits & !offered;
        (missing != 0).then_some(Mismatch::Cpuid {
            leaf: self.leaf,
            subleaf: self.subleaf,
            register: self.register,
            missing,
        })
    }
}

/// Whether KVM takes the two frequencies as equal.
fn close(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests;
