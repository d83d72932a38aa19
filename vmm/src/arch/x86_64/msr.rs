//! Model-specific registers: which are saved, and in what order they are set.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorKind, Result};

/// `IA32_TIME_STAMP_COUNTER`.
pub const IA32_TSC: u32 = 0x10;
/// `IA32_TSC_ADJUST`.
pub const IA32_TSC_ADJUST: u32 = 0x3b;
/// `IA32_MTRR_DEF_TYPE`.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// `IA32_TSC_DEADLINE`.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// MTRRs on, default type write-back: what a guest without firmware needs so that its RAM is
/// cached.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// MSRs that KVM keeps and does not list: the memory type ranges (variable, fixed, default).
const UNLISTED: &[u32] = &[
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    IA32_MTRR_DEF_TYPE,
];

/// Every MSR that a host which lists `listed` may be able to save.
pub(crate) fn candidates(listed: &[u32]) -> Vec<u32> {
    let mut all = listed.to_vec();
    all.extend(UNLISTED);
    all.sort_unstable();
    all.dedup();
    all
}

/// The most MSRs that a saved vCPU may have: more than any host lists.
pub const MAX_MSRS: usize = 1024;
/// As many as one call takes (the kernel's own limit is 256).
const BATCH: usize = 200;

/// One MSR and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// What it holds.
    pub value: u64,
}

/// The MSRs of the host's list that can be read from this fresh vCPU and set again to what was
/// read. A processor or its hypervisor may list some that cannot be; a snapshot that held them
/// could not be restored anywhere.
///
/// The vCPU must not have run, and its CPUID must be set.
pub(crate) fn restorable(vcpu: &VcpuFd, listed: &[u32]) -> Result<Vec<u32>> {
    let readable = read(vcpu, listed)?;
    let mut keep = Vec::with_capacity(readable.len());
    for msr in readable {
        // Setting a TSC back to what it was moves it relative to the other vCPUs'; it can be set.
        let settable = msr.index == IA32_TSC || set_one_by_one(vcpu, &[msr])?.is_none();
        if settable {
            keep.push(msr.index);
        } else {
            tracing::debug!(
                msr = format_args!("{:#x}", msr.index),
                "this host lists an MSR that cannot be set; it is not saved"
            );
        }
    }
    Ok(keep)
}

/// Reads these MSRs, leaving out those that cannot be read.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    const WHAT: &str = "cannot read a vCPU's MSRs";
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<_> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = wrap(&entries)?;
        // The call stops at the first that it cannot read and says how many it did.
        let count = vcpu.get_msrs(&mut msrs).context(WHAT)?;
        found.extend(msrs.as_slice().iter().take(count).map(|entry| Msr {
            index: entry.index,
            value: entry.data,
        }));
        let skip = if count < batch.len() {
            count + 1
        } else {
            count
        };
        rest = &rest[skip..];
    }
    Ok(found)
}

/// Sets MSRs in the order given.
///
/// # Errors
/// [`ErrorKind::Mismatch`] naming the first that this host refuses.
pub(crate) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    match set_one_by_one(vcpu, msrs)? {
        None => Ok(()),
        Some(refused) => Err(Error::new(
            ErrorKind::Mismatch,
            format!(
                "this host's KVM refuses the saved value {:#x} of MSR {:#x}",
                refused.value, refused.index
            ),
        )),
    }
}

/// Sets MSRs until one is refused, and returns that one.
fn set_one_by_one(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<Option<Msr>> {
    for batch in msrs.chunks(BATCH) {
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let count = vcpu
            .set_msrs(&wrap(&entries)?)
            .context("cannot set a vCPU's MSRs")?;
        if let Some(refused) = batch.get(count) {
            return Ok(Some(*refused));
        }
    }
    Ok(None)
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries)
        .map_err(|_| Error::new(ErrorKind::BadState, "there are too many MSRs"))
}

/// What a guest that starts without firmware finds set.
pub(crate) fn set_for_boot(vcpu: &VcpuFd) -> Result<()> {
    write(
        vcpu,
        &[Msr {
            index: IA32_MTRR_DEF_TYPE,
            value: MTRR_ON_WRITE_BACK,
        }],
    )
}
