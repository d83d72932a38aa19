use super::*;
use crate::{DeviceModel, Tsc};

fn word(leaf: u32, bits: u32) -> CpuidWord {
    CpuidWord {
        leaf,
        subleaf: 0,
        register: CpuidRegister::Ecx,
        bits,
    }
}

fn requirements() -> Requirements {
    Requirements {
        arch: Arch::X86_64,
        cpu_vendor: "GenuineIntel".into(),
        cpu_baseline: "x86-64-v2".into(),
        cpuid: vec![word(1, 0b1011), word(7, 0b1)],
        xsave_size: 832,
        msrs: vec![0x10, 0x174],
        kvm_capabilities: vec![KvmCapability {
            number: 208,
            name: "KVM_CAP_XSAVE2".into(),
            minimum: 832,
        }],
        tsc: Some(Tsc {
            khz: 2_000_000,
            exact: true,
        }),
        devices: vec![DeviceModel {
            model: "virtio-blk".into(),
            id: "vda".into(),
        }],
    }
}

fn host() -> HostOffers {
    HostOffers {
        arch: Arch::X86_64,
        cpu_vendor: "GenuineIntel".into(),
        cpuid: vec![word(1, 0b1111), word(7, 0b11)],
        xsave_size: 2696,
        msrs: vec![0x174, 0x10, 0x11],
        kvm_capabilities: vec![(208, 2696)],
        tsc_khz: Some(2_000_400),
        tsc_scaling: false,
        device_models: vec!["virtio-blk".into(), "virtio-net".into()],
    }
}

#[test]
fn a_host_that_offers_more_will_do() {
    assert_eq!(requirements().unmet(&host()), []);
}

#[test]
fn every_mismatch_is_told_at_once() {
    let poor = HostOffers {
        arch: Arch::Aarch64,
        cpu_vendor: "AuthenticAMD".into(),
        cpuid: vec![word(1, 0b0110)],
        xsave_size: 576,
        msrs: vec![0x10],
        kvm_capabilities: vec![],
        tsc_khz: Some(2_100_000),
        tsc_scaling: false,
        device_models: vec![],
    };
    let told: Vec<_> = requirements()
        .unmet(&poor)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        told,
        [
            "the guest is x86-64, the host is aarch64",
            "the guest runs on CPUs of \"GenuineIntel\", the host's is of \"AuthenticAMD\"",
            "CPU features are missing: CPUID 0x1.0x0 ECX, bits 0x00000009",
            "CPU features are missing: CPUID 0x7.0x0 ECX, bits 0x00000001",
            "the XSAVE area has 832 bytes, the host holds 576",
            "KVM does not set MSR 0x174",
            "KVM capability KVM_CAP_XSAVE2 (208) must be at least 832, it is 0",
            "the guest counts on a TSC of 2000000 kHz, the host runs at 2100000 kHz and does not scale",
            "device vda is a virtio-blk, which this build does not have",
        ]
    );
}

#[test]
fn scaling_or_a_tolerant_guest_makes_another_tsc_do() {
    let mut other = host();
    other.tsc_khz = Some(3_000_000);
    assert_eq!(requirements().unmet(&other).len(), 1);
    other.tsc_khz = None;
    assert_eq!(requirements().unmet(&other).len(), 1);
    other.tsc_scaling = true;
    assert_eq!(requirements().unmet(&other), []);

    other.tsc_scaling = false;
    let mut tolerant = requirements();
    tolerant.tsc = Some(Tsc {
        khz: 2_000_000,
        exact: false,
    });
    assert_eq!(tolerant.unmet(&other), []);
}
