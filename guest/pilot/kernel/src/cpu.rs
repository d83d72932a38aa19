//! Single instructions: ports, the time-stamp counter, and the gates into ring 0.

use core::arch::asm;
use core::sync::atomic::{AtomicU8, Ordering};

/// Gate: sleep until an interrupt. boot.s has the other side of these numbers.
pub(crate) const GATE_IDLE: u32 = 0x0ff5_0001;
/// Gate: interrupts on.
pub(crate) const GATE_ENABLE: u32 = 0x0ff5_0002;
/// Gate: triple fault.
pub(crate) const GATE_TRIPLE_FAULT: u32 = 0x0ff5_0003;
/// Gate: halt for ever.
pub(crate) const GATE_STOP: u32 = 0x0ff5_0004;

/// Gate: sleep on a processor that is not the first.
pub(crate) const GATE_NAP: u32 = 0x0ff5_0005;

/// Set by the interrupt entry points, one byte a vector; taken by the main loop.
#[unsafe(link_section = ".bss.hot")]
pub(crate) static PENDING: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];
/// Set with each of `PENDING`; cleared by the idle gate when it returns.
#[unsafe(link_section = ".bss.hot")]
pub(crate) static WOKEN: AtomicU8 = AtomicU8::new(0);

/// Whether `vector` came since it was last asked.
pub(crate) fn take_pending(vector: u8) -> bool {
    let flag = &PENDING[usize::from(vector)];
    // A plain load first: the page stays unwritten in a guest that only looks.
    flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::AcqRel) != 0
}

fn gate(number: u32) {
    // SAFETY: the gates keep every register and the stack (boot.s); they return behind the ud2.
    unsafe { asm!("ud2", in("eax") number) }
}

/// Sleeps until an interrupt comes; returns at once when one came since the last return.
pub(crate) fn idle() {
    gate(GATE_IDLE);
}

/// Lets interrupts in.
pub(crate) fn enable_interrupts() {
    gate(GATE_ENABLE);
}

/// Ends the machine by an exception that has no handler.
pub(crate) fn triple_fault() -> ! {
    gate(GATE_TRIPLE_FAULT);
    stop()
}

/// Halts this processor for ever, interrupts off.
pub(crate) fn stop() -> ! {
    loop {
        gate(GATE_STOP);
    }
}

/// Writes a byte to an I/O port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: the pilot owns the machine; no port reaches its memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem, preserves_flags))
    }
}

/// Reads a byte from an I/O port.
pub(crate) fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `out8`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem, preserves_flags))
    }
    value
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 has it, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Measures the time-stamp counter against channel 0 of the interval timer for 10 ms; `None`
/// when the machine has no timer. In kHz.
pub(crate) fn measure_tsc_khz() -> Option<u64> {
    const PIT_HZ: u64 = 1_193_182;
    let latch = || {
        out8(0x43, 0x00);
        u16::from_le_bytes([in8(0x40), in8(0x40)])
    };
    // Mode 2, from 65536: it goes round every 55 ms, and its interrupt is masked everywhere.
    out8(0x43, 0x34);
    out8(0x40, 0);
    out8(0x40, 0);
    let (mut last, begin) = (latch(), tsc());
    let mut elapsed = 0u64;
    for _ in 0..1_000_000 {
        let now = latch();
        elapsed += u64::from(last.wrapping_sub(now));
        last = now;
        if elapsed >= PIT_HZ / 100 {
            return Some(tsc().wrapping_sub(begin).saturating_mul(PIT_HZ) / elapsed / 1000);
        }
    }
    None
}

/// Time that passed, told by the time-stamp counter without trusting it: a step backwards counts
/// as none, and a leap forwards (a restore) as some tens of milliseconds, which is what a busy host
/// may keep a processor waiting.
pub(crate) struct Clock {
    last: u64,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { last: tsc() }
    }

    /// Ticks since the last call.
    pub(crate) fn step(&mut self) -> u64 {
        const LEAP: u64 = 100_000_000;
        let now = tsc();
        let step = now.saturating_sub(self.last).min(LEAP);
        self.last = now;
        step
    }
}
