//! The PVH boot ABI (Xen, `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use offshoot_devices::GuestRam;
use vm_memory::{Address, GuestAddress};

use super::{BootError, BootFacts, EntryPoint, layout, memory_map};

/// "xEn3" with the top bit of the "E" set.
const MAGIC: u32 = 0x336e_c578;
/// The version that brings the memory map.
const VERSION: u32 = 1;

pub(super) fn write(
    memory: &GuestRam,
    rip: GuestAddress,
    facts: &BootFacts,
) -> Result<EntryPoint, BootError> {
    let map: Vec<_> = memory_map::entries(memory)
        .into_iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = facts
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start.raw_value(),
            size: initrd.len,
            ..Default::default()
        })
        .collect();
    #[expect(clippy::cast_possible_truncation, reason = "a handful of entries each")]
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: facts.command_line.start.raw_value(),
        memmap_paddr: layout::PVH_MEMORY_MAP.raw_value(),
        memmap_entries: map.len() as u32,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            layout::PVH_MODULES.raw_value()
        },
        rsdp_paddr: facts.rsdp.map_or(0, |rsdp| rsdp.raw_value()),
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, layout::PVH_START_INFO);
    parameters.set_sections(&map, layout::PVH_MEMORY_MAP);
    if !modules.is_empty() {
        parameters.set_modules(&modules, layout::PVH_MODULES);
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(BootError::Parameters)?;
    Ok(EntryPoint::Pvh {
        rip,
        start_info: layout::PVH_START_INFO,
    })
}
