//! Machines on KVM, running a few hand-assembled instructions.

mod bare;
mod guest;
mod machine;
mod snapshot;
