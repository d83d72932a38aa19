//! What this host's KVM offers, asked once.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use crate::arch::msr;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::threads;

/// The only version of the KVM API there has been since 2007.
const KVM_API_VERSION: i32 = 12;

/// What a machine cannot do without, and what for.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "guest memory"),
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::Pit2, "a timer in the kernel"),
    (Cap::Irqfd, "interrupts by eventfd"),
    (Cap::Ioeventfd, "notifications by eventfd"),
    (Cap::ImmediateExit, "pausing a vCPU"),
    (Cap::MpState, "saving whether a vCPU is halted"),
    (Cap::ExtCpuid, "setting CPUID"),
    (Cap::VcpuEvents, "saving pending exceptions"),
    (Cap::Debugregs, "saving debug registers"),
    (Cap::Xcrs, "saving extended control registers"),
    (Cap::Xsave, "saving vector registers"),
    (Cap::AdjustClock, "saving the guest's clock"),
    (Cap::GetTscKhz, "knowing the guest's TSC frequency"),
];

/// This host's KVM, open and found sufficient. Shared by all machines.
pub struct Host {
    kvm: Kvm,
    supported_cpuid: CpuId,
    msr_indices: Vec<u32>,
    xsave_size: usize,
    tsc_control: bool,
    tsc_khz: OnceLock<Option<u32>>,
    max_vcpus: usize,
}

impl Host {
    /// Opens `/dev/kvm` and checks that it offers what a machine needs.
    ///
    /// # Errors
    /// [`ErrorKind::NoKvm`] when there is none or no permission, [`ErrorKind::Unsupported`] with
    /// all that is missing.
    pub fn open() -> Result<Arc<Self>> {
        let fd = Kvm::open_with_cloexec(true).map_err(|e| no_kvm(e.errno()))?;
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        let kvm = unsafe { Kvm::from_raw_fd(fd) };
        if kvm.get_api_version() != KVM_API_VERSION {
            return Err(Error::new(
                ErrorKind::NoKvm,
                "/dev/kvm does not speak version 12 of the KVM API; is it the real device?",
            ));
        }
        let missing: Vec<&str> = NEEDED
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, what)| *what)
            .collect();
        if !missing.is_empty() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "this host's KVM lacks what a machine needs: {}",
                    missing.join(", ")
                ),
            ));
        }
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("cannot ask KVM for the CPU features it supports")?;
        let msr_indices = kvm
            .get_msr_index_list()
            .context("cannot ask KVM for the MSRs it supports")?
            .as_slice()
            .to_vec();
        let msr_indices = msr::candidates(&msr_indices);
        // The capability's value is the size, 0 on kernels that only know the classic 4 KiB.
        let xsave_size = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Arc::new(Self {
            supported_cpuid,
            msr_indices,
            xsave_size: xsave_size.max(crate::arch::XSAVE_MIN),
            tsc_khz: OnceLock::new(),
            tsc_control: kvm.check_extension(Cap::TscControl),
            max_vcpus: kvm.get_max_vcpus(),
            kvm,
        }))
    }

    /// The CPU features that KVM can give to a guest here.
    #[must_use]
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }

    /// The MSRs that KVM may be able to save here, its own among them, ascending.
    #[must_use]
    pub fn msr_indices(&self) -> &[u32] {
        &self.msr_indices
    }

    /// The largest number of vCPUs of one machine.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.max_vcpus
    }

    /// The size of a vCPU's saved vector registers, in bytes.
    pub(crate) fn xsave_size(&self) -> usize {
        self.xsave_size
    }

    /// Whether a guest's TSC can be made to run at another frequency than the host's.
    pub(crate) fn tsc_control(&self) -> bool {
        self.tsc_control
    }

    /// The frequency that a guest's TSC has here by itself, where KVM tells.
    pub(crate) fn tsc_khz(&self) -> Option<u32> {
        *self.tsc_khz.get_or_init(|| {
            // Only a vCPU knows. This one never runs; closing it takes long, which nobody waits for.
            let vm = self.kvm.create_vm().ok()?;
            let vcpu = vm.create_vcpu(0).ok()?;
            let khz = vcpu.get_tsc_khz().ok().filter(|khz| *khz != 0);
            let _ = threads::spawn("reaper".into(), move || drop((vcpu, vm)));
            khz
        })
    }

    /// The capabilities that every machine needs: number and name.
    pub(crate) fn needed_capabilities() -> impl Iterator<Item = (u32, String)> {
        NEEDED
            .iter()
            .map(|(cap, _)| (*cap as u32, format!("{cap:?}")))
    }

    /// KVM's answer for the capability of this number; 0 when it has it not.
    pub(crate) fn capability(&self, number: u32) -> u32 {
        let answer = self.kvm.check_extension_raw(number.into());
        u32::try_from(answer).unwrap_or(0)
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

impl AsRawFd for Host {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.kvm.as_raw_fd()
    }
}

fn no_kvm(errno: i32) -> Error {
    let advice = match errno {
        libc::ENOENT => {
            "there is no /dev/kvm here: load the module kvm_intel or kvm_amd, or, in a virtual \
             machine or container, let it have the device"
        }
        libc::EACCES | libc::EPERM => {
            "no permission to open /dev/kvm: add the user to the group that owns it (often kvm)"
        }
        libc::ENODEV | libc::ENXIO => {
            "/dev/kvm is there and has no driver: switch virtualisation on in the firmware and \
             load the module kvm_intel or kvm_amd"
        }
        _ => "cannot open /dev/kvm",
    };
    Error::because(
        ErrorKind::NoKvm,
        advice,
        io::Error::from_raw_os_error(errno),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_of_having_no_kvm_says_what_to_do() {
        for (errno, word) in [
            (libc::ENOENT, "load the module"),
            (libc::EACCES, "group"),
            (libc::ENODEV, "firmware"),
        ] {
            let error = no_kvm(errno);
            assert_eq!(error.kind(), ErrorKind::NoKvm);
            assert!(error.to_string().contains(word), "{error}");
            assert!(std::error::Error::source(&error).is_some());
        }
    }
}
