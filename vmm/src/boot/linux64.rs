//! The 64-bit Linux boot protocol (Linux `Documentation/arch/x86/boot.rst`).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use offshoot_devices::GuestRam;
use vm_memory::Address;

use super::image::KernelFormat;
use super::{BootError, BootFacts, EntryPoint, LoadedKernel, Protocol, layout, memory_map};

/// `boot_flag` and `header` magics of boot.rst.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = 0x5372_6448;
/// `type_of_loader`: not a registered boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
/// The protocol version whose fields are filled for a kernel that brings no header: 2.12.
const VERSION: u16 = 0x020c;
const ALIGNMENT: u32 = 0x100_0000;
/// `xloadflags` bit 0: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry of a bzImage lies this far behind its start.
const ENTRY_64_OFFSET: u64 = 0x200;

pub(super) fn write(
    memory: &GuestRam,
    kernel: &LoadedKernel,
    facts: &BootFacts,
) -> Result<EntryPoint, BootError> {
    let (hdr, rip) = match (kernel.format, kernel.loaded.setup_header) {
        (KernelFormat::BzImage, Some(header)) => {
            if header.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(BootError::ProtocolMissing(Protocol::Linux64));
            }
            (
                header,
                kernel.loaded.kernel_load.unchecked_add(ENTRY_64_OFFSET),
            )
        }
        _ => {
            let header = setup_header {
                boot_flag: BOOT_FLAG,
                header: HEADER,
                version: VERSION,
                kernel_alignment: ALIGNMENT,
                ..Default::default()
            };
            (header, kernel.loaded.kernel_load)
        }
    };
    let mut params = boot_params {
        hdr,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // Command line and initrd lie below 4 GiB: the halves for more stay zero.
    params.hdr.cmd_line_ptr = low_half(facts.command_line.start.raw_value());
    params.hdr.cmdline_size = facts.command_line.len;
    if let Some(initrd) = facts.initrd {
        params.hdr.ramdisk_image = low_half(initrd.start.raw_value());
        params.hdr.ramdisk_size = low_half(initrd.len);
    }
    params.acpi_rsdp_addr = facts.rsdp.map_or(0, |rsdp| rsdp.raw_value());

    let map = memory_map::entries(memory);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            r#type: entry.kind,
        };
    }
    #[expect(clippy::cast_possible_truncation, reason = "a handful of entries")]
    {
        params.e820_entries = map.len().min(params.e820_table.len()) as u8;
    }
    let parameters = BootParams::new(&params, layout::BOOT_PARAMS);
    LinuxBootConfigurator::write_bootparams(&parameters, memory).map_err(BootError::Parameters)?;
    Ok(EntryPoint::Linux64 {
        rip,
        boot_params: layout::BOOT_PARAMS,
    })
}

#[expect(clippy::cast_possible_truncation, reason = "low RAM ends at 3 GiB")]
fn low_half(value: u64) -> u32 {
    value as u32
}

const _: () = assert!(size_of::<boot_params>() == 4096);
