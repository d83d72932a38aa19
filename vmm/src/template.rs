//! A machine that was saved, checked against this host once, and ready to be forked.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use offshoot_devices::virtio::mmio::TransportState;
use offshoot_snapshot_format::{Disk, Metadata, RawSnapshot, Sections, SnapshotId, Verify};
use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, GuestAddress};

use crate::bindings::Bindings;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::Host;
use crate::legacy::LegacyState;
use crate::machine::{Machine, Paused};
use crate::memory::{Memory, RamSize};
use crate::models::ModelState;
use crate::requirements;
use crate::snapshot::layout;
use crate::state::{DeviceState, MachineState, PlatformState};

/// A saved machine of which everything is proven that can be proven without running it. It never
/// changes and is shared by all forks.
#[derive(Debug)]
pub struct Template {
    host: Arc<Host>,
    state: MachineState,
    image: File,
    ram: RamSize,
    origin: Option<Origin>,
}

/// Which snapshot a template was loaded from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Its id.
    pub id: SnapshotId,
    /// What was noted of it.
    pub metadata: Metadata,
    /// Its frozen disks: a fork needs a volume made from each.
    pub disks: Vec<Disk>,
}

impl Template {
    /// Checks a snapshot against this host.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] with all that this host lacks; [`ErrorKind::BadState`] when the
    /// snapshot's content is not what any machine would have written, its memory included when
    /// `verify` asks for that.
    pub fn load(host: &Arc<Host>, snapshot: &RawSnapshot, verify: Verify) -> Result<Self> {
        let manifest = snapshot.manifest();
        // First, and by itself: what comes after may not even decode on another kind of host.
        let unmet = manifest.requirements().unmet(&requirements::offers(host));
        refuse(unmet.iter().map(ToString::to_string).collect())?;
        let state = decode(manifest.sections())?;
        // The requirements are a summary that the state need not agree with: the state counts.
        refuse(state.misfits(host)?)?;
        let ram = state.ram()?;
        if *manifest.memory_map().layout() != layout_like(snapshot, ram)? {
            return Err(bad(
                "the memory image does not have the machine's memory layout",
            ));
        }
        check_disks(manifest.disks(), &state)?;
        let image = snapshot
            .memory()
            .prove(verify, |_| ControlFlow::Continue(()))
            .map_err(unreadable)?
            .try_clone()
            .context("the host has no descriptor for the memory image")?;
        Ok(Self {
            host: Arc::clone(host),
            state,
            image,
            ram,
            origin: Some(Origin {
                id: manifest.id(),
                metadata: manifest.metadata().clone(),
                disks: manifest.disks().to_vec(),
            }),
        })
    }

    /// A template of a living machine, kept in memory. The machine is as it was afterwards.
    ///
    /// # Errors
    /// When the host has no memory or descriptor for it.
    pub fn from_paused(paused: &Paused<'_>) -> Result<Self> {
        const WHAT: &str = "cannot copy the machine's memory";
        let state = paused.capture()?;
        let ram = state.ram()?;
        let image: File = rustix::fs::memfd_create("offshoot-template", MemfdFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .context(WHAT)?
            .into();
        image.set_len(ram.bytes()).context(WHAT)?;
        let layout = layout(ram)?;
        let mut buffer = vec![0; usize::try_from(layout.chunk_size()).unwrap_or(usize::MAX)];
        for chunk in layout.chunks() {
            let length = usize::try_from(chunk.length).unwrap_or(usize::MAX);
            let bytes = buffer
                .get_mut(..length)
                .ok_or_else(|| Error::new(ErrorKind::System, WHAT))?;
            paused
                .memory()
                .ram()
                .read_slice(bytes, GuestAddress(chunk.guest_start))
                .map_err(|e| Error::because(ErrorKind::System, WHAT, e))?;
            for (page, offset) in bytes.chunks(4096).zip((chunk.file_offset..).step_by(4096)) {
                if page.iter().any(|byte| *byte != 0) {
                    image.write_all_at(page, offset).context(WHAT)?;
                }
            }
        }
        Ok(Self {
            host: Arc::clone(&paused.core.host),
            state,
            image,
            ram,
            origin: None,
        })
    }

    /// Makes a machine that continues where the template's was saved, with memory of its own that
    /// is shared with all others until it is written to.
    ///
    /// # Errors
    /// When the bindings do not fit, or KVM or the host refuses. Nothing is left behind.
    pub fn fork(&self, bindings: Bindings) -> Result<Machine> {
        let memory = Memory::from_image(self.ram, &self.image, 0)?;
        Machine::build_checked(&self.host, &self.state, memory, bindings)
    }

    /// The machine's state, its memory mapped once, and where it came from: for a process that is
    /// forked into copies.
    pub(crate) fn into_mapped(self) -> Result<(MachineState, Memory, Origin)> {
        let memory = Memory::from_image(self.ram, &self.image, 0)?;
        let origin = self
            .origin
            .ok_or_else(|| bad("the template is of no snapshot"))?;
        Ok((self.state, memory, origin))
    }

    /// The saved state.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// Where it came from, when that was a snapshot.
    #[must_use]
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }
}

fn bad(what: &'static str) -> Error {
    Error::new(ErrorKind::BadState, what)
}

fn unreadable(error: offshoot_snapshot_format::Error) -> Error {
    Error::because(ErrorKind::BadState, "the snapshot cannot be used", error)
}

fn refuse(misfits: Vec<String>) -> Result<()> {
    if misfits.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Mismatch,
        format!("this host cannot run the snapshot: {}", misfits.join("; ")),
    ))
}

/// The layout that RAM of this size has, with the snapshot's own sizes of pages and chunks.
fn layout_like(
    snapshot: &RawSnapshot,
    ram: RamSize,
) -> Result<offshoot_snapshot_format::MemoryLayout> {
    let theirs = snapshot.manifest().memory_map().layout();
    let regions: Vec<_> = layout(ram)?.regions().map(|(region, _)| region).collect();
    offshoot_snapshot_format::MemoryLayout::with_sizes(
        theirs.page_size(),
        theirs.chunk_size(),
        &regions,
    )
    .map_err(unreadable)
}

/// Takes the machine's sections apart; nothing may be left over.
pub(crate) fn decode(mut sections: Sections<'_>) -> Result<MachineState> {
    let platform: PlatformState = sections.take(0).map_err(unreadable)?;
    let chips = sections.take(0).map_err(unreadable)?;
    let serial = platform
        .serial
        .then(|| sections.take(0).map_err(unreadable));
    let legacy = LegacyState {
        serial: serial.transpose()?,
        i8042: sections.take(0).map_err(unreadable)?,
    };
    let generation = sections.take(0).map_err(unreadable)?;
    let vcpus = (0..u32::from(platform.vcpus))
        .map(|instance| sections.take(instance).map_err(unreadable))
        .collect::<Result<_>>()?;
    let mut devices = Vec::new();
    for (instance, _) in (0..).zip(&platform.devices) {
        let transport: TransportState = sections.take(instance).map_err(unreadable)?;
        devices.push(DeviceState {
            model: ModelState::take(&mut sections, instance)?,
            transport,
        });
    }
    sections.finish().map_err(unreadable)?;
    Ok(MachineState {
        platform,
        vcpus,
        chips,
        devices,
        legacy,
        generation,
    })
}

/// Every drive has its disk, and every disk its drive.
fn check_disks(disks: &[Disk], state: &MachineState) -> Result<()> {
    let mut drives = 0;
    for (id, device) in state.platform.devices.iter().zip(&state.devices) {
        let ModelState::Drive(drive) = &device.model else {
            continue;
        };
        drives += 1;
        let disk = disks.iter().find(|disk| disk.id == *id);
        let fits = disk.is_some_and(|disk| {
            disk.read_only == drive.read_only
                && Some(disk.size) == drive.capacity_sectors.checked_mul(512)
        });
        if !fits {
            return Err(bad("the snapshot's disks are not those of its drives"));
        }
    }
    if drives == disks.len() {
        Ok(())
    } else {
        Err(bad("the snapshot has disks without drives"))
    }
}
