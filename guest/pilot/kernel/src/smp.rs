//! The other processors: each counts, so that a copy of the machine can be shown to have all of
//! them going on.

use core::arch::asm;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use offshoot_protocol::{MAX_VCPUS, Mode};

use crate::{cpu, interrupts};

/// Processors beside the first.
pub(crate) const MAX_OTHERS: usize = MAX_VCPUS - 1;
/// Vector of the timer that ends a nap.
pub(crate) const NAP_VECTOR: u8 = 0x2f;

/// The page that the others start at, in real mode: free on every machine once the boot
/// information is read.
const TRAMPOLINE_PAGE: u8 = 8;
const TSS_LEN: usize = 104;

#[repr(C, align(16))]
struct Tss([u8; 112]);

#[repr(C, align(512))]
pub(crate) struct Ring0Stacks([[u8; 512]; MAX_OTHERS]);

#[repr(C, align(4096))]
pub(crate) struct Stacks([[u8; 4096]; MAX_OTHERS]);

/// How many have started; boot.s counts.
pub(crate) static OTHERS: AtomicU32 = AtomicU32::new(0);
/// boot.s gives each its part.
pub(crate) static mut RING0_STACKS: Ring0Stacks = Ring0Stacks([[0; 512]; MAX_OTHERS]);
/// boot.s gives each its part.
pub(crate) static mut STACKS: Stacks = Stacks([[0; 4096]; MAX_OTHERS]);

static mut TSSS: [Tss; MAX_OTHERS] = [const { Tss([0; 112]) }; MAX_OTHERS];
static COUNTERS: [AtomicU64; MAX_OTHERS] = [const { AtomicU64::new(0) }; MAX_OTHERS];
/// The mode, for the others to see.
static MODE: AtomicU32 = AtomicU32::new(Mode::Halt as u32);

unsafe extern "C" {
    static mut gdt: [u64; 8 + 2 * MAX_OTHERS];
    static trampoline: u8;
    static trampoline_end: u8;
}

/// Starts the other processors of a machine that has `expected` in all; returns how many run.
pub(crate) fn start(expected: u32) -> u32 {
    // A port write takes a microsecond or more: at least this long in all.
    const PATIENCE_US: u32 = 200_000;
    let others = (expected.max(1) - 1).min(MAX_OTHERS as u32);
    if others == 0 {
        return 1;
    }
    for index in 0..others as usize {
        // SAFETY: at boot, on the only processor that runs; index < MAX_OTHERS.
        unsafe { describe(index) };
    }
    // SAFETY: the two symbols enclose the trampoline's code; its page is conventional memory
    // that holds nothing any more.
    unsafe {
        let code = &raw const trampoline;
        let len = (&raw const trampoline_end).addr() - code.addr();
        let page = usize::from(TRAMPOLINE_PAGE) << 12;
        ptr::copy_nonoverlapping(code, ptr::with_exposed_provenance_mut(page), len);
    }
    interrupts::start_others(TRAMPOLINE_PAGE);
    for _ in 0..PATIENCE_US {
        if OTHERS.load(Ordering::Acquire) >= others {
            break;
        }
        interrupts::pause_us(1);
    }
    1 + OTHERS.load(Ordering::Acquire).min(others)
}

/// Fills in another processor's TSS and its descriptor.
///
/// # Safety
/// `index` is below `MAX_OTHERS`, and that processor does not run yet.
unsafe fn describe(index: usize) {
    // SAFETY: by the contract nobody else looks at these places now.
    unsafe {
        let tss = &raw mut TSSS[index];
        let stack = (&raw const RING0_STACKS.0[index]).addr() + 512;
        let top = (stack as u64).to_le_bytes();
        // rsp0, ist1: a double fault starts over at the same place; and no I/O bitmap.
        (&raw mut (*tss).0[4])
            .cast::<[u8; 8]>()
            .write_unaligned(top);
        (&raw mut (*tss).0[36])
            .cast::<[u8; 8]>()
            .write_unaligned(top);
        (&raw mut (*tss).0[102])
            .cast::<[u8; 2]>()
            .write_unaligned((TSS_LEN as u16).to_le_bytes());
        let base = tss.addr() as u64;
        let low = (TSS_LEN as u64 - 1) | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24) << 56;
        (&raw mut gdt[8 + 2 * index]).write(low);
        (&raw mut gdt[9 + 2 * index]).write(base >> 32);
    }
}

/// Tells the others of a new mode.
pub(crate) fn set_mode(mode: Mode) {
    MODE.store(mode as u32, Ordering::Relaxed);
}

/// The counters of the first `count` others.
pub(crate) fn counters(count: u32) -> impl Iterator<Item = u64> {
    COUNTERS
        .iter()
        .take(count as usize)
        .map(|counter| counter.load(Ordering::Relaxed))
}

/// boot.s comes here on each other processor, in ring 3, interrupts off.
pub(crate) extern "sysv64" fn main(index: u64) -> ! {
    let counter = &COUNTERS[index as usize];
    interrupts::start_napping(NAP_VECTOR);
    loop {
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
        match MODE.load(Ordering::Relaxed) {
            mode if mode == Mode::Halt as u32 => {
                interrupts::arm_nap();
                // SAFETY: the gate keeps every register and the stack.
                unsafe { asm!("ud2", in("eax") cpu::GATE_NAP) };
            }
            _ => core::hint::spin_loop(),
        }
    }
}
