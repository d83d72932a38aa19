//! x86-64: the state of a vCPU and of the VM's own chips, and how they start.

pub mod cpuid;
pub mod msr;
pub mod regs;
pub mod vcpu_state;
pub mod vm_state;

pub use vcpu_state::VcpuState;
pub use vm_state::VmState;

/// Three pages for the real-mode TSS that KVM needs on Intel without unrestricted guests; in the
/// device space, where no RAM and no device lies.
pub(crate) const TSS_ADDRESS: u64 = 0xfffb_d000;
/// The page beside it, for the identity map.
pub(crate) const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// The size of the classic XSAVE area, and the smallest there is.
pub(crate) const XSAVE_MIN: usize = 4096;
