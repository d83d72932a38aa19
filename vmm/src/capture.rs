//! From a paused machine to plain data.

use crate::arch::{VcpuState, VmState};
use crate::error::Result;
use crate::machine::Paused;
use crate::slots::Slot;
use crate::state::MachineState;

impl Paused<'_> {
    /// The machine's whole state but its memory. It can be taken as often as one likes.
    ///
    /// # Errors
    /// When KVM refuses to tell.
    pub fn capture(&self) -> Result<MachineState> {
        let core = &*self.core;
        let vcpus = core.vcpus.iter().zip(&core.cpuids).map(|(vcpu, cpuid)| {
            vcpu.with(|fd| VcpuState::save(&core.host, fd, cpuid, &core.msr_indices))
        });
        Ok(MachineState {
            platform: core.platform.clone(),
            vcpus: vcpus.collect::<Result<_>>()?,
            chips: VmState::save(core.vm.fd())?,
            devices: core.slots.iter().map(Slot::save).collect::<Result<_>>()?,
            legacy: core.legacy.save(),
            generation: core.generation.id.save(),
        })
    }
}
