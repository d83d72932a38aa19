//! What the loader tells: command line, memory map, ACPI.

use crate::memory::Region;

/// The most ranges of the memory map that count.
const MAX_RANGES: usize = 32;
/// The longest command line that counts.
const MAX_COMMAND_LINE: usize = 4096;
const E820_RAM: u32 = 1;

/// How the pilot was started; boot.s gives the number.
const PVH: u64 = 0;

/// Which ranges are RAM, and where the rest is told.
pub(crate) struct BootInfo {
    /// RAM, as the loader lists it.
    pub(crate) ram: [Region; MAX_RANGES],
    /// The RSDP's address; 0 when the loader does not tell.
    pub(crate) rsdp: u64,
    command_line: &'static [u8],
}

/// Reads a value of the loader's tables.
///
/// # Safety
/// `address` lies in mapped RAM that nothing writes meanwhile.
pub(crate) unsafe fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the caller vouches for the address; memory is mapped to itself.
    unsafe { (address as *const T).read_unaligned() }
}

impl BootInfo {
    /// Reads what the loader left.
    ///
    /// # Safety
    /// `info` is the address that the loader passed under `protocol`, and nothing else has run.
    pub(crate) unsafe fn read(protocol: u64, info: u64) -> Self {
        let mut this = Self {
            ram: [Region::EMPTY; MAX_RANGES],
            rsdp: 0,
            command_line: &[],
        };
        // SAFETY: the layouts are those of the PVH boot ABI (hvm_start_info, version 1) and of
        // Linux's boot_params; the loader vouches for the addresses in them.
        unsafe {
            let (line, map, entries, stride) = match protocol {
                PVH => {
                    this.rsdp = peek(info + 32);
                    let version: u32 = peek(info + 4);
                    let entries = if version >= 1 {
                        peek::<u32>(info + 48)
                    } else {
                        0
                    };
                    (
                        peek::<u64>(info + 24),
                        peek::<u64>(info + 40),
                        u64::from(entries),
                        24,
                    )
                }
                _ => {
                    this.rsdp = peek(info + 0x70);
                    let high = u64::from(peek::<u32>(info + 0xc8)) << 32;
                    let line = u64::from(peek::<u32>(info + 0x228)) | high;
                    (line, info + 0x2d0, u64::from(peek::<u8>(info + 0x1e8)), 20)
                }
            };
            let mut found = 0;
            for entry in (0..entries).map(|i| map + i * stride) {
                if peek::<u32>(entry + 16) == E820_RAM && found < MAX_RANGES {
                    this.ram[found] = Region {
                        start: peek(entry),
                        len: peek(entry + 8),
                    };
                    found += 1;
                }
            }
            if line != 0 {
                let bytes = core::slice::from_raw_parts(line as *const u8, MAX_COMMAND_LINE);
                let end = bytes.iter().position(|b| *b == 0).unwrap_or(0);
                this.command_line = &bytes[..end];
            }
        }
        this
    }

    /// Bytes of RAM in all.
    pub(crate) fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|region| region.len).sum()
    }

    /// The values of `key=value` words of the command line.
    pub(crate) fn values(&self, key: &'static str) -> impl Iterator<Item = &'static str> {
        core::str::from_utf8(self.command_line)
            .unwrap_or("")
            .split_ascii_whitespace()
            .filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// A number on the command line, decimal or `0x`.
    pub(crate) fn number(&self, key: &'static str) -> Option<u64> {
        self.values(key).last().and_then(number)
    }
}

/// A number, decimal or `0x`.
pub(crate) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `size@base:gsi` with an optional `:id`, as in `virtio_mmio.device=` on Linux.
pub(crate) fn device_word(text: &str) -> Option<(u64, u32)> {
    let (_, rest) = text.split_once('@')?;
    let mut items = rest.split(':');
    let base = number(items.next()?)?;
    Some((base, u32::try_from(number(items.next()?)?).ok()?))
}
