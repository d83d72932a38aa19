//! Kernel and initrd files.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use offshoot_devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, LoadedKernel, layout};

/// The page size: initrds begin on a page.
const PAGE: u64 = 4096;

/// A file or bytes in memory.
#[derive(Debug)]
pub enum Image {
    /// An open file, read from its start.
    File(File),
    /// The image itself.
    Bytes(Cow<'static, [u8]>),
}

impl Image {
    pub(super) fn kernel_format(&self) -> Result<KernelFormat, BootError> {
        let mut head = [0; BZIMAGE_HEADER_END];
        self.read_at(&mut head, 0)?;
        // ELFCLASS64, ELFDATA2LSB and e_machine EM_X86_64: the loader does not look at these.
        let elf = head.starts_with(b"\x7fELF\x02\x01") && head.get(18..20) == Some(&[62, 0]);
        if elf {
            Ok(KernelFormat::Elf)
        } else if head.get(0x202..) == Some(b"HdrS") {
            Ok(KernelFormat::BzImage)
        } else {
            Err(BootError::NotAKernel)
        }
    }

    fn len(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => reader_of(file)?.seek(SeekFrom::End(0)),
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }
}

/// ELF64 header: where the program headers lie, how large each is, how many there are.
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
/// ELF64 program header: where the segment lies in the file and how long it is there.
const P_OFFSET: usize = 8;
const P_FILESZ: usize = 32;
const PROGRAM_HEADER_LEN: usize = 56;
/// boot.rst: the number of setup sectors behind the first (0 stands for 4), and the size of the
/// kernel behind them in paragraphs.
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const OLD_SETUP_SECTS: u64 = 4;
const SECTOR: u64 = 512;
const PARAGRAPH: u64 = 16;
/// Up to and with the "HdrS" at 0x202.
const BZIMAGE_HEADER_END: usize = 0x206;
/// More program headers than any kernel has: Linux has five.
const MAX_PROGRAM_HEADERS: u16 = 64;

impl Image {
    /// Proves that every segment lies inside the file, for the loader adds offsets unchecked.
    pub(super) fn check_elf_segments(&self) -> Result<(), BootError> {
        let read = |source| BootError::Read {
            what: "kernel",
            source,
        };
        let len = self.len().map_err(read)?;
        let mut header = [0; 64];
        self.read_at(&mut header, 0)?;
        let count = u16_at(&header, E_PHNUM);
        let table = u64_at(&header, E_PHOFF);
        if usize::from(u16_at(&header, E_PHENTSIZE)) != PROGRAM_HEADER_LEN
            || count > MAX_PROGRAM_HEADERS
        {
            return Err(BootError::NotAKernel);
        }
        for index in 0..u64::from(count) {
            let mut segment = [0; PROGRAM_HEADER_LEN];
            let offset = index
                .checked_mul(PROGRAM_HEADER_LEN as u64)
                .and_then(|offset| offset.checked_add(table))
                .ok_or(BootError::NotAKernel)?;
            self.read_at(&mut segment, offset)?;
            let end = u64_at(&segment, P_OFFSET).checked_add(u64_at(&segment, P_FILESZ));
            if end.is_none_or(|end| end > len) {
                return Err(BootError::Truncated);
            }
        }
        Ok(())
    }

    /// Proves that the file holds all of the kernel that its header announces.
    pub(super) fn check_bzimage_len(&self) -> Result<(), BootError> {
        let read = |source| BootError::Read {
            what: "kernel",
            source,
        };
        let mut header = [0; BZIMAGE_HEADER_END];
        self.read_at(&mut header, 0)?;
        let setup_sectors = match header.get(SETUP_SECTS) {
            Some(0) | None => OLD_SETUP_SECTS,
            Some(sectors) => u64::from(*sectors),
        };
        let setup = setup_sectors.saturating_add(1).saturating_mul(SECTOR);
        let kernel = (u64_at(&header, SYSSIZE) & u64::from(u32::MAX)).saturating_mul(PARAGRAPH);
        let expected = setup.saturating_add(kernel);
        if self.len().map_err(read)? < expected {
            Err(BootError::Truncated)
        } else {
            Ok(())
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), BootError> {
        match self {
            Self::File(file) => {
                file.read_exact_at(buffer, offset)
                    .map_err(|source| match source.kind() {
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
                            BootError::NotAKernel
                        }
                        _ => BootError::Read {
                            what: "kernel",
                            source,
                        },
                    })
            }
            Self::Bytes(bytes) => usize::try_from(offset)
                .ok()
                .and_then(|offset| bytes.get(offset..))
                .and_then(|rest| rest.get(..buffer.len()))
                .map(|found| buffer.copy_from_slice(found))
                .ok_or(BootError::NotAKernel),
        }
    }
}

fn u16_at<const N: usize>(bytes: &[u8; N], offset: usize) -> u16 {
    bytes
        .iter()
        .skip(offset)
        .take(2)
        .rev()
        .fold(0, |value, byte| value << 8 | u16::from(*byte))
}

fn u64_at<const N: usize>(bytes: &[u8; N], offset: usize) -> u64 {
    bytes
        .iter()
        .skip(offset)
        .take(8)
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// What the kernel file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KernelFormat {
    Elf,
    BzImage,
}

/// Where an initrd lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) start: GuestAddress,
    pub(super) len: u64,
}

fn reader_of(file: &File) -> io::Result<File> {
    file.try_clone()
}

/// A handle of its own on `file`: the loaders want to seek.
pub(super) fn reader(file: &File) -> Result<File, BootError> {
    reader_of(file).map_err(|source| BootError::Read {
        what: "kernel",
        source,
    })
}

/// Puts the initrd as high below 3 GiB as the kernel accepts, out of the kernel's way.
pub(super) fn load_initrd(
    memory: &GuestRam,
    image: &Image,
    kernel: &LoadedKernel,
) -> Result<Placed, BootError> {
    let read = |source| BootError::Read {
        what: "initrd",
        source,
    };
    let len = image.len().map_err(read)?;
    // boot.rst, `initrd_addr_max`: the highest address that the initrd's last byte may have.
    let limit = kernel.loaded.setup_header.map_or(u64::MAX, |header| {
        u64::from(header.initrd_addr_max).saturating_add(1)
    });
    let end = layout::low_ram_end(memory).min(limit);
    let start = end
        .checked_sub(len)
        .map(|start| start & !(PAGE.wrapping_sub(1)))
        .filter(|start| *start >= kernel.end())
        .ok_or(BootError::DoesNotFit {
            what: "the initrd behind the kernel",
            end,
        })?;
    let len_in_memory = usize::try_from(len).map_err(|_| BootError::DoesNotFit {
        what: "the initrd",
        end,
    })?;
    let start = GuestAddress(start);
    match image {
        Image::File(file) => {
            let mut file = reader_of(file).map_err(read)?;
            file.rewind().map_err(read)?;
            memory.read_exact_volatile_from(start, &mut file, len_in_memory)?;
        }
        Image::Bytes(bytes) => memory.write_slice(bytes, start)?,
    }
    Ok(Placed { start, len })
}
