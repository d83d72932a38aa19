//! As much of ACPI as a guest without an AML interpreter can use: the MADT, and a bounded search
//! through definition blocks for virtio-mmio devices and the VM generation id.

use core::slice;

use crate::info::peek;
use crate::interrupts::IoApic;

const MAX_TABLE: u32 = 1 << 20;
const MAX_TABLES: usize = 64;
/// How far behind a device's name its resources are looked for.
const REACH: usize = 256;

/// What was found.
pub(crate) struct Acpi {
    /// Windows and global system interrupts of virtio-mmio devices.
    pub(crate) devices: [(u64, u32); 24],
    pub(crate) device_count: usize,
    /// Address of the VM generation id.
    pub(crate) generation: Option<u64>,
    /// Processors that may be started, the boot processor among them; 0 when not told.
    pub(crate) processors: u32,
    pub(crate) io_apics: [IoApic; 4],
    pub(crate) io_apic_count: usize,
}

/// A table at `address` whose signature is `signature`, or any for `None`, header included.
fn table(address: u64, signature: Option<&[u8; 4]>) -> Option<&'static [u8]> {
    if address == 0 || address >= (4 << 30) - u64::from(MAX_TABLE) {
        return None;
    }
    // SAFETY: the low 4 GiB are mapped, and the loader's tables lie in RAM that is not owned.
    unsafe {
        let len: u32 = peek(address + 4);
        let right = signature.is_none_or(|s| peek::<[u8; 4]>(address) == *s);
        (right && (36..=MAX_TABLE).contains(&len))
            .then(|| slice::from_raw_parts(address as *const u8, len as usize))
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + 8)?
        .try_into()
        .ok()
        .map(u64::from_le_bytes)
}

/// The RSDP where the BIOS leaves it, on a machine whose loader does not tell.
fn search_rsdp() -> Option<u64> {
    // SAFETY: the BIOS area is mapped.
    (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|at| unsafe { peek::<[u8; 8]>(*at) } == *b"RSD PTR ")
}

impl Acpi {
    /// Reads the tables behind the RSDP at `rsdp`, or looks for one when that is 0.
    pub(crate) fn read(rsdp: u64) -> Self {
        let mut this = Self {
            devices: [(0, 0); 24],
            device_count: 0,
            generation: None,
            processors: 0,
            io_apics: [IoApic {
                window: 0,
                first_gsi: 0,
            }; 4],
            io_apic_count: 0,
        };
        if let Some(rsdp) = Some(rsdp).filter(|at| *at != 0).or_else(search_rsdp) {
            this.roots(rsdp);
        }
        this
    }

    fn roots(&mut self, rsdp: u64) {
        if rsdp >= 4 << 30 {
            return;
        }
        // SAFETY: the RSDP lies in mapped RAM below 4 GiB.
        let (revision, rsdt, xsdt) = unsafe {
            (
                peek::<u8>(rsdp + 15),
                u64::from(peek::<u32>(rsdp + 16)),
                peek::<u64>(rsdp + 24),
            )
        };
        let (root, width) = match table(xsdt, Some(b"XSDT")).filter(|_| revision >= 2) {
            Some(root) => (root, 8),
            None => match table(rsdt, Some(b"RSDT")) {
                Some(root) => (root, 4),
                None => return,
            },
        };
        for entry in root[36..].chunks_exact(width).take(MAX_TABLES) {
            let address = match width {
                8 => u64_at(entry, 0),
                _ => u32_at(entry, 0).map(u64::from),
            };
            let Some(found) = address.and_then(|address| table(address, None)) else {
                continue;
            };
            match &found[..4] {
                b"APIC" => self.madt(found),
                b"FACP" => {
                    let short = u32_at(found, 40).map_or(0, u64::from);
                    let long = u64_at(found, 140).unwrap_or(0);
                    let dsdt = if long != 0 { long } else { short };
                    if let Some(dsdt) = table(dsdt, Some(b"DSDT")) {
                        self.definitions(dsdt);
                    }
                }
                b"SSDT" => self.definitions(found),
                _ => {}
            }
        }
    }

    fn madt(&mut self, table: &[u8]) {
        let mut rest = table.get(44..).unwrap_or(&[]);
        while let [kind, len, ..] = *rest {
            let Some((entry, tail)) = rest.split_at_checked(usize::from(len).max(2)) else {
                return;
            };
            let enabled = |at| u32_at(entry, at).is_some_and(|flags| flags & 1 == 1);
            match kind {
                0 if enabled(4) => self.processors += 1,
                9 if enabled(8) => self.processors += 1,
                1 => {
                    let pair = u32_at(entry, 4).zip(u32_at(entry, 8));
                    if let (Some((window, first_gsi)), true) = (pair, self.io_apic_count < 4) {
                        let window = u64::from(window);
                        self.io_apics[self.io_apic_count] = IoApic { window, first_gsi };
                        self.io_apic_count += 1;
                    }
                }
                _ => {}
            }
            rest = tail;
        }
    }

    /// Looks through AML for what names itself.
    fn definitions(&mut self, aml: &[u8]) {
        let mut rest = aml;
        while let Some(at) = find(rest, b"LNRO0005") {
            rest = &rest[at + 8..];
            let near = &rest[..rest.len().min(REACH)];
            let near = &near[..find(near, b"LNRO0005").unwrap_or(near.len())];
            if let (Some(found), true) = (resources(near), self.device_count < 24) {
                self.devices[self.device_count] = found;
                self.device_count += 1;
            }
        }
        if let Some(at) = find(aml, b"VM_Gen_Counter").or_else(|| find(aml, b"VMGENCTR")) {
            let near = &aml[at..aml.len().min(at + REACH)];
            self.generation = self.generation.or_else(|| address_package(near));
        }
    }
}

/// A window and an interrupt from resource descriptors (ACPI 6.4, 6.4.3).
fn resources(bytes: &[u8]) -> Option<(u64, u32)> {
    let window = match find(bytes, &[0x86, 0x09, 0x00]) {
        // Memory32Fixed: flags, base, length.
        Some(at) => u64::from(u32_at(bytes, at + 4)?),
        // QWordMemory: type, flags, granularity, minimum.
        None => u64_at(bytes, find(bytes, &[0x8a, 0x2b, 0x00])? + 14)?,
    };
    // Extended interrupt: flags, a count of 1, the number.
    let at = find(bytes, &[0x89, 0x06, 0x00])?;
    Some((window, u32_at(bytes, at + 5)?))
}

/// The address in `Name (ADDR, Package (2) { low, high })`.
fn address_package(bytes: &[u8]) -> Option<u64> {
    let at = find(bytes, b"ADDR")? + 4;
    // PackageOp, its length in one byte, two elements.
    let [0x12, _, 2, rest @ ..] = bytes.get(at..)? else {
        return None;
    };
    let (low, rest) = integer(rest)?;
    let (high, _) = integer(rest)?;
    Some(low | high << 32).filter(|address| *address != 0)
}

/// An integer of AML (ACPI 6.4, 20.2.3).
fn integer(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (op, rest) = bytes.split_first()?;
    let width = match op {
        0x00 => return Some((0, rest)),
        0x01 => return Some((1, rest)),
        0x0a => 1,
        0x0b => 2,
        0x0c => 4,
        0x0e => 8,
        _ => return None,
    };
    let (digits, rest) = rest.split_at_checked(width)?;
    Some((
        digits
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        rest,
    ))
}
