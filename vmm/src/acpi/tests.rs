use std::process::Command;

use offshoot_devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::MmioWindow;

fn platform(vcpus: u8, devices: u32) -> PlatformInfo {
    let virtio = (0..devices)
        .map(|index| MmioWindow {
            base: 0xd000_0000 + index * VIRTIO_WINDOW_LEN,
            gsi: VIRTIO_GSI_FIRST + index,
        })
        .collect();
    PlatformInfo {
        vcpus,
        virtio,
        serial: true,
    }
}

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn read(memory: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(memory: &GuestRam, at: u64) -> u32 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

fn u64_at(memory: &GuestRam, at: u64) -> u64 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

fn table(memory: &GuestRam, at: u64) -> Vec<u8> {
    let table = read(memory, at, u32_at(memory, at + 4) as usize);
    let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    assert_eq!(sum, 0, "checksum of {}", table[..4].escape_ascii());
    table
}

fn tables(memory: &GuestRam, platform: &PlatformInfo) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let rsdp = write_tables(memory, platform).unwrap().0;
    assert_eq!(read(memory, rsdp, 8), b"RSD PTR ");
    let xsdt = u64_at(memory, rsdp + 24);
    assert_eq!(table(memory, xsdt).len(), 36 + 2 * 8);
    let fadt_at = u64_at(memory, xsdt + 36);
    let fadt = table(memory, fadt_at);
    let madt = table(memory, u64_at(memory, xsdt + 44));
    let dsdt = table(memory, u64_at(memory, fadt_at + 140));
    (fadt, madt, dsdt)
}

#[test]
fn tables_are_linked_and_their_checksums_hold() {
    let memory = ram();
    let (fadt, madt, dsdt) = tables(&memory, &platform(3, 2));
    assert_eq!(
        (&fadt[..4], &madt[..4], &dsdt[..4]),
        (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..])
    );
    // ACPI 6.5, 5.2.12: three local APICs of 8 bytes and an I/O APIC of 12.
    assert_eq!(madt.len(), 44 + 3 * 8 + 12);
    assert!(
        read(&memory, layout::VMGENID_PAGE.0, 4096)
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn the_largest_machine_has_room_for_its_tables() {
    let devices = VIRTIO_GSI_LAST - VIRTIO_GSI_FIRST + 1;
    tables(&ram(), &platform(254, devices));
}

#[test]
fn power_off_is_s5_with_the_enable_bit() {
    assert!(is_power_off(0x34));
    assert!(!is_power_off(0x14), "no SLP_EN");
    assert!(!is_power_off(0x24), "another state");
}

/// ACPICA's compiler is the oracle: it must read the tables back without a warning.
#[test]
fn iasl_reads_the_tables_back() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (Debian package acpica-tools) is not installed");
        return;
    }
    let (fadt, madt, dsdt) = tables(&ram(), &platform(2, 3));
    let dir = tempfile::tempdir().unwrap();
    for (name, table) in [("fadt", fadt), ("madt", madt), ("dsdt", dsdt)] {
        let path = dir.path().join(name).with_extension("dat");
        std::fs::write(&path, table).unwrap();
        let output = Command::new("iasl").arg("-d").arg(&path).output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
    }
    let source = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap();
    for expected in [
        "Name (_HID, \"LNRO0005\")",
        "0xD0002000,",
        "Name (_HID, \"QEMU0001\")",
        "Name (_CID, \"VM_Gen_Counter\")",
        "Notify (VGEN, 0x80)",
        "Notify (PWRB, 0x80)",
        "Name (_S5, Package",
    ] {
        assert!(source.contains(expected), "no {expected} in\n{source}");
    }
    let compiled = Command::new("iasl")
        .arg(dir.path().join("dsdt.dsl"))
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&compiled.stdout).into_owned();
    assert!(report.contains("0 Errors, 0 Warnings"), "{report}");
}
