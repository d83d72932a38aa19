//! Local APIC and I/O APIC, both programmed from ring 3 through their windows.

use crate::cpu;

const LAPIC: u64 = 0xfee0_0000;
const LAPIC_ID: u64 = 0x20;
const LAPIC_TPR: u64 = 0x80;
const LAPIC_SPURIOUS: u64 = 0xf0;
const LAPIC_ICR_LOW: u64 = 0x300;
const LAPIC_ICR_HIGH: u64 = 0x310;
const LAPIC_TIMER: u64 = 0x320;
const LAPIC_INITIAL_COUNT: u64 = 0x380;
const LAPIC_DIVIDE: u64 = 0x3e0;
const MASKED: u32 = 1 << 16;

/// Vector of the timer.
const TIMER_VECTOR: u8 = 0x20;
/// Vector of the first interrupt line.
const FIRST_VECTOR: u8 = 0x30;

/// An I/O APIC: where its window is and which global system interrupt is its pin 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoApic {
    pub(crate) window: u64,
    pub(crate) first_gsi: u32,
}

/// The interrupt controllers.
pub(crate) struct Interrupts {
    io_apics: [IoApic; 4],
    count: usize,
    next_vector: u8,
    timer_on: bool,
}

fn write(register: u64, value: u32) {
    // SAFETY: the LAPIC's window, mapped and used by nothing else.
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) }
}

fn read(register: u64) -> u32 {
    // SAFETY: as for `write`.
    unsafe { ((LAPIC + register) as *const u32).read_volatile() }
}

impl Interrupts {
    /// Silences the old controllers, turns the LAPIC on and lets interrupts in.
    pub(crate) fn start(io_apics: &[IoApic]) -> Self {
        cpu::out8(0x21, 0xff);
        cpu::out8(0xa1, 0xff);
        write(LAPIC_TPR, 0);
        write(LAPIC_TIMER, MASKED);
        write(LAPIC_SPURIOUS, 0x1ff);
        cpu::enable_interrupts();
        let default = IoApic {
            window: 0xfec0_0000,
            first_gsi: 0,
        };
        let mut this = Self {
            io_apics: [default; 4],
            count: 1,
            next_vector: FIRST_VECTOR,
            timer_on: false,
        };
        for (slot, io_apic) in this.io_apics.iter_mut().zip(io_apics) {
            *slot = *io_apic;
        }
        this.count = io_apics.len().clamp(1, 4);
        this
    }

    /// Sends a global system interrupt, edge-triggered, to this processor; which vector it comes
    /// by, or `None` when no I/O APIC or vector is left for it.
    pub(crate) fn route(&mut self, gsi: u32) -> Option<u8> {
        let io_apic = self.io_apics[..self.count]
            .iter()
            .filter(|io_apic| io_apic.first_gsi <= gsi)
            .max_by_key(|io_apic| io_apic.first_gsi)?;
        let pin = gsi - io_apic.first_gsi;
        let vector = self.next_vector;
        if pin > 119 || vector >= 0xf0 {
            return None;
        }
        self.next_vector += 1;
        let select = io_apic.window as *mut u32;
        let data = (io_apic.window + 0x10) as *mut u32;
        let entry = 0x10 + 2 * pin;
        // SAFETY: the I/O APIC's window, mapped and used by nothing else. The half with the
        // destination comes first: the other one takes the mask off.
        unsafe {
            select.write_volatile(entry + 1);
            data.write_volatile(read(LAPIC_ID) & 0xff00_0000);
            select.write_volatile(entry);
            data.write_volatile(u32::from(vector));
        }
        Some(vector)
    }

    /// Has the timer interrupt once after about 100 ms (at the LAPIC's 1 GHz under KVM and QEMU).
    pub(crate) fn arm_timer(&mut self) {
        if !self.timer_on {
            write(LAPIC_DIVIDE, 0xb);
            write(LAPIC_TIMER, u32::from(TIMER_VECTOR));
            self.timer_on = true;
        }
        write(LAPIC_INITIAL_COUNT, 100_000_000);
    }

    /// Takes that back.
    pub(crate) fn disarm_timer(&mut self) {
        write(LAPIC_INITIAL_COUNT, 0);
        cpu::take_pending(TIMER_VECTOR);
    }

    /// Whether the timer went off.
    pub(crate) fn timer_fired(&mut self) -> bool {
        cpu::take_pending(TIMER_VECTOR)
    }
}

/// Starts every other processor at the real-mode page `page` (below 1 MiB).
pub(crate) fn start_others(page: u8) {
    const ALL_BUT_SELF: u32 = 3 << 18;
    const ASSERT: u32 = 1 << 14;
    write(LAPIC_ICR_HIGH, 0);
    write(LAPIC_ICR_LOW, ALL_BUT_SELF | ASSERT | (5 << 8));
    for _ in 0..2 {
        pause_us(200);
        write(
            LAPIC_ICR_LOW,
            ALL_BUT_SELF | ASSERT | (6 << 8) | u32::from(page),
        );
    }
}

/// Turns this processor's LAPIC on, with its timer at `vector`.
pub(crate) fn start_napping(vector: u8) {
    write(LAPIC_TPR, 0);
    write(LAPIC_SPURIOUS, 0x1ff);
    write(LAPIC_DIVIDE, 0xb);
    write(LAPIC_TIMER, u32::from(vector));
}

/// Has this processor's timer interrupt once after about 10 ms.
pub(crate) fn arm_nap() {
    write(LAPIC_INITIAL_COUNT, 10_000_000);
}

/// A short pause told by reads of an I/O port, each of which takes about a microsecond or more.
pub(crate) fn pause_us(us: u32) {
    for _ in 0..us {
        cpu::out8(0x80, 0);
    }
}
