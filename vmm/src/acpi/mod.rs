//! The ACPI tables that describe the machine: RSDP → XSDT → FADT (→ DSDT), MADT.
//!
//! The machine is hardware-reduced ACPI (ACPI 6.5, 4.1): no fixed hardware but a sleep control
//! register; events come through a Generic Event Device. Table layouts are acpi_tables'.

mod dsdt;
#[cfg(test)]
mod tests;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, fadt::FADT};
use offshoot_devices::GuestRam;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::boot::{BootError, PlatformInfo, layout};

/// The length of a virtio-mmio register window.
pub const VIRTIO_WINDOW_LEN: u32 = 0x1000;
/// The first global system interrupt for virtio devices.
pub const VIRTIO_GSI_FIRST: u32 = 5;
/// The last global system interrupt for virtio devices.
pub const VIRTIO_GSI_LAST: u32 = 21;
/// Raised when the VM generation id has changed.
pub const VMGENID_GSI: u32 = 22;
/// Raised when the host presses the power button.
pub const POWER_BUTTON_GSI: u32 = 23;
/// The serial port's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// Local APICs, as KVM places them.
pub const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// The I/O APIC, as KVM places it.
pub const IO_APIC_ADDRESS: u32 = 0xfec0_0000;

/// The sleep control register (ACPI 6.5, 4.8.3.7): a byte in I/O space.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The sleep status register: a byte in I/O space that reads as zero.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The panic port (QEMU `docs/specs/pvpanic.txt`): a byte in I/O space by which the guest's kernel
/// tells that it has panicked. Without it a panic that ends in a reset looks like a reset.
pub const PANIC_PORT: u16 = 0x505;
/// The bit for a panic: read, the port can be told of it; written, it has happened.
pub const PANICKED: u8 = 1;
/// The port and the value that reset the machine (the i8042's pulse of the reset line).
const RESET_PORT: u16 = 0x64;
const RESET_VALUE: u8 = 0xfe;
/// `SLP_TYPx` of S5, soft off.
const SLEEP_TYPE_S5: u8 = 5;
/// `SLP_EN` and the place of `SLP_TYPx` in the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// FADT boot architecture flags (ACPI 6.5, 5.2.9.3): an 8042 is there; no VGA, no MSI, no ASPM
/// and no CMOS clock.
const BOOT_8042: u16 = 1 << 1;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_MSI: u16 = 1 << 3;
const BOOT_NO_ASPM: u16 = 1 << 4;
const BOOT_NO_CMOS_RTC: u16 = 1 << 5;

const OEM_ID: [u8; 6] = *b"OFFSHT";
const OEM_TABLE_ID: [u8; 8] = *b"OFFSHOOT";
const OEM_REVISION: u32 = 1;

/// Whether a write of `value` to the sleep control register turns the machine off.
#[must_use]
pub fn is_power_off(value: u8) -> bool {
    value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5
}

/// Writes all tables into the range set aside for them and returns the RSDP's address.
pub(crate) fn write_tables(
    memory: &GuestRam,
    platform: &PlatformInfo,
) -> Result<GuestAddress, BootError> {
    let mut tables = Tables::new();
    let dsdt = tables.place(&dsdt::build(platform))?;
    let fadt = tables.place(&fadt(dsdt))?;
    let madt = tables.place(&madt(platform.vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt] {
        xsdt.add_entry(table.raw_value());
    }
    let xsdt = tables.place(&xsdt)?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt.raw_value()).to_aml_bytes(&mut rsdp);
    tables.bytes.splice(..rsdp.len(), rsdp);
    memory.write_slice(&tables.bytes, layout::ACPI_TABLES)?;
    Ok(layout::ACPI_TABLES)
}

/// The tables' bytes as they will lie from [`layout::ACPI_TABLES`] on: the RSDP's place first.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    const MAX: u64 = layout::VMGENID_PAGE.0 - layout::ACPI_TABLES.0;

    fn new() -> Self {
        Self {
            bytes: vec![0; Rsdp::len()],
        }
    }

    fn place(&mut self, table: &dyn Aml) -> Result<GuestAddress, BootError> {
        // Linux maps tables wherever they lie; 16 is what the RSDP search steps by.
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let start = self.bytes.len();
        table.to_aml_bytes(&mut self.bytes);
        if self.bytes.len() as u64 > Self::MAX {
            return Err(BootError::TablesTooLarge {
                size: self.bytes.len(),
                max: Self::MAX,
            });
        }
        Ok(layout::ACPI_TABLES.unchecked_add(start as u64))
    }
}

fn fadt(dsdt: GuestAddress) -> FADT {
    let io_byte = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.raw_value())
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // The power button is a device of the DSDT, not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = io_byte(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = io_byte(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_byte(SLEEP_STATUS_PORT);
    fadt.iapc_boot_arch =
        (BOOT_8042 | BOOT_NO_VGA | BOOT_NO_MSI | BOOT_NO_ASPM | BOOT_NO_CMOS_RTC).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(LOCAL_APIC_ADDRESS);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, IO_APIC_ADDRESS, 0));
    madt
}

/// A definition block of `aml` with its header.
fn definition_block(aml: &[u8]) -> Sdt {
    /// Revision 2: integers are 64 bits wide.
    const REVISION: u8 = 2;
    #[expect(clippy::cast_possible_truncation, reason = "an SDT header is 36 bytes")]
    let mut sdt = Sdt::new(
        *b"DSDT",
        size_of::<[u8; 36]>() as u32,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    sdt.append_slice(aml);
    sdt
}
