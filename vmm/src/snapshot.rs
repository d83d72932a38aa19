//! From a paused machine to a snapshot on disk.
//!
//! | step | why here |
//! |---|---|
//! | state captured | it must be of the same moment as disks and memory; the pause sees to that |
//! | disks frozen, not yet durable | so that the pause does not wait for a disk |
//! | memory streamed | by several threads, digests included |
//! | layers made durable | a snapshot may only name what survives a power cut |
//! | snapshot published | by one rename: it exists whole or not at all |
//!
//! A step that fails undoes what came before it: frozen layers are deleted, the half-made
//! directory goes with its writer, and the machine is as it was.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use offshoot_snapshot_format::{
    Disk, MemoryLayout, MemoryWriter, Metadata, Region, Section, SnapshotContent, SnapshotId,
    SnapshotWriter, Timestamp, WrittenMemory,
};
use offshoot_storage::{Durability, LayerName, VolumeName};
use vm_memory::{Bytes, GuestAddress};

use crate::bindings::DriveSource;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::machine::Paused;
use crate::memory::{Memory, RamSize, ram_parts};
use crate::models::ModelState;
use crate::requirements;
use crate::state::MachineState;
use crate::sync::lock;

/// Threads that write memory, at most: more do not help once the disk is the bottleneck.
const MAX_WRITERS: usize = 4;

/// What a snapshot is to be called.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Its id.
    pub id: SnapshotId,
    /// What is noted of it besides.
    pub metadata: Metadata,
}

impl SaveOptions {
    /// A fresh id, and nothing noted but the producer.
    ///
    /// # Errors
    /// When the host has no random bytes.
    pub fn new() -> Result<Self> {
        Ok(Self {
            id: SnapshotId::generate().context("the host has no random bytes for an id")?,
            metadata: Metadata {
                producer: concat!("offshoot ", env!("CARGO_PKG_VERSION")).into(),
                ..Metadata::default()
            },
        })
    }
}

/// A snapshot that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Its directory.
    pub path: PathBuf,
    /// Its id.
    pub id: SnapshotId,
    /// The layers its drives were frozen to, by the drive's id.
    pub layers: Vec<(String, LayerName)>,
}

impl Paused<'_> {
    /// Writes the machine into a snapshot in the directory `store`, and freezes its drives on
    /// their backends at the same point. The machine stays paused.
    ///
    /// # Errors
    /// Whatever fails, there is then no snapshot and no new layer, and the machine can go on.
    pub fn save(&self, store: &Path, options: SaveOptions) -> Result<Saved> {
        let state = self.capture()?;
        let writer = SnapshotWriter::create(store, options.id).map_err(failed)?;
        let frozen = self.freeze(&options.id.to_string())?;
        let unpublished = Unpublished {
            writer,
            state,
            frozen,
            created: Timestamp::now(),
            options,
        };
        unpublished.publish(self.memory(), &|_| ())
    }

    /// Freezes every drive, to a layer named after `name` and the drive.
    pub(crate) fn freeze(&self, name: &str) -> Result<Frozen> {
        let mut frozen = Frozen::default();
        for (drive, binding) in &self.core.bindings.drives {
            let source = binding.source.clone().ok_or_else(|| {
                Error::new(
                    ErrorKind::Bindings,
                    format!("drive {drive} was bound without its backend and cannot be frozen"),
                )
            })?;
            let layer = match &source.layer {
                Some(layer) => layer.clone(),
                None => {
                    let layer = LayerName::new(format!("{name}-{drive}")).map_err(|e| {
                        let what = format!("drive {drive} cannot be frozen under its name");
                        Error::because(ErrorKind::Config, what, e)
                    })?;
                    let volume: &VolumeName = binding.host.volume.name();
                    source
                        .backend
                        .freeze(volume, &layer, Durability::Deferred)
                        .map_err(|e| storage(format!("cannot freeze drive {drive}"), e))?;
                    layer
                }
            };
            frozen.drives.push(FrozenDrive {
                id: drive.clone(),
                source,
                layer,
            });
        }
        Ok(frozen)
    }
}

/// A machine that was captured, with its drives frozen, and of which the memory is to be written.
/// Dropped without having been published, it takes the layers and the half-made directory away.
#[derive(Debug)]
pub(crate) struct Unpublished {
    pub(crate) writer: SnapshotWriter,
    pub(crate) state: MachineState,
    pub(crate) frozen: Frozen,
    pub(crate) created: Timestamp,
    pub(crate) options: SaveOptions,
}

impl Unpublished {
    /// Starts a snapshot in the directory `store`.
    pub(crate) fn begin(
        store: &Path,
        options: SaveOptions,
        state: MachineState,
        frozen: Frozen,
        created: Timestamp,
    ) -> Result<Self> {
        Ok(Self {
            writer: SnapshotWriter::create(store, options.id).map_err(failed)?,
            state,
            frozen,
            created,
            options,
        })
    }

    /// Writes `memory`, which does not change meanwhile, makes the layers durable and publishes.
    /// `progress` is told of the bytes that are done, by several threads.
    pub(crate) fn publish(
        mut self,
        memory: &Memory,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Saved> {
        let layout = layout(self.state.ram()?)?;
        let image = self.writer.memory_image(layout).map_err(failed)?;
        let memory = write_memory(memory, image, progress)?;
        self.frozen.sync()?;
        let content = SnapshotContent {
            created: self.created,
            requirements: requirements::of(&self.state),
            disks: self.frozen.disks(&self.state)?,
            metadata: self.options.metadata,
            sections: sections(&self.state)?,
        };
        let path = self.writer.publish(memory, content).map_err(failed)?;
        Ok(Saved {
            path,
            id: self.options.id,
            layers: self.frozen.keep(),
        })
    }
}

/// Drives that were frozen; unless they are kept, their new layers are deleted again.
#[derive(Debug, Default)]
pub(crate) struct Frozen {
    pub(crate) drives: Vec<FrozenDrive>,
    kept: bool,
}

#[derive(Debug)]
pub(crate) struct FrozenDrive {
    pub(crate) id: String,
    pub(crate) source: DriveSource,
    pub(crate) layer: LayerName,
}

impl Frozen {
    /// Drives that another process froze, with their layers opened here.
    pub(crate) fn adopt(drives: Vec<FrozenDrive>) -> Self {
        Self {
            drives,
            kept: false,
        }
    }

    fn sync(&self) -> Result<()> {
        for drive in &self.drives {
            drive.source.backend.sync_layer(&drive.layer).map_err(|e| {
                storage(format!("cannot make drive {}'s layer durable", drive.id), e)
            })?;
        }
        Ok(())
    }

    fn disks(&self, state: &MachineState) -> Result<Vec<Disk>> {
        let device = |id: &String| {
            let place = state.platform.devices.iter().position(|name| name == id)?;
            match &state.devices.get(place)?.model {
                ModelState::Drive(drive) => Some(drive),
                _ => None,
            }
        };
        self.drives
            .iter()
            .map(|drive| {
                let blk = device(&drive.id)
                    .ok_or_else(|| Error::new(ErrorKind::Bindings, "a drive is not a device"))?;
                Ok(Disk {
                    id: drive.id.clone(),
                    backend: drive.source.backend.name().into(),
                    layer: drive.layer.to_string(),
                    size: blk.capacity_sectors.saturating_mul(512),
                    read_only: blk.read_only,
                })
            })
            .collect()
    }

    pub(crate) fn keep(mut self) -> Vec<(String, LayerName)> {
        self.kept = true;
        let drives = std::mem::take(&mut self.drives);
        drives.into_iter().map(|d| (d.id, d.layer)).collect()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for drive in self.drives.iter().filter(|d| d.source.layer.is_none()) {
            if let Err(error) = drive.source.backend.delete_layer(&drive.layer) {
                tracing::error!(
                    layer = %drive.layer,
                    error = &error as &dyn std::error::Error,
                    "a layer of a failed snapshot stays behind"
                );
            }
        }
    }
}

pub(crate) fn storage(context: String, error: offshoot_storage::Error) -> Error {
    let kind = match error.kind() {
        offshoot_storage::ErrorKind::StorageFull => ErrorKind::StorageFull,
        _ => ErrorKind::Storage,
    };
    Error::because(kind, context, error)
}

fn failed(error: offshoot_snapshot_format::Error) -> Error {
    let kind = match error.kind() {
        offshoot_snapshot_format::ErrorKind::StorageFull => ErrorKind::StorageFull,
        _ => ErrorKind::System,
    };
    Error::because(kind, "cannot write the snapshot", error)
}

/// RAM of this size as the memory image has it.
pub(crate) fn layout(ram: RamSize) -> Result<MemoryLayout> {
    let regions: Vec<Region> = ram_parts(ram)
        .iter()
        .map(|part| Region {
            guest_start: part.guest.0,
            length: part.len,
        })
        .collect();
    MemoryLayout::new(&regions).map_err(failed)
}

/// The machine's state as sections.
pub(crate) fn sections(state: &MachineState) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    sections.push(Section::required(0, &state.platform).map_err(failed)?);
    sections.push(Section::required(0, &state.chips).map_err(failed)?);
    if let Some(serial) = &state.legacy.serial {
        sections.push(Section::required(0, serial).map_err(failed)?);
    }
    sections.push(Section::required(0, &state.legacy.i8042).map_err(failed)?);
    sections.push(Section::required(0, &state.generation).map_err(failed)?);
    for (instance, vcpu) in (0..).zip(&state.vcpus) {
        sections.push(Section::required(instance, vcpu).map_err(failed)?);
    }
    for (instance, device) in (0..).zip(&state.devices) {
        sections.push(Section::required(instance, &device.transport).map_err(failed)?);
        sections.push(device.model.section(instance).map_err(failed)?);
    }
    Ok(sections)
}

/// Streams all of a memory that nobody changes meanwhile.
fn write_memory(
    memory: &Memory,
    image: MemoryWriter,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<WrittenMemory> {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let failure = std::sync::Mutex::new(None);
    let work = || {
        let chunk_size = usize::try_from(image.layout().chunk_size()).unwrap_or(usize::MAX);
        let mut buffer = vec![0; chunk_size];
        while !stop.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = image.layout().chunk(index) else {
                break;
            };
            let length = usize::try_from(chunk.length).unwrap_or(usize::MAX);
            let written = match buffer.get_mut(..length) {
                Some(bytes) => memory
                    .ram()
                    .read_slice(bytes, GuestAddress(chunk.guest_start))
                    .map_err(|e| Error::because(ErrorKind::System, "cannot read guest memory", e))
                    .and_then(|()| image.write_chunk(index, bytes).map_err(failed)),
                None => Err(Error::new(
                    ErrorKind::System,
                    "a chunk is larger than chunks are",
                )),
            };
            progress(chunk.length);
            if let Err(error) = written {
                stop.store(true, Ordering::Relaxed);
                lock(&failure).get_or_insert(error);
            }
        }
    };
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        // This thread works, too; when no other can be had it does it all.
        for number in 1..cores.min(MAX_WRITERS) {
            let name = format!("snapshot{number}");
            if thread::Builder::new()
                .name(name)
                .spawn_scoped(scope, work)
                .is_err()
            {
                break;
            }
        }
        work();
    });
    match lock(&failure).take() {
        Some(error) => Err(error),
        None => image.finish().map_err(failed),
    }
}
