//! How a vCPU starts.
//!
//! | entry | state |
//! |---|---|
//! | PVH (Xen, "x86/HVM direct boot ABI") | 32-bit protected mode, paging off, flat segments, interrupts off, `ebx` = `hvm_start_info` |
//! | Linux (`Documentation/arch/x86/boot.rst`, 64-bit boot protocol) | long mode, the first 4 GiB identity-mapped, `__BOOT_CS` 0x10, `__BOOT_DS` 0x18, `rsi` = `boot_params` |
//! | other vCPUs | as after a reset, waiting for INIT and SIPI |

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;
use offshoot_devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{EntryPoint, layout};
use crate::error::{Context, Error, ErrorKind, Result};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one bit of RFLAGS that is always set.
const RFLAGS: u64 = 2;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Segment types (Intel SDM volume 3, 3.4.5.1 and 3.5).
const TYPE_CODE_READ_ACCESSED: u8 = 0xb;
const TYPE_DATA_WRITE_ACCESSED: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Page table entry bits: present, writable, 2 MiB page.
const PTE_TABLE: u64 = 0b11;
const PTE_2M: u64 = 0b1000_0011;
const PAGE: u64 = 4096;
const GIB_MAPPED: u64 = 4;

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor of a flat segment, as it lies in a GDT.
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_) | u64::from(segment.s) << 4 | 1 << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    let limit = u64::from(segment.limit) >> 12;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

fn tss() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS_BUSY,
        present: 1,
        ..Default::default()
    }
}

/// Sets the first vCPU for the kernel that was loaded.
pub(crate) fn enter(vcpu: &VcpuFd, ram: &GuestRam, entry: EntryPoint) -> Result<()> {
    match entry {
        EntryPoint::Pvh { rip, start_info } => enter_pvh(vcpu, rip, start_info),
        EntryPoint::Linux64 { rip, boot_params } => enter_linux64(vcpu, ram, rip, boot_params),
    }
}

/// Enters at `rip` by PVH.
pub(crate) fn enter_pvh(vcpu: &VcpuFd, rip: GuestAddress, start_info: GuestAddress) -> Result<()> {
    const WHAT: &str = "cannot set the first vCPU's registers";
    let mut sregs = vcpu.get_sregs().context(WHAT)?;
    sregs.cs = segment(CODE_SELECTOR, TYPE_CODE_READ_ACCESSED, false);
    let data = segment(DATA_SELECTOR, TYPE_DATA_WRITE_ACCESSED, false);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = tss();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).context(WHAT)?;
    vcpu.set_regs(&kvm_regs {
        rip: rip.0,
        rbx: start_info.0,
        rflags: RFLAGS,
        ..Default::default()
    })
    .context(WHAT)?;
    runnable(vcpu)
}

/// Enters at `rip` by the 64-bit Linux boot protocol, with a GDT and page tables of its own.
pub(crate) fn enter_linux64(
    vcpu: &VcpuFd,
    ram: &GuestRam,
    rip: GuestAddress,
    boot_params: GuestAddress,
) -> Result<()> {
    const WHAT: &str = "cannot set the first vCPU's registers";
    let code = segment(CODE_SELECTOR, TYPE_CODE_READ_ACCESSED, true);
    let data = segment(DATA_SELECTOR, TYPE_DATA_WRITE_ACCESSED, false);
    let entries = [0, 0, descriptor(&code), descriptor(&data)];
    let put = |at: GuestAddress, value: u64| {
        ram.write_obj(value, at)
            .map_err(|e| Error::because(ErrorKind::Boot, "the first page tables do not fit", e))
    };
    for (slot, entry) in (0..).zip(entries) {
        put(GuestAddress(layout::GDT.0 + 8 * slot), entry)?;
    }
    const { assert!(layout::PAGE_TABLES.0 + PAGE * (2 + GIB_MAPPED) <= layout::PAGE_TABLES_END.0) };
    let pdpt = layout::PAGE_TABLES.0 + PAGE;
    put(layout::PAGE_TABLES, pdpt | PTE_TABLE)?;
    for gib in 0..GIB_MAPPED {
        let directory = pdpt + PAGE * (1 + gib);
        put(GuestAddress(pdpt + 8 * gib), directory | PTE_TABLE)?;
        for entry in 0..512 {
            let address = gib << 30 | entry << 21;
            put(GuestAddress(directory + 8 * entry), address | PTE_2M)?;
        }
    }
    let mut sregs = vcpu.get_sregs().context(WHAT)?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = tss();
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = 8 * 4 - 1;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).context(WHAT)?;
    vcpu.set_regs(&kvm_regs {
        rip: rip.0,
        rsi: boot_params.0,
        rflags: RFLAGS,
        ..Default::default()
    })
    .context(WHAT)?;
    runnable(vcpu)
}

fn runnable(vcpu: &VcpuFd) -> Result<()> {
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })
    .context("cannot make the first vCPU runnable")
}

/// Lets a vCPU wait for INIT and SIPI.
pub(crate) fn wait_for_sipi(vcpu: &VcpuFd) -> Result<()> {
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_UNINITIALIZED,
    })
    .context("cannot let a vCPU wait for its start")
}

/// Sets the LAPIC's local interrupt pins as firmware leaves them: LINT0 takes the PIC's
/// interrupts, LINT1 is NMI.
pub(crate) fn set_local_interrupts(vcpu: &VcpuFd) -> Result<()> {
    const WHAT: &str = "cannot set a vCPU's local interrupts";
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u8 = 0b111;
    const NMI: u8 = 0b100;
    let mut lapic = vcpu.get_lapic().context(WHAT)?;
    for (register, mode) in [(LVT_LINT0, EXT_INT), (LVT_LINT1, NMI)] {
        // Bits 8 to 10 of the register are the delivery mode, bits 12 to 15 its state and mask.
        lapic.regs[register + 1] = (lapic.regs[register + 1] & !0b111).wrapping_add_unsigned(mode);
        lapic.regs[register + 2] = 0;
    }
    vcpu.set_lapic(&lapic).context(WHAT)
}
