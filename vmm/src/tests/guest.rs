//! Tiny guests in a real kernel image.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::boot::{BootSource, Image};
use crate::kvm::Host;
use crate::memory::{Memory, RamSize};
use crate::{Bindings, Machine, MachineConfig};

/// This host's KVM, or a line that says why the test is skipped.
pub(super) fn host() -> Option<Arc<Host>> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// How the guest's code is entered.
#[derive(Clone, Copy)]
pub(super) enum Entry {
    /// 32-bit, flat, paging off.
    Pvh,
    /// 64-bit, identity-mapped.
    Long,
}

/// Where the code lies.
pub(super) const CODE: u32 = 0x10_0000;
/// A cell that guests count in.
pub(super) const CELL: GuestAddress = GuestAddress(0x18_0000);

/// An ELF kernel of at most a page of `code`.
pub(super) fn elf(code: &[u8], entry: Entry) -> Vec<u8> {
    const TEXT: usize = 0x1000;
    const NOTE: usize = 0x400;
    let mut elf = vec![0; 0x2000];
    let mut put = |offset: usize, value: &[u8]| {
        elf[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(24, &u64::from(CODE).to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &2_u16.to_le_bytes());
    let note_len = match entry {
        Entry::Pvh => 20,
        Entry::Long => 0,
    };
    for (index, kind, offset, address, len) in [
        (0, 1_u32, TEXT, u64::from(CODE), 0x1000_u64),
        (1, 4, NOTE, 0, note_len),
    ] {
        let at = 64 + index * 56;
        put(at, &kind.to_le_bytes());
        put(at + 8, &(offset as u64).to_le_bytes());
        put(at + 24, &address.to_le_bytes());
        put(at + 32, &len.to_le_bytes());
        put(at + 40, &len.to_le_bytes());
    }
    if matches!(entry, Entry::Pvh) {
        put(NOTE, &4_u32.to_le_bytes());
        put(NOTE + 4, &4_u32.to_le_bytes());
        put(NOTE + 8, &18_u32.to_le_bytes());
        put(NOTE + 12, b"Xen\0");
        put(NOTE + 16, &CODE.to_le_bytes());
    }
    put(TEXT, code);
    elf
}

/// A machine of `mib` MiB that boots `code`.
pub(super) fn config(mib: u64, code: &[u8], entry: Entry) -> MachineConfig {
    let kernel = Image::Bytes(Cow::Owned(elf(code, entry)));
    MachineConfig::new(RamSize::from_mib(mib).unwrap(), BootSource::new(kernel))
}

pub(super) fn boot(host: &Arc<Host>, code: &[u8], entry: Entry) -> Machine {
    Machine::boot(host, &config(4, code, entry), Bindings::default()).unwrap()
}

/// The 64-bit value at `at`.
pub(super) fn cell(memory: &Memory, at: GuestAddress) -> u64 {
    memory.ram().read_obj(at).unwrap()
}

/// Waits until the value at `at` is at least `value`, and returns it.
pub(super) fn wait_for(memory: &Memory, at: GuestAddress, value: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found = cell(memory, at);
        if found >= value {
            return found;
        }
        assert!(Instant::now() < deadline, "{found} at {:#x}", at.0);
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A copy of all of a memory.
pub(super) fn copy(memory: &Memory) -> Memory {
    let copy = Memory::anonymous(memory.size()).unwrap();
    let mut page = vec![0; 1 << 20];
    for (part, _) in memory.host_parts() {
        for offset in (0..part.len).step_by(page.len()) {
            let at = GuestAddress(part.guest.0 + offset);
            memory.ram().read_slice(&mut page, at).unwrap();
            if page.iter().any(|byte| *byte != 0) {
                copy.ram().write_slice(&page, at).unwrap();
            }
        }
    }
    copy
}
