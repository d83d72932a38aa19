//! The DSDT: the devices that the guest's operating system finds by name.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE,
    Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use vm_memory::Address;

use super::{
    PANIC_PORT, POWER_BUTTON_GSI, SERIAL_GSI, SLEEP_TYPE_S5, VIRTIO_WINDOW_LEN, VMGENID_GSI,
    definition_block,
};
use crate::boot::{MmioWindow, PlatformInfo, layout};

/// COM1.
const SERIAL_PORT: u16 = 0x3f8;
const SERIAL_PORT_LEN: u8 = 8;
/// The i8042's data and command ports.
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
/// The i8042's interrupt; nothing raises it.
const I8042_GSI: u32 = 1;
/// `Notify` value "device specific" for the generation id, "S0 power button pressed" for the
/// button (ACPI 6.5, 5.6.6).
const NOTIFY_BUTTON: u8 = 0x80;

pub(super) fn build(platform: &PlatformInfo) -> Sdt {
    let mut devices = Vec::new();
    for id in 0..platform.vcpus {
        devices.extend(processor(id));
    }
    for (index, window) in platform.virtio.iter().enumerate() {
        devices.extend(virtio(index, *window));
    }
    if platform.serial {
        devices.extend(serial());
    }
    devices.extend(i8042());
    devices.extend(panic_port());
    devices.extend(generation_id());
    devices.extend(power_button());
    devices.extend(event_device());

    let mut aml = Scope::raw("_SB_".into(), devices);
    let s5 = SLEEP_TYPE_S5;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &ZERO])).to_aml_bytes(&mut aml);
    definition_block(&aml)
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// An edge-triggered, active-high interrupt of this device alone.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn processor(id: u8) -> Vec<u8> {
    let path: Path = format!("C{id:03X}").as_str().into();
    bytes(&Device::new(
        path,
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &id),
        ],
    ))
}

fn virtio(index: usize, window: MmioWindow) -> Vec<u8> {
    let path: Path = format!("V{index:03X}").as_str().into();
    bytes(&Device::new(
        path,
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window.base, VIRTIO_WINDOW_LEN),
                    &interrupt(window.gsi),
                ]),
            ),
        ],
    ))
}

fn serial() -> Vec<u8> {
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &interrupt(SERIAL_GSI),
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORT_LEN),
                ]),
            ),
        ],
    ))
}

fn i8042() -> Vec<u8> {
    bytes(&Device::new(
        "PS2_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(I8042_DATA, I8042_DATA, 1, 1),
                    &IO::new(I8042_COMMAND, I8042_COMMAND, 1, 1),
                    &interrupt(I8042_GSI),
                ]),
            ),
        ],
    ))
}

/// The guest's driver (Linux `pvpanic-mmio`) knows the port by the name that QEMU gave it.
fn panic_port() -> Vec<u8> {
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(PANIC_PORT, PANIC_PORT, 1, 1)]),
            ),
        ],
    ))
}

/// "Virtual Machine Generation ID" (Microsoft, 2012): `ADDR` gives the low and high half of the
/// id's address; a change is told by `Notify(device, 0x80)`.
fn generation_id() -> Vec<u8> {
    let address = layout::VMGENID_PAGE.raw_value();
    #[expect(clippy::cast_possible_truncation, reason = "split into its halves")]
    let (low, high) = (address as u32, (address >> 32) as u32);
    bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"OFFS0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    ))
}

/// The Generic Event Device (ACPI 6.5, 5.6.9): `_EVT` gets the interrupt's number.
fn event_device() -> Vec<u8> {
    let (generation, button) = (VMGENID_GSI, POWER_BUTTON_GSI);
    let (changed, pressed) = (NOTIFY_BUTTON, NOTIFY_BUTTON);
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&interrupt(generation), &interrupt(button)]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &generation),
                        vec![&Notify::new(&Path::new("VGEN"), &changed)],
                    ),
                    &If::new(
                        &Equal::new(&Arg(0), &button),
                        vec![&Notify::new(&Path::new("PWRB"), &pressed)],
                    ),
                ],
            ),
        ],
    ))
}
