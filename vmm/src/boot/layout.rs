//! Where the boot structures lie in the first megabyte of guest RAM.
//!
//! ```text
//! 0x0000_0500  GDT of the 64-bit entry           (arch::x86_64::regs)
//! 0x0000_6000  hvm_start_info, module list
//! 0x0000_7000  boot_params, or the PVH memory map
//! 0x0000_9000  page tables of the 64-bit entry   (arch::x86_64::regs)
//! 0x0002_0000  command line, 2 KiB at most
//! 0x0009_fc00  end of low RAM as the guest knows it
//! 0x000e_0000  ACPI tables, RSDP first; the range is reserved in the memory map
//! 0x000f_f000  the page that holds the VM generation id; in its last bytes the reset vector
//! 0x0010_0000  kernel
//! ```

use offshoot_devices::GuestRam;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The GDT that the 64-bit entry starts with.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// The list of modules of the PVH protocol: one entry, the initrd.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// The memory map of the PVH protocol.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// `boot_params` ("zero page") of the Linux protocol.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// Page tables that the 64-bit entry starts with; up to [`PAGE_TABLES_END`].
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The first byte past the page tables.
pub const PAGE_TABLES_END: GuestAddress = GuestAddress(0x1_0000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line, its final zero byte included: what Linux keeps on x86
/// (`COMMAND_LINE_SIZE`); it would cut off the rest without a word.
pub const COMMAND_LINE_MAX: usize = 2048;
/// Where low RAM ends for the guest: what a PC keeps for its extended BIOS data area begins here.
pub const LOW_RAM_END: GuestAddress = GuestAddress(0x9_fc00);
/// ACPI tables; firmware-less guests without a pointer scan from here for the RSDP.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// The page that holds the VM generation id, at its start.
pub const VMGENID_PAGE: GuestAddress = GuestAddress(0xf_f000);
/// Where the processor of a PC starts in its firmware (F000:FFF0), and where a guest jumps to reset
/// it "by the BIOS".
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Kernels load from here up.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// The end of the RAM that begins at guest physical address 0.
pub(crate) fn low_ram_end(memory: &GuestRam) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.last_addr().raw_value() + 1)
}
