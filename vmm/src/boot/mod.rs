//! Puts a kernel and what it must know into guest RAM, and says how to enter it.
//!
//! Two protocols: **PVH** (Xen's direct boot ABI: 32-bit protected mode, `ebx` points at
//! `hvm_start_info`) for ELF kernels that carry the note, and the **64-bit Linux boot protocol**
//! (long mode, `rsi` points at `boot_params`; Linux `Documentation/arch/x86/boot.rst`) for other
//! ELF kernels and for bzImages. Kernel files are untrusted: whatever they say is bounded by
//! guest RAM, and what does not fit is an error.

mod command_line;
mod image;
pub mod layout;
mod linux64;
mod memory_map;
mod pvh;
#[cfg(test)]
mod tests;

use std::io;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{KernelLoader, KernelLoaderResult, bzimage::BzImage, elf::Elf};
use offshoot_devices::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use serde::{Deserialize, Serialize};

use crate::acpi;
pub use image::Image;
use image::KernelFormat;

/// How the guest's kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Protocol {
    /// PVH when the kernel offers it, the Linux protocol otherwise.
    #[default]
    Auto,
    /// PVH, or an error.
    Pvh,
    /// The 64-bit Linux boot protocol, or an error.
    Linux64,
}

/// How the guest learns of its virtio-mmio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Discovery {
    /// By ACPI tables: what distribution kernels need.
    #[default]
    Acpi,
    /// By `virtio_mmio.device=` on the command line, with no ACPI tables at all.
    CommandLine,
    /// Both ways.
    AcpiAndCommandLine,
}

impl Discovery {
    fn uses_acpi(self) -> bool {
        !matches!(self, Self::CommandLine)
    }

    fn uses_command_line(self) -> bool {
        !matches!(self, Self::Acpi)
    }
}

/// What a machine boots.
#[derive(Debug)]
pub struct BootSource {
    /// An ELF kernel or a bzImage.
    pub kernel: Image,
    /// An initial RAM disk.
    pub initrd: Option<Image>,
    /// The kernel's command line, as the guest sees it but for the devices that
    /// [`Discovery::CommandLine`] adds.
    pub command_line: String,
    /// How to enter the kernel.
    pub protocol: Protocol,
    /// How the guest finds its devices.
    pub discovery: Discovery,
}

impl BootSource {
    /// Boots `kernel` with an empty command line, by the protocol it offers, with ACPI.
    #[must_use]
    pub fn new(kernel: Image) -> Self {
        Self {
            kernel,
            initrd: None,
            command_line: String::new(),
            protocol: Protocol::Auto,
            discovery: Discovery::Acpi,
        }
    }
}

/// One virtio-mmio register window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioWindow {
    /// Guest physical address of its first byte.
    pub base: u32,
    /// The global system interrupt that the device raises, edge-triggered.
    pub gsi: u32,
}

/// What the guest is told of the machine it runs on.
#[derive(Debug, Clone)]
pub struct PlatformInfo {
    /// How many vCPUs there are; their APIC ids are 0, 1, ….
    pub vcpus: u8,
    /// The virtio devices, in order.
    pub virtio: Vec<MmioWindow>,
    /// Whether COM1 is there.
    pub serial: bool,
}

/// How to enter the loaded kernel on the first vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit protected mode, paging off, flat segments, `rbx` = `start_info`.
    Pvh {
        /// The first instruction.
        rip: GuestAddress,
        /// Where `hvm_start_info` lies.
        start_info: GuestAddress,
    },
    /// Long mode, the first 4 GiB identity-mapped, flat segments, `rsi` = `boot_params`.
    Linux64 {
        /// The first instruction.
        rip: GuestAddress,
        /// Where `boot_params` lies.
        boot_params: GuestAddress,
    },
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file cannot be read.
    #[error("the {what} cannot be read")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel is neither.
    #[error("the kernel is neither a 64-bit x86 ELF image nor a bzImage")]
    NotAKernel,
    /// The kernel says that it is longer than its file.
    #[error("the kernel image is cut short")]
    Truncated,
    /// The loader met something in the image that it cannot load.
    #[error("the kernel image does not load into the guest's RAM")]
    Load(#[source] linux_loader::loader::Error),
    /// The kernel does not offer the protocol that was asked for.
    #[error("the kernel does not offer the boot protocol {0:?}")]
    ProtocolMissing(Protocol),
    /// RAM is too small.
    #[error("the guest's RAM is too small: {what} needs to end below {end:#x}")]
    DoesNotFit {
        /// What does not fit.
        what: &'static str,
        /// The first guest physical address past what was available.
        end: u64,
    },
    /// The command line is too long or holds characters that it must not.
    #[error("the kernel command line cannot be used")]
    CommandLine(#[from] linux_loader::cmdline::Error),
    /// Too many vCPUs or devices for the tables.
    #[error("the ACPI tables take {size} bytes, which is more than the {max} set aside for them")]
    TablesTooLarge {
        /// Bytes needed.
        size: usize,
        /// Bytes there are.
        max: u64,
    },
    /// Writing into guest RAM failed: an address that the platform needs is not RAM.
    #[error("guest RAM does not hold the boot structures")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The loader's writer of boot parameters failed.
    #[error("the boot parameters cannot be written")]
    Parameters(#[source] linux_loader::configurator::Error),
}

/// Loads `source` into `memory` and describes the machine `platform` to it.
///
/// RAM must begin at guest physical address 0 and hold at least the first 2 MiB.
///
/// # Errors
/// Every reason why the kernel cannot start; `memory` is then unspecified.
pub fn load(
    memory: &GuestRam,
    source: &BootSource,
    platform: &PlatformInfo,
) -> Result<EntryPoint, BootError> {
    let kernel = load_kernel(memory, &source.kernel)?;
    if memory
        .find_region(GuestAddress(kernel.end().saturating_sub(1)))
        .is_none()
    {
        return Err(BootError::DoesNotFit {
            what: "the kernel",
            end: layout::low_ram_end(memory),
        });
    }
    let initrd = source
        .initrd
        .as_ref()
        .map(|image| image::load_initrd(memory, image, &kernel))
        .transpose()?;

    let rsdp = if source.discovery.uses_acpi() {
        Some(acpi::write_tables(memory, platform)?)
    } else {
        None
    };
    let windows = if source.discovery.uses_command_line() {
        &platform.virtio[..]
    } else {
        &[]
    };
    let command_line = command_line::write(memory, &source.command_line, windows)?;
    let facts = BootFacts {
        command_line,
        initrd,
        rsdp,
    };

    match (kernel.pvh_entry(), source.protocol) {
        (Some(rip), Protocol::Auto | Protocol::Pvh) => pvh::write(memory, rip, &facts),
        (None, Protocol::Pvh) => Err(BootError::ProtocolMissing(Protocol::Pvh)),
        (_, Protocol::Auto | Protocol::Linux64) => linux64::write(memory, &kernel, &facts),
    }
}

/// Where things lie that every protocol tells the guest.
struct BootFacts {
    command_line: command_line::Placed,
    initrd: Option<image::Placed>,
    rsdp: Option<GuestAddress>,
}

struct LoadedKernel {
    format: KernelFormat,
    loaded: KernelLoaderResult,
}

impl LoadedKernel {
    /// The first address that the kernel leaves free. A bzImage unpacks itself upwards from where
    /// it prefers to lie (boot.rst, `init_size`).
    fn end(&self) -> u64 {
        self.loaded
            .setup_header
            .map_or(self.loaded.kernel_end, |header| {
                let unpacked = header
                    .pref_address
                    .saturating_add(u64::from(header.init_size));
                self.loaded.kernel_end.max(unpacked)
            })
    }

    fn pvh_entry(&self) -> Option<GuestAddress> {
        match self.loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(rip) => Some(rip),
            _ => None,
        }
    }
}

fn load_kernel(memory: &GuestRam, image: &Image) -> Result<LoadedKernel, BootError> {
    let himem = Some(layout::HIGH_MEMORY);
    let format = image.kernel_format()?;
    match format {
        KernelFormat::Elf => image.check_elf_segments()?,
        KernelFormat::BzImage => image.check_bzimage_len()?,
    }
    let loaded = match (format, image) {
        (KernelFormat::Elf, Image::File(file)) => {
            Elf::load(memory, None, &mut image::reader(file)?, himem)
        }
        (KernelFormat::Elf, Image::Bytes(bytes)) => {
            Elf::load(memory, None, &mut io::Cursor::new(bytes), himem)
        }
        (KernelFormat::BzImage, Image::File(file)) => {
            BzImage::load(memory, None, &mut image::reader(file)?, himem)
        }
        (KernelFormat::BzImage, Image::Bytes(bytes)) => {
            BzImage::load(memory, None, &mut io::Cursor::new(bytes), himem)
        }
    }
    .map_err(BootError::Load)?;
    Ok(LoadedKernel { format, loaded })
}
