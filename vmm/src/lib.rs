//! The machine.

pub mod acpi;
pub mod arch;
pub mod boot;
