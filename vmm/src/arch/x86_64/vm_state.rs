//! The state of the VM's own chips and clock.
//!
//! # Time in a copy
//! The guest's clocks continue where they were saved: kvmclock and every vCPU's TSC are set to
//! the saved values, whatever time has passed since. `CLOCK_MONOTONIC` in the guest therefore
//! neither jumps nor sees the time between snapshot and restore, and no guest timer fires early
//! or in a storm. The wall clock is then late by that time; whoever cares for it (the agent in a
//! Linux guest) sets it anew. During a pause of a living machine time goes on.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The chips of a saved VM that belong to no vCPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// kvmclock, in nanoseconds since the guest's boot.
    pub clock_ns: u64,
    /// The interval timer.
    pub pit: kvm_pit_state2,
    /// The two PICs and the I/O APIC, in this order.
    pub chips: [kvm_irqchip; 3],
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmState")
            .field("clock_ns", &self.clock_ns)
            .finish_non_exhaustive()
    }
}

impl Payload for VmState {
    const KIND: SectionKind = SectionKind(*b"CHIP");
    const VERSION: u16 = 1;
}

impl VmState {
    /// Reads the chips of a VM whose vCPUs are out and whose devices raise no interrupt.
    pub(crate) fn save(vm: &VmFd) -> Result<Self> {
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, chip_id) in chips.iter_mut().zip(CHIPS) {
            chip.chip_id = chip_id;
            vm.get_irqchip(chip)
                .context("cannot read an interrupt controller's state")?;
        }
        Ok(Self {
            clock_ns: vm
                .get_clock()
                .context("cannot read the guest's clock")?
                .clock,
            pit: vm.get_pit2().context("cannot read the timer's state")?,
            chips,
        })
    }

    /// Sets the chips of a VM whose vCPUs have been set.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<()> {
        for (chip, chip_id) in self.chips.iter().zip(CHIPS) {
            // The number says which chip the kernel writes to: ours, not the state's.
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip)
                .context("KVM refuses an interrupt controller's saved state")?;
        }
        vm.set_pit2(&self.pit)
            .context("KVM refuses the timer's saved state")?;
        vm.set_clock(&kvm_clock_data {
            clock: self.clock_ns,
            ..Default::default()
        })
        .context("KVM refuses the guest's saved clock")
    }
}
