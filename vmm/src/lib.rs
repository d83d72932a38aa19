//! The machine.

pub mod acpi;
pub mod boot;
