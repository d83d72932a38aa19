//! Readable deaths.

use core::panic::PanicInfo;

use crate::cpu;
use crate::serial::say;
use offshoot_protocol::{FAULT, PANIC};

/// boot.s comes here, in ring 3 on a stack of its own, after an exception.
pub(crate) extern "sysv64" fn report(vector: u64, code: u64, rip: u64, cr2: u64, rsp: u64) -> ! {
    say!("\n{FAULT} vector={vector} code={code:#x} rip={rip:#x} cr2={cr2:#x} rsp={rsp:#x}");
    cpu::stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(place) => say!(
            "\n{PANIC} {}:{} {}",
            place.file(),
            place.line(),
            info.message()
        ),
        None => say!("\n{PANIC} {}", info.message()),
    }
    cpu::stop()
}
