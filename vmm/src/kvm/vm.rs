//! The making of a VM: every call in the one order that is fast.
//!
//! | step | why here |
//! |---|---|
//! | `KVM_CREATE_VM` | |
//! | memory slots | each waits for an SRCU grace period; until the irqchip's I/O devices exist that is 0.1 ms, afterwards 8 ms |
//! | TSS and identity-map addresses | on Intel the first is a memory slot too; both must be set before the first vCPU |
//! | irqchip, PIT | before the vCPUs, which get their LAPIC from it |
//! | vCPUs | |
//! | irqfds, ioeventfds | need the irqchip; ioeventfds leave freed buses behind for SRCU, so nothing that waits for a grace period follows |
//!
//! # Rules of the unsafe code here
//! A memory slot names host memory by address. The [`Memory`] of a VM is kept in its [`Vm`] until
//! the VM's descriptor has been closed.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_pit_config, kvm_run, kvm_signal_mask,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::Host;
use crate::arch;
use crate::error::{Context, Result};
use crate::memory::Memory;
use crate::threads;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// `struct kvm_signal_mask` with a set as large as the kernel's.
#[repr(C)]
struct SignalMask {
    len: u32,
    signals: [u8; 8],
}

/// A VM without vCPUs or devices, and the memory it runs on.
#[derive(Debug)]
pub(crate) struct Vm {
    // The order of the fields is the order of their end: first the VM, then its memory.
    fd: VmFd,
    memory: Arc<Memory>,
    /// Bytes of a vCPU's shared mapping.
    run_size: usize,
}

/// An interrupt line: an eventfd that raises a GSI.
#[derive(Debug)]
pub(crate) struct IrqLine<'a> {
    /// Writing to it raises the line once (an edge).
    pub(crate) event: &'a EventFd,
    /// The line's number.
    pub(crate) gsi: u32,
}

/// Keeps a vCPU's shared page out of forked processes, which could do nothing with it but keep the
/// whole VM in the kernel's memory.
fn keep_from_children(vcpu: &mut VcpuFd, len: usize) -> io::Result<()> {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: the mapping that the vCPU owns, of the length that KVM gave for it; advice changes
    // nothing in this process.
    let done = unsafe { libc::madvise(run.cast(), len, libc::MADV_DONTFORK) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Vm {
    /// Makes a VM over `memory`, up to and with its interrupt controllers.
    pub(crate) fn new(host: &Host, memory: Arc<Memory>) -> Result<Self> {
        let fd = host.kvm().create_vm().context("KVM cannot make a VM")?;
        for (slot, (part, host_address)) in (0..).zip(memory.host_parts()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: part.guest.0,
                memory_size: part.len,
                userspace_addr: host_address as u64,
            };
            // SAFETY: the range is mapped for as long as `memory` lives, which the `Vm` keeps
            // until after its descriptor is closed.
            unsafe { fd.set_user_memory_region(region) }
                .context("KVM cannot take the guest's memory")?;
        }
        let tss = usize::try_from(arch::TSS_ADDRESS).unwrap_or(0);
        fd.set_tss_address(tss)
            .context("KVM cannot set the TSS address")?;
        fd.set_identity_map_address(arch::IDENTITY_MAP_ADDRESS)
            .context("KVM cannot set the identity map's address")?;
        fd.create_irq_chip()
            .context("KVM cannot make its interrupt controllers")?;
        fd.create_pit2(kvm_pit_config {
            // The speaker port is answered too: some guests time loops by it.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .context("KVM cannot make its timer")?;
        let run_size = host
            .kvm()
            .get_vcpu_mmap_size()
            .context("KVM does not tell the size of a vCPU's mapping")?;
        Ok(Self {
            fd,
            memory,
            run_size,
        })
    }

    /// Makes the vCPU of this number, which lets only the kick signal end its runs.
    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd> {
        const WHAT: &str = "KVM cannot make a vCPU";
        let mut vcpu = self.fd.create_vcpu(u64::from(id)).context(WHAT)?;
        keep_from_children(&mut vcpu, self.run_size).context(WHAT)?;
        let mask = SignalMask {
            len: 8,
            signals: threads::run_mask().to_ne_bytes(),
        };
        // SAFETY: the kernel reads `len` bytes behind the length, which `mask` has, and keeps no
        // pointer.
        let done = unsafe { ioctl_with_ref(&vcpu, KVM_SET_SIGNAL_MASK(), &mask) };
        if done == 0 {
            Ok(vcpu)
        } else {
            Err(io::Error::last_os_error()).context(WHAT)
        }
    }

    /// Lets an eventfd raise an interrupt line.
    pub(crate) fn connect_irq(&self, line: &IrqLine<'_>) -> Result<()> {
        self.fd
            .register_irqfd(line.event, line.gsi)
            .context("KVM cannot connect an interrupt to an eventfd")
    }

    /// Lets a 4-byte write of `value` to `address` write to an eventfd, without an exit.
    pub(crate) fn connect_notify(&self, event: &EventFd, address: u64, value: u32) -> Result<()> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .context("KVM cannot connect a queue notification to an eventfd")
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}
