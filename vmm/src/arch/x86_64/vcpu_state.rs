//! The state of one vCPU.
//!
//! # Saving order
//! | step | why here |
//! |---|---|
//! | MP state | reading it lets KVM act on a pending INIT or SIPI, which changes registers |
//! | registers, XSAVE, XCRs, debug registers, events | |
//! | LAPIC | |
//! | MSRs | the TSC last of all state, so that it is not behind a deadline that was read before it |
//!
//! # Restoring order
//! | step | why here |
//! |---|---|
//! | CPUID | decides which MSRs, XSAVE components and control register bits KVM accepts |
//! | TSC frequency | before the TSC itself, which KVM scales by it |
//! | special registers | hold the APIC base, and with it the LAPIC's mode, and EFER |
//! | registers, XCRs, XSAVE, debug registers | XCR0 before the components that it enables |
//! | TSC | before the LAPIC's deadline, which is compared with it |
//! | LAPIC | its timer mode decides whether a deadline is taken |
//! | MSRs, the TSC deadline last | a deadline in the past fires at once: everything else is in place |
//! | events | setting registers clears a pending exception |
//! | MP state | last: it says whether the vCPU runs, is halted, or waits for a SIPI |
//!
//! # Rules of the unsafe code here
//! The kernel reads and writes as many bytes of an XSAVE area as `KVM_CAP_XSAVE2` says; every
//! area made here is at least that large.

use kvm_bindings::{
    CpuId, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use offshoot_snapshot_format::{CpuidWord, Payload, SectionKind};
use serde::{Deserialize, Serialize};

use super::cpuid;
use super::msr::{self, Msr};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::Host;

/// More CPUID entries than any processor has; KVM's own limit.
const MAX_CPUID: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// A saved vCPU. Untrusted: [`VcpuState::check`] looks at what KVM does not.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// CPUID as it was given to this vCPU (its APIC id included).
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The TSC's frequency.
    pub tsc_khz: u32,
    /// Whether it runs, is halted, or waits.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// The XSAVE area: as many bytes as this host's KVM keeps.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Exceptions and interrupts on their way in.
    pub events: kvm_vcpu_events,
    /// The local APIC's registers.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("mp_state", &self.mp_state.mp_state)
            .field("regs", &self.regs)
            .finish_non_exhaustive()
    }
}

impl Payload for VcpuState {
    const KIND: SectionKind = SectionKind(*b"VCPU");
    const VERSION: u16 = 1;
}

impl VcpuState {
    /// Reads a vCPU that is not in `KVM_RUN` and has no exit left to complete.
    pub(crate) fn save(
        host: &Host,
        vcpu: &VcpuFd,
        cpuid: &CpuId,
        msr_indices: &[u32],
    ) -> Result<Self> {
        const WHAT: &str = "cannot read a vCPU's state";
        let mp_state = vcpu.get_mp_state().context(WHAT)?;
        let regs = vcpu.get_regs().context(WHAT)?;
        let sregs = vcpu.get_sregs().context(WHAT)?;
        let xcrs = vcpu.get_xcrs().context(WHAT)?;
        let xsave = save_xsave(host, vcpu)?;
        let debug = vcpu.get_debug_regs().context(WHAT)?;
        let events = vcpu.get_vcpu_events().context(WHAT)?;
        let lapic = vcpu.get_lapic().context(WHAT)?;
        let tsc_khz = vcpu.get_tsc_khz().context(WHAT)?;
        let msrs = msr::read(vcpu, msr_indices)?;
        if msrs.len() != msr_indices.len() {
            return Err(Error::new(
                ErrorKind::System,
                "an MSR that could be read when the vCPU was made cannot be read any more",
            ));
        }
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz,
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            debug,
            events,
            lapic,
            msrs,
        })
    }

    /// The saved CPUID as KVM takes it.
    pub(crate) fn cpuid(&self) -> Result<CpuId> {
        CpuId::from_entries(&self.cpuid)
            .map_err(|_| Error::new(ErrorKind::BadState, "there are too many CPUID entries"))
    }

    /// Sets a vCPU that was just made.
    pub(crate) fn restore(&self, host: &Host, vcpu: &VcpuFd) -> Result<()> {
        const WHAT: &str = "KVM refuses a saved vCPU's state";
        vcpu.set_cpuid2(&self.cpuid()?)
            .context("KVM refuses a saved vCPU's CPUID")?;
        if vcpu.get_tsc_khz().context(WHAT)? != self.tsc_khz && host.tsc_control() {
            vcpu.set_tsc_khz(self.tsc_khz)
                .context("KVM cannot give the guest its TSC frequency")?;
        }
        vcpu.set_sregs(&self.sregs)
            .context("KVM refuses a saved vCPU's control registers")?;
        vcpu.set_regs(&self.regs).context(WHAT)?;
        vcpu.set_xcrs(&self.xcrs)
            .context("KVM refuses a saved vCPU's extended control registers")?;
        restore_xsave(host, vcpu, &self.xsave)?;
        vcpu.set_debug_regs(&self.debug)
            .context("KVM refuses a saved vCPU's debug registers")?;
        let of = |wanted: &[u32]| -> Vec<Msr> {
            let picked = self.msrs.iter().filter(|m| wanted.contains(&m.index));
            picked.copied().collect()
        };
        const EARLY: &[u32] = &[msr::IA32_TSC];
        const LATE: &[u32] = &[msr::IA32_TSC_DEADLINE];
        msr::write(vcpu, &of(EARLY))?;
        vcpu.set_lapic(&self.lapic)
            .context("KVM refuses a saved vCPU's local APIC")?;
        let others: Vec<Msr> = self
            .msrs
            .iter()
            .filter(|m| !EARLY.contains(&m.index) && !LATE.contains(&m.index))
            .copied()
            .chain(of(LATE))
            .collect();
        msr::write(vcpu, &others)?;
        vcpu.set_vcpu_events(&self.events)
            .context("KVM refuses a saved vCPU's pending events")?;
        vcpu.set_mp_state(self.mp_state)
            .context("KVM refuses a saved vCPU's run state")?;
        Ok(())
    }

    /// What does not fit this host, in words; nothing when it does. KVM's own checks come on top
    /// of this when the state is set.
    ///
    /// # Errors
    /// [`ErrorKind::BadState`] when no host would take it.
    pub fn check(&self, host: &Host) -> Result<Vec<String>> {
        if self.cpuid.is_empty() || self.cpuid.len() > MAX_CPUID {
            return Err(bad("a vCPU has no CPUID entries, or too many"));
        }
        if self.msrs.len() > msr::MAX_MSRS {
            return Err(bad("a vCPU has too many MSRs"));
        }
        let mut indices: Vec<u32> = self.msrs.iter().map(|m| m.index).collect();
        indices.sort_unstable();
        if indices.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(bad("a vCPU has an MSR twice"));
        }
        if self.xsave.len() < super::XSAVE_MIN || !self.xsave.len().is_multiple_of(4) {
            return Err(bad("a vCPU's XSAVE area has an impossible size"));
        }
        let mut misfits = Vec::new();
        if self.xsave.len() > host.xsave_size() {
            misfits.push(format!(
                "the saved vector registers take {} bytes, this host's KVM keeps {}",
                self.xsave.len(),
                host.xsave_size()
            ));
        }
        let required = cpuid::features(&self.cpuid);
        let offered = cpuid::features(host.supported_cpuid().as_slice());
        let lacking = required.iter().filter_map(|word| {
            let same = |o: &&CpuidWord| {
                (o.leaf, o.subleaf, o.register) == (word.leaf, word.subleaf, word.register)
            };
            let bits = word.bits & !offered.iter().find(same).map_or(0, |o| o.bits);
            (bits != 0).then(|| {
                let (leaf, subleaf, register) = (word.leaf, word.subleaf, word.register);
                format!("CPUID {leaf:#x}.{subleaf:#x} {register} lacks bits {bits:#x}")
            })
        });
        misfits.extend(lacking);
        let unknown: Vec<String> = indices
            .iter()
            .filter(|index| !host.msr_indices().contains(index))
            .map(|index| format!("{index:#x}"))
            .collect();
        if !unknown.is_empty() {
            misfits.push(format!("this host has no MSR {}", unknown.join(", ")));
        }
        Ok(misfits)
    }

    /// The MSRs that were saved, and that a copy saves again.
    pub(crate) fn msr_indices(&self) -> Vec<u32> {
        self.msrs.iter().map(|m| m.index).collect()
    }
}

fn bad(what: &'static str) -> Error {
    Error::new(ErrorKind::BadState, what)
}

/// An empty area of at least `host.xsave_size()` bytes.
fn xsave_area(host: &Host) -> Result<Xsave> {
    let extra = (host.xsave_size() - super::XSAVE_MIN).div_ceil(4);
    Xsave::new(extra).map_err(|_| bad("the XSAVE area is too large"))
}

fn save_xsave(host: &Host, vcpu: &VcpuFd) -> Result<Vec<u8>> {
    const WHAT: &str = "cannot read a vCPU's vector registers";
    let mut area = xsave_area(host)?;
    if host.xsave_size() > super::XSAVE_MIN {
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this host.
        unsafe { vcpu.get_xsave2(&mut area) }.context(WHAT)?;
    } else {
        let classic = vcpu.get_xsave().context(WHAT)?;
        // SAFETY: the length of the flexible part is not touched.
        unsafe { area.as_mut_fam_struct() }.xsave.region = classic.region;
    }
    let words = area.as_fam_struct_ref().xsave.region.iter();
    Ok(words
        .chain(area.as_slice())
        .flat_map(|word| word.to_ne_bytes())
        .collect())
}

fn restore_xsave(host: &Host, vcpu: &VcpuFd, bytes: &[u8]) -> Result<()> {
    if bytes.len() > host.xsave_size() {
        return Err(bad("a vCPU's XSAVE area is larger than this host's"));
    }
    let mut area = xsave_area(host)?;
    let (words, _) = bytes.as_chunks::<4>();
    let (classic, extra) = words.split_at(words.len().min(super::XSAVE_MIN / 4));
    let fill = |to: &mut [u32], from: &[[u8; 4]]| {
        for (to, from) in to.iter_mut().zip(from) {
            *to = u32::from_ne_bytes(*from);
        }
    };
    // SAFETY: the length of the flexible part is not touched.
    fill(
        unsafe { &mut area.as_mut_fam_struct().xsave.region },
        classic,
    );
    fill(area.as_mut_slice(), extra);
    // SAFETY: the area has at least the size that KVM_CAP_XSAVE2 gave for this host.
    unsafe { vcpu.set_xsave2(&area) }.context("KVM refuses a saved vCPU's vector registers")
}
