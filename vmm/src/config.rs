//! What a machine is made of, when it is booted for the first time.

use offshoot_devices::virtio::mmio::WINDOW_SIZE;

use crate::acpi;
use crate::arch::cpuid::CpuProfile;
use crate::boot::{BootSource, MmioWindow, PlatformInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::Host;
use crate::memory::RamSize;
use crate::models::ModelConfig;

/// Where the first virtio register window lies.
const WINDOWS: u32 = 0xd000_0000;
/// The most virtio devices: one interrupt each.
pub const MAX_DEVICES: usize = (acpi::VIRTIO_GSI_LAST - acpi::VIRTIO_GSI_FIRST + 1) as usize;
/// The longest id of a device.
const MAX_ID: usize = 64;

/// A virtio device of a machine.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// Names the device within its machine: 1 to 64 of `a-z A-Z 0-9 . _ -`. Bindings refer to it.
    pub id: String,
    /// What it is.
    pub model: ModelConfig,
}

/// A machine that is to be booted.
#[derive(Debug)]
pub struct MachineConfig {
    /// How many vCPUs, at least one.
    pub vcpus: u8,
    /// How much RAM.
    pub ram: RamSize,
    /// Which processor features the guest sees.
    pub cpu: CpuProfile,
    /// What it boots.
    pub boot: BootSource,
    /// Its virtio devices, in the order in which the guest finds them; at most [`MAX_DEVICES`].
    pub devices: Vec<DeviceConfig>,
    /// Whether it has a serial port (COM1).
    pub serial: bool,
}

impl MachineConfig {
    /// One vCPU, a serial port and no other device.
    #[must_use]
    pub fn new(ram: RamSize, boot: BootSource) -> Self {
        Self {
            vcpus: 1,
            ram,
            cpu: CpuProfile::default(),
            boot,
            devices: Vec::new(),
            serial: true,
        }
    }

    /// Adds a device.
    #[must_use]
    pub fn with_device(mut self, id: impl Into<String>, model: ModelConfig) -> Self {
        self.devices.push(DeviceConfig {
            id: id.into(),
            model,
        });
        self
    }

    pub(crate) fn check(&self, host: &Host) -> Result<()> {
        check_vcpus(self.vcpus, host)?;
        check_ids(self.devices.iter().map(|d| d.id.as_str()))
    }
}

/// Whether a machine can have so many vCPUs here.
pub(crate) fn check_vcpus(vcpus: u8, host: &Host) -> Result<()> {
    // APIC ids are 8 bits wide, and the last one means "all".
    let most = host.max_vcpus().min(254);
    if (1..=most).contains(&usize::from(vcpus)) {
        Ok(())
    } else {
        Err(Error::new(
            ErrorKind::Config,
            format!("{vcpus} vCPUs: a machine has 1 to {most} on this host"),
        ))
    }
}

/// Whether devices can have these ids.
pub(crate) fn check_ids<'a>(ids: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen: Vec<&str> = Vec::new();
    for id in ids {
        let valid = (1..=MAX_ID).contains(&id.len())
            && id.starts_with(|c: char| c.is_ascii_alphanumeric())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !valid {
            return Err(Error::new(
                ErrorKind::Config,
                format!("{id:?} cannot name a device: 1 to {MAX_ID} of a-z A-Z 0-9 . _ -"),
            ));
        }
        if seen.contains(&id) {
            return Err(Error::new(
                ErrorKind::Config,
                format!("two devices are named {id}"),
            ));
        }
        seen.push(id);
    }
    if seen.len() > MAX_DEVICES {
        return Err(Error::new(
            ErrorKind::Config,
            format!(
                "{} devices: a machine has at most {MAX_DEVICES}",
                seen.len()
            ),
        ));
    }
    Ok(())
}

/// The register windows and interrupts of the first `count` virtio devices.
pub(crate) fn windows(count: usize) -> impl Iterator<Item = MmioWindow> {
    let window = u32::try_from(WINDOW_SIZE).unwrap_or(u32::MAX);
    (0..)
        .take(count.min(MAX_DEVICES))
        .map(move |index| MmioWindow {
            base: WINDOWS + index * window,
            gsi: acpi::VIRTIO_GSI_FIRST + index,
        })
}

/// What the guest is told of such a machine.
pub(crate) fn platform_info(vcpus: u8, devices: usize, serial: bool) -> PlatformInfo {
    PlatformInfo {
        vcpus,
        virtio: windows(devices).collect(),
        serial,
    }
}
