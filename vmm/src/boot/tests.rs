use std::borrow::Cow;
use std::io::Write;

use offshoot_devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::memory_map::{Entry, RAM, RESERVED};
use super::*;

const MIB: usize = 1 << 20;

fn ram(mib: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), mib * MIB)]).unwrap()
}

fn platform() -> PlatformInfo {
    PlatformInfo {
        vcpus: 2,
        virtio: vec![MmioWindow {
            base: 0xd000_0000,
            gsi: 5,
        }],
        serial: true,
    }
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// An ELF kernel: one loadable page at 1 MiB, and a PVH note when asked for.
fn elf(pvh_entry: Option<u32>) -> Vec<u8> {
    const CODE: usize = 0x1000;
    const NOTE: usize = 0x400;
    let mut elf = vec![0; 0x2000];
    put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    put(&mut elf, 16, &2_u16.to_le_bytes());
    put(&mut elf, 18, &62_u16.to_le_bytes());
    put(&mut elf, 24, &0x10_0010_u64.to_le_bytes());
    put(&mut elf, 32, &64_u64.to_le_bytes());
    put(&mut elf, 54, &56_u16.to_le_bytes());
    put(&mut elf, 56, &2_u16.to_le_bytes());
    let mut segment = |index: usize, kind: u32, offset: usize, address: u64, len: u64| {
        let at = 64 + index * 56;
        put(&mut elf, at, &kind.to_le_bytes());
        put(&mut elf, at + 8, &(offset as u64).to_le_bytes());
        put(&mut elf, at + 24, &address.to_le_bytes());
        put(&mut elf, at + 32, &len.to_le_bytes());
        put(&mut elf, at + 40, &len.to_le_bytes());
    };
    segment(0, 1, CODE, 0x10_0000, 0x1000);
    segment(1, 4, NOTE, 0, if pvh_entry.is_some() { 20 } else { 0 });
    put(&mut elf, CODE, b"first bytes of the kernel");
    if let Some(entry) = pvh_entry {
        put(&mut elf, NOTE, &4_u32.to_le_bytes());
        put(&mut elf, NOTE + 4, &4_u32.to_le_bytes());
        put(&mut elf, NOTE + 8, &18_u32.to_le_bytes());
        put(&mut elf, NOTE + 12, b"Xen\0");
        put(&mut elf, NOTE + 16, &entry.to_le_bytes());
    }
    elf
}

/// A bzImage: one setup sector, one page of kernel, the 64-bit entry as `xloadflags` says.
fn bzimage(xloadflags: u16) -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &(4096_u32 / 16).to_le_bytes());
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x214, &0x10_0000_u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x236, &xloadflags.to_le_bytes());
    put(&mut image, 0x258, &0x20_0000_u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000_u32.to_le_bytes());
    put(&mut image, 1024, b"compressed kernel");
    image
}

fn source(kernel: Vec<u8>) -> BootSource {
    BootSource::new(Image::Bytes(Cow::Owned(kernel)))
}

fn read<const N: usize>(memory: &GuestRam, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(memory: &GuestRam, at: u64) -> u32 {
    u32::from_le_bytes(read(memory, at))
}

fn u64_at(memory: &GuestRam, at: u64) -> u64 {
    u64::from_le_bytes(read(memory, at))
}

#[test]
fn elf_with_a_note_boots_by_pvh() {
    let memory = ram(16);
    let mut source = source(elf(Some(0x10_0040)));
    source.command_line = "console=ttyS0".into();
    source.initrd = Some(Image::Bytes(Cow::Borrowed(b"initrd")));
    let entry = load(&memory, &source, &platform()).unwrap();
    let start_info = layout::PVH_START_INFO;
    assert_eq!(
        entry,
        EntryPoint::Pvh {
            rip: GuestAddress(0x10_0040),
            start_info
        }
    );

    assert_eq!(&read::<11>(&memory, 0x10_0000), b"first bytes");
    // start_info.h: magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, entries.
    let at = start_info.0;
    assert_eq!(u32_at(&memory, at), 0x336e_c578);
    assert_eq!(u32_at(&memory, at + 4), 1);
    assert_eq!(u32_at(&memory, at + 12), 1);
    let module = u64_at(&memory, at + 16);
    assert_eq!(&read::<6>(&memory, u64_at(&memory, module)), b"initrd");
    assert_eq!(u64_at(&memory, module + 8), 6);
    assert_eq!(
        &read::<14>(&memory, u64_at(&memory, at + 24)),
        b"console=ttyS0\0"
    );
    assert_eq!(&read::<8>(&memory, u64_at(&memory, at + 32)), b"RSD PTR ");
    assert_eq!(u32_at(&memory, at + 48), 3);
}

#[test]
fn elf_without_a_note_boots_by_the_linux_protocol() {
    let memory = ram(16);
    let entry = load(&memory, &source(elf(None)), &platform()).unwrap();
    let boot_params = layout::BOOT_PARAMS;
    assert_eq!(
        entry,
        EntryPoint::Linux64 {
            rip: GuestAddress(0x10_0010),
            boot_params
        }
    );
    // zero-page.rst: acpi_rsdp_addr 0x070, e820_entries 0x1e8, header 0x202, cmd_line_ptr 0x228.
    assert_eq!(
        &read::<8>(&memory, u64_at(&memory, boot_params.0 + 0x70)),
        b"RSD PTR "
    );
    assert_eq!(read::<1>(&memory, boot_params.0 + 0x1e8), [3]);
    assert_eq!(&read::<4>(&memory, boot_params.0 + 0x202), b"HdrS");
    assert_eq!(
        u64::from(u32_at(&memory, boot_params.0 + 0x228)),
        layout::COMMAND_LINE.0
    );
}

#[test]
fn bzimage_enters_512_bytes_behind_its_start() {
    let memory = ram(16);
    let mut source = source(bzimage(1));
    source.initrd = Some(Image::Bytes(Cow::Owned(vec![7; 5000])));
    let entry = load(&memory, &source, &platform()).unwrap();
    let boot_params = layout::BOOT_PARAMS;
    assert_eq!(
        entry,
        EntryPoint::Linux64 {
            rip: GuestAddress(0x10_0200),
            boot_params
        }
    );
    assert_eq!(&read::<17>(&memory, 0x10_0000), b"compressed kernel");
    // boot.rst: ramdisk_image 0x218, ramdisk_size 0x21c.
    let initrd = u64::from(u32_at(&memory, boot_params.0 + 0x218));
    assert_eq!(initrd, (16 * MIB - 8192) as u64);
    assert_eq!(u32_at(&memory, boot_params.0 + 0x21c), 5000);
    assert_eq!(read::<1>(&memory, initrd + 4999), [7]);
}

#[test]
fn a_protocol_that_the_kernel_lacks_is_refused() {
    let memory = ram(16);
    let mut pvh = source(elf(None));
    pvh.protocol = Protocol::Pvh;
    let error = load(&memory, &pvh, &platform()).unwrap_err();
    assert!(
        matches!(error, BootError::ProtocolMissing(Protocol::Pvh)),
        "{error}"
    );
    let error = load(&memory, &source(bzimage(0)), &platform()).unwrap_err();
    assert!(
        matches!(error, BootError::ProtocolMissing(Protocol::Linux64)),
        "{error}"
    );
}

#[test]
fn what_is_no_kernel_is_refused() {
    let memory = ram(16);
    let mut other_machine = elf(None);
    other_machine[18] = 183;
    for image in [
        Vec::new(),
        b"#!/bin/sh\n".to_vec(),
        vec![0; 4096],
        other_machine,
    ] {
        let error = load(&memory, &source(image), &platform()).unwrap_err();
        assert!(matches!(error, BootError::NotAKernel), "{error}");
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"not a kernel").unwrap();
    let error = load(&memory, &BootSource::new(Image::File(file)), &platform()).unwrap_err();
    assert!(matches!(error, BootError::NotAKernel), "{error}");
}

#[test]
fn a_kernel_in_a_file_loads_as_its_bytes_do() {
    let (from_bytes, from_file) = (ram(16), ram(16));
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf(Some(0x10_0040))).unwrap();
    load(&from_bytes, &source(elf(Some(0x10_0040))), &platform()).unwrap();
    load(&from_file, &BootSource::new(Image::File(file)), &platform()).unwrap();
    let contents = [from_bytes, from_file].map(|memory| {
        let mut bytes = vec![0; 2 * MIB];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    });
    assert!(contents[0] == contents[1]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let memory = ram(4);
    let mut large_initrd = source(elf(None));
    large_initrd.initrd = Some(Image::Bytes(Cow::Owned(vec![0; 3 * MIB])));
    let error = load(&memory, &large_initrd, &platform()).unwrap_err();
    assert!(matches!(error, BootError::DoesNotFit { .. }), "{error}");

    let mut large_kernel = elf(None);
    put(&mut large_kernel, 64 + 40, &(64 * MIB as u64).to_le_bytes());
    let error = load(&memory, &source(large_kernel), &platform()).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::DoesNotFit {
                what: "the kernel",
                ..
            }
        ),
        "{error}"
    );

    let mut long_line = source(elf(None));
    long_line.command_line = "x".repeat(layout::COMMAND_LINE_MAX);
    let error = load(&memory, &long_line, &platform()).unwrap_err();
    assert!(matches!(error, BootError::CommandLine(_)), "{error}");
}

#[test]
fn without_acpi_the_command_line_names_the_devices() {
    let memory = ram(16);
    let mut source = source(elf(Some(0x10_0040)));
    source.command_line = "quiet".into();
    source.discovery = Discovery::CommandLine;
    load(&memory, &source, &platform()).unwrap();
    let expected = b"quiet virtio_mmio.device=4K@0xd0000000:5\0";
    assert_eq!(&read::<41>(&memory, layout::COMMAND_LINE.0), expected);
    assert_eq!(u64_at(&memory, layout::PVH_START_INFO.0 + 32), 0, "no RSDP");
    assert_eq!(read::<8>(&memory, layout::ACPI_TABLES.0), [0; 8]);
}

/// Every way of booting leaves the guest a way of resetting.
#[test]
fn code_lies_at_the_reset_vector() {
    for kernel in [elf(Some(0x10_0040)), elf(None), bzimage(1)] {
        let memory = ram(16);
        load(&memory, &source(kernel), &platform()).unwrap();
        // 16 bytes before the end of the first MiB: mov al, 0xfe; out 0x64, al
        assert_eq!(read::<4>(&memory, 0xf_fff0), [0xb0, 0xfe, 0xe6, 0x64]);
    }
}

#[test]
fn the_memory_map_reserves_what_lies_below_1_mib_and_skips_the_hole() {
    let memory = GuestRam::from_ranges(&[
        (GuestAddress(0), 16 * MIB),
        (GuestAddress(1 << 32), 2 * MIB),
    ])
    .unwrap();
    let expected = [
        Entry {
            start: 0,
            len: 0x9_fc00,
            kind: RAM,
        },
        Entry {
            start: 0x9_fc00,
            len: 0x6_0400,
            kind: RESERVED,
        },
        Entry {
            start: 0x10_0000,
            len: 15 * MIB as u64,
            kind: RAM,
        },
        Entry {
            start: 1 << 32,
            len: 2 * MIB as u64,
            kind: RAM,
        },
    ];
    assert_eq!(memory_map::entries(&memory), expected);
}

/// Every byte of the headers that the loader reads, changed in several ways: an error or a boot,
/// never a panic.
#[test]
fn mutated_kernels_do_no_harm() {
    let memory = ram(4);
    for original in [elf(Some(0x10_0040)), bzimage(1)] {
        for at in (0..0x110).chain(0x1f0..0x268).chain(0x400..0x414) {
            for change in [0x01, 0x7f, 0x80, 0xff] {
                let mut kernel = original.clone();
                kernel[at] ^= change;
                let _outcome = load(&memory, &source(kernel), &platform());
            }
        }
        for len in (0..0x440).chain([original.len() - 1]) {
            let kernel = original[..len].to_vec();
            assert!(
                load(&memory, &source(kernel), &platform()).is_err(),
                "cut at {len}"
            );
        }
    }
}
