//! The child that writes a snapshot while its parent goes on.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use offshoot_snapshot_format::{Metadata, SnapshotId, Timestamp};
use offshoot_storage::LayerName;

use super::Backends;
use super::channel::Channel;
use super::message::{Published, Told, WireError};
use super::plan::FrozenLayer;
use crate::bindings::DriveSource;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::snapshot::{Frozen, FrozenDrive, SaveOptions, Unpublished};
use crate::state::MachineState;

/// How often progress is told: each time so many bytes are done.
const STEP: u64 = 64 << 20;
/// How long the embedder may take to make room for a message; progress is not waited for.
const SEND: Duration = Duration::from_secs(10);

/// Which snapshot is to be written.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) store: PathBuf,
    pub(super) id: SnapshotId,
    pub(super) metadata: Metadata,
}

/// What a forked writer works from.
pub(super) struct WriterSeed {
    pub(super) channel: Channel,
    pub(super) order: Order,
    pub(super) state: MachineState,
    pub(super) memory: Arc<Memory>,
    pub(super) layers: Vec<FrozenLayer>,
}

/// Writes, tells what came of it, and returns the exit status.
pub(super) fn run(seed: WriterSeed, backends: &mut Backends) -> i32 {
    let written = write(
        &seed.channel,
        seed.order,
        seed.state,
        &seed.memory,
        &seed.layers,
        backends,
    );
    // The mapping is the parent's object.
    std::mem::forget(seed.memory);
    let status = i32::from(written.is_err());
    let told = written.map_err(|error| WireError::from(&error));
    if let Err(error) = seed.channel.send(&Told::Written(told), &[], SEND) {
        tracing::warn!(%error, "nobody waits for a snapshot that was written");
    }
    status
}

fn write(
    channel: &Channel,
    order: Order,
    state: MachineState,
    memory: &Memory,
    layers: &[FrozenLayer],
    backends: &mut Backends,
) -> Result<Published> {
    // First of all: whatever fails from here on takes the layers away.
    let mut drives = Vec::new();
    for layer in layers {
        let name = LayerName::new(layer.layer.name.clone())
            .map_err(|e| Error::because(ErrorKind::Config, "a drive was frozen to no layer", e))?;
        drives.push(FrozenDrive {
            id: layer.drive.clone(),
            source: DriveSource {
                backend: backends.open(&layer.layer.backend, &layer.layer.store)?,
                layer: (!layer.made).then(|| name.clone()),
            },
            layer: name,
        });
    }
    let frozen = Frozen::adopt(drives);
    let options = SaveOptions {
        id: order.id,
        metadata: order.metadata,
    };
    let total = state.ram()?.bytes();
    let unpublished = Unpublished::begin(&order.store, options, state, frozen, Timestamp::now())?;
    let done = AtomicU64::new(0);
    let progress = |bytes: u64| {
        let before = done.fetch_add(bytes, Ordering::Relaxed);
        if before / STEP != before.saturating_add(bytes) / STEP {
            let done = before.saturating_add(bytes);
            // A reader that is slow misses some.
            let _ = channel.send(&Told::Progress { done, total }, &[], Duration::ZERO);
        }
    };
    let saved = unpublished.publish(memory, &progress)?;
    let layers = saved.layers.into_iter();
    Ok(Published {
        layers: layers
            .map(|(drive, layer)| (drive, layer.to_string()))
            .collect(),
    })
}
