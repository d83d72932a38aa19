//! Kernels boot, and how they end is told.

use crate::command::{run, run_for};
use crate::{BZIMAGE, Failure};

/// The kernel boots with so many processors to its first program, which switches it off.
pub(crate) fn boots(kernel: &str, cpus: u8) -> Result<(), Failure> {
    run(kernel, "poweroff", &["--cpus", &cpus.to_string()])?
        .ended(0, "")?
        .printed(&format!(" {cpus} cpus, "))?;
    Ok(())
}

pub(crate) fn ends_are_told_apart() -> Result<(), Failure> {
    // That switching off ends with 0 is what every other scenario rests on.
    run(BZIMAGE, "reboot", &[])?.ended(10, "reset")?;
    run(BZIMAGE, "panic", &[])?
        .ended(11, "panicked")?
        .printed("Kernel panic")?;
    Ok(())
}

pub(crate) fn a_guest_that_does_not_end_is_ended() -> Result<(), Failure> {
    run_for(8, BZIMAGE, "hang", &[])?
        .ended(124, "8 seconds")?
        .printed("lab: Linux")?;
    Ok(())
}
