//! What depends on the processor: a sibling module for each architecture with the same names.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "Offshoot runs on x86-64 hosts only so far; a sibling of arch/x86_64 is the place to add another"
);
