//! A machine's whole state but its memory: plain data, owned, with nothing of the host in it.

use offshoot_devices::virtio::mmio::TransportState;
use offshoot_devices::vmgenid::VmGenIdState;
use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};

use crate::arch::{VcpuState, VmState};
use crate::config::{self, MAX_DEVICES};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::Host;
use crate::legacy::LegacyState;
use crate::memory::RamSize;
use crate::models::ModelState;

/// What the machine is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformState {
    /// How many vCPUs.
    pub vcpus: u8,
    /// RAM in bytes.
    pub ram: u64,
    /// The named CPU baseline that the guest was given.
    pub cpu_baseline: String,
    /// Whether it has a serial port.
    pub serial: bool,
    /// The ids of its virtio devices, by their place.
    pub devices: Vec<String>,
}

impl Payload for PlatformState {
    const KIND: SectionKind = SectionKind(*b"PLAT");
    const VERSION: u16 = 1;
}

/// A virtio device.
#[derive(Debug, Clone)]
pub struct DeviceState {
    /// Its register window.
    pub transport: TransportState,
    /// The device behind it.
    pub model: ModelState,
}

/// A captured machine. Untrusted when it comes from a snapshot: [`MachineState::check`] comes
/// before anything is built from it.
#[derive(Debug, Clone)]
pub struct MachineState {
    /// What the machine is made of.
    pub platform: PlatformState,
    /// Its vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// Its chips and clock.
    pub chips: VmState,
    /// Its virtio devices, in the order of `platform.devices`.
    pub devices: Vec<DeviceState>,
    /// Its devices at I/O ports.
    pub legacy: LegacyState,
    /// Where its generation id is.
    pub generation: VmGenIdState,
}

impl MachineState {
    /// Whether this host can run it, as far as that can be told without building it.
    ///
    /// # Errors
    /// [`ErrorKind::BadState`] when no machine can be in this state, [`ErrorKind::Mismatch`] with
    /// everything that this host lacks.
    pub fn check(&self, host: &Host) -> Result<()> {
        let misfits = self.misfits(host)?;
        if misfits.is_empty() {
            Ok(())
        } else {
            Err(Error::new(
                ErrorKind::Mismatch,
                format!("this host cannot run the machine: {}", misfits.join("; ")),
            ))
        }
    }

    /// What this host lacks, in words.
    pub(crate) fn misfits(&self, host: &Host) -> Result<Vec<String>> {
        let platform = &self.platform;
        let bad = |e| Error::because(ErrorKind::BadState, "the saved machine cannot be", e);
        self.ram()?;
        config::check_ids(platform.devices.iter().map(String::as_str)).map_err(bad)?;
        if self.vcpus.len() != usize::from(platform.vcpus) || self.vcpus.is_empty() {
            return Err(Error::new(
                ErrorKind::BadState,
                "the saved machine does not have the vCPUs that it says it has",
            ));
        }
        if self.devices.len() != platform.devices.len() || self.devices.len() > MAX_DEVICES {
            return Err(Error::new(
                ErrorKind::BadState,
                "the saved machine does not have the devices that it says it has",
            ));
        }
        if self.legacy.serial.is_some() != platform.serial {
            return Err(Error::new(
                ErrorKind::BadState,
                "the saved machine does not have the serial port that it says it has",
            ));
        }
        let mut misfits = Vec::new();
        if let Err(error) = config::check_vcpus(platform.vcpus, host) {
            misfits.push(error.to_string());
        }
        for vcpu in &self.vcpus {
            for misfit in vcpu.check(host)? {
                // The vCPUs of a machine mostly lack the same.
                if !misfits.contains(&misfit) {
                    misfits.push(misfit);
                }
            }
        }
        Ok(misfits)
    }

    /// How much RAM it has.
    ///
    /// # Errors
    /// When no machine has so much.
    pub fn ram(&self) -> Result<RamSize> {
        RamSize::from_bytes(self.platform.ram)
            .map_err(|e| Error::because(ErrorKind::BadState, "the saved machine cannot be", e))
    }
}
