//! x86-64: the state of a vCPU and of the VM's own chips, and how they start.

pub mod cpuid;
