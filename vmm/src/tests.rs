//! Machines on KVM, running a few hand-assembled instructions.

mod bare;
mod golden;
mod guest;
mod machine;
mod snapshot;
