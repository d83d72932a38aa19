//! Waiting for a device, but not for ever.

use core::hint;

use crate::cpu;
use crate::interrupts::Interrupts;

/// Turns before the processor is given up.
const SPINS: u32 = 200;
/// Timer interrupts of 100 ms without any progress before a wait ends.
const LIMIT: u32 = 50;

/// A wait in progress.
pub(crate) struct Patience {
    spins: u32,
    ticks: u32,
    halt: bool,
    timer: bool,
}

impl Patience {
    /// Waits by halting, or by turning round for `halt` = false.
    pub(crate) fn new(halt: bool) -> Self {
        Self {
            spins: 0,
            ticks: 0,
            halt,
            timer: false,
        }
    }

    /// Something moved: the wait starts over.
    pub(crate) fn progress(&mut self) {
        (self.spins, self.ticks) = (0, 0);
    }

    /// Waits a little; false when it has been too long. `arm` asks the device for an interrupt
    /// and says whether there is something to do already.
    pub(crate) fn wait(&mut self, interrupts: &mut Interrupts, arm: impl FnOnce() -> bool) -> bool {
        if self.spins < SPINS {
            self.spins += 1;
            hint::spin_loop();
            return true;
        }
        if !self.timer {
            interrupts.arm_timer();
            self.timer = true;
        }
        if !self.halt {
            hint::spin_loop();
        } else if !arm() {
            cpu::idle();
        }
        if interrupts.timer_fired() {
            self.ticks += 1;
            self.timer = false;
        }
        self.ticks < LIMIT
    }

    /// Ends the wait.
    pub(crate) fn end(self, interrupts: &mut Interrupts) {
        if self.timer {
            interrupts.disarm_timer();
        }
    }
}
