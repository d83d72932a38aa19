//! What a machine needs of a host, and what this host offers.

use kvm_bindings::kvm_cpuid_entry2;
use offshoot_snapshot_format::{Arch, DeviceModel, HostOffers, KvmCapability, Requirements, Tsc};

use crate::arch::cpuid;
use crate::kvm::Host;
use crate::models::MODEL_NAMES;
use crate::state::MachineState;

fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let bytes = cpuid::vendor(entries).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .chars()
        .filter(|c| !c.is_control())
        .collect()
}

/// What a host must offer to run this machine.
pub(crate) fn of(state: &MachineState) -> Requirements {
    let first = state.vcpus.first();
    let entries = first.map_or(&[][..], |vcpu| &vcpu.cpuid);
    let mut msrs: Vec<u32> = first.map_or_else(Vec::new, |vcpu| vcpu.msr_indices());
    msrs.sort_unstable();
    Requirements {
        arch: Arch::X86_64,
        cpu_vendor: vendor(entries),
        cpu_baseline: state.platform.cpu_baseline.clone(),
        cpuid: cpuid::features(entries),
        xsave_size: first.map_or(0, |vcpu| {
            u32::try_from(vcpu.xsave.len()).unwrap_or(u32::MAX)
        }),
        msrs,
        kvm_capabilities: Host::needed_capabilities()
            .map(|(number, name)| KvmCapability {
                number,
                name,
                minimum: 1,
            })
            .collect(),
        // Without a frequency that KVM tells, nobody has told it to the guest either.
        tsc: first.filter(|vcpu| vcpu.tsc_khz != 0).map(|vcpu| Tsc {
            khz: vcpu.tsc_khz,
            exact: true,
        }),
        devices: state
            .platform
            .devices
            .iter()
            .zip(&state.devices)
            .map(|(id, device)| DeviceModel {
                model: device.model.name().into(),
                id: id.clone(),
            })
            .collect(),
    }
}

/// What this host and this build offer.
pub(crate) fn offers(host: &Host) -> HostOffers {
    let supported = host.supported_cpuid().as_slice();
    HostOffers {
        arch: Arch::X86_64,
        cpu_vendor: vendor(supported),
        cpuid: cpuid::features(supported),
        xsave_size: u32::try_from(host.xsave_size()).unwrap_or(u32::MAX),
        msrs: host.msr_indices().to_vec(),
        kvm_capabilities: Host::needed_capabilities()
            .map(|(number, _)| (number, host.capability(number)))
            .collect(),
        tsc_khz: host.tsc_khz(),
        tsc_scaling: host.tsc_control(),
        device_models: MODEL_NAMES.iter().map(|name| (*name).into()).collect(),
    }
}
