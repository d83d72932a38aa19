//! Making a layer of a volume, in steps each of which leaves the volume whole.
//!
//! ```text
//!                                    volumes/v       layers/l
//! 0  before                          A               -
//! 1  overlay O complete              A               -          O under a temporary name
//! 2  link                            A               A
//! 3  A, O and layers/ are synced     A               A          all at the same time
//! 4  rename                          O -> l          A
//! 5  volumes/ is synced              O -> l          A          at once, or with the next flush
//! ```
//! A crash before 2 leaves a temporary file. Between 2 and 4 the two names are one file: such a layer
//! is not there for anybody ([`is_unfinished`](super::layer::is_unfinished)), because the volume
//! may still be written to, and whoever next locks the volume takes the name away again. From 4 on
//! the freeze has happened. There is no moment at which `volumes/v` is not the volume's content,
//! and no journal: the two names tell how far it got.
//!
//! Step 3 is there for the power cut: the rename takes the name `volumes/v` from A, so were it on
//! the disk and the link or O's content not, the volume would be gone. And a layer must not be there
//! without its content. The three do not depend on one another, so they go on at the same time, and
//! on a journaling file system they share a commit.

use std::io;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, fchmod, linkat};

use super::backend::Qcow2Backend;
use super::format::{NewImage, write_new};
use super::layer::{ChainError, Layer, Top, backing_name, checked_header};
use super::volume::Current;
use crate::dir::Room;
use crate::durable;
use crate::lock::{Lock, try_lock};
use crate::{Access, Durability, Error, ErrorKind, LayerName, VolumeName};

const OPERATION: &str = "freeze";

impl Qcow2Backend {
    pub(super) fn freeze_volume(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        durability: Durability,
    ) -> Result<(), Error> {
        if let Some(handle) = self.open_handle(volume) {
            return handle.exclusively(|current| {
                let engine = &current.engine;
                let next = self.freeze_top(volume, layer, &current.top, || engine.flush())?;
                engine.seal();
                *current = next;
                handle.name_changed();
                self.end_freeze(volume, durability)
            });
        }
        let file = self.lock_volume(volume, Access::ReadWrite, Lock::Exclusive, OPERATION)?;
        let top = Arc::new(self.top(self.label(volume), file, Access::ReadWrite, OPERATION)?);
        self.freeze_top(volume, layer, &top, || top.file.sync_all())?;
        // Nobody holds a handle that could flush later.
        self.end_freeze(volume, Durability::Now)
    }

    /// Steps 1 to 4; `sync` is A's part of step 3. Returns the overlay, open; everything that can
    /// fail does so before step 4.
    fn freeze_top(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        top: &Arc<Top>,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> Result<Current, Error> {
        let label = self.label(volume);
        let layer_label = self.store.describe(Room::Layers, layer.as_str());
        let fail = |e: io::Error| Error::io(OPERATION, &label, e);
        let limit = self.options.max_chain;
        if top.depth() >= limit {
            return Err(ChainError::TooLong(limit).into_error(OPERATION, &label));
        }
        if self
            .store
            .exists(Room::Layers, layer.as_str())
            .map_err(fail)?
        {
            return Err(Error::new(ErrorKind::Exists, OPERATION, layer_label));
        }

        let new = self.store.new_file(Room::Volumes).map_err(fail)?;
        let backing = backing_name(&self.store, layer);
        let image = NewImage {
            size: top.header.size,
            cluster_bits: self.options.cluster_bits,
            backing: Some(&backing),
        };
        let overlay = write_new(new.file(), &image).map_err(fail)?;
        crash_point(1);

        let (volumes, layers) = (
            self.store.room(Room::Volumes),
            self.store.room(Room::Layers),
        );
        let (from, to) = (
            self.store.file_name(volume.as_str()),
            self.store.file_name(layer.as_str()),
        );
        linkat(volumes, &from, layers, &to, AtFlags::empty()).map_err(|e| match e {
            rustix::io::Errno::EXIST => Error::new(ErrorKind::Exists, OPERATION, &layer_label),
            e => Error::io(OPERATION, &layer_label, e.into()),
        })?;
        crash_point(2);
        let switch = || {
            let overlay_and_link =
                || at_the_same_time(|| new.file().sync_all(), || durable::sync_dir(layers));
            at_the_same_time(sync, overlay_and_link).map_err(fail)?;
            crash_point(3);
            // A's tables may have moved since it was opened, and are in the file now.
            let header = checked_header(&top.file, &top.label, OPERATION)?;
            let frozen = Arc::new(Layer::new(
                layer_label.clone(),
                Arc::clone(&top.file),
                header,
                top.backing.clone(),
            ));
            let backing = Some(Arc::clone(&frozen));
            let next = self.open_new(label.clone(), &new, overlay, backing, OPERATION)?;
            new.replace(&from).map_err(fail)?;
            Ok((frozen, next))
        };
        let (frozen, next) = switch().inspect_err(|_: &Error| {
            if let Err(error) = self.store.remove(Room::Layers, layer.as_str()) {
                tracing::warn!(%layer, %error, "an unfinished layer could not be removed; opening the volume will");
            }
        })?;
        crash_point(4);

        // From here on nothing may fail any more: the freeze has happened.
        if let Err(error) = fchmod(&*top.file, Mode::RUSR) {
            tracing::warn!(%layer, %error, "the layer's file could not be made read-only");
        }
        match try_lock(&top.file, Lock::Shared) {
            Ok(true) => {}
            outcome => {
                tracing::warn!(%layer, ?outcome, "the layer's lock could not be shared: it stays exclusive until the volume is closed")
            }
        }
        self.layers.insert(layer.clone(), &frozen);
        Ok(next)
    }

    /// Step 5.
    fn end_freeze(&self, volume: &VolumeName, durability: Durability) -> Result<(), Error> {
        if durability == Durability::Now {
            durable::sync_dir(self.store.room(Room::Volumes))
                .map_err(|e| Error::io(OPERATION, self.label(volume), e))?;
        }
        crash_point(5);
        Ok(())
    }
}

/// Does both, the second on a thread of its own if there can be one.
fn at_the_same_time(
    here: impl FnOnce() -> io::Result<()>,
    there: impl Fn() -> io::Result<()> + Sync,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, &there);
        here()?;
        match thread {
            Ok(thread) => thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread that syncs panicked"))),
            Err(_) => there(),
        }
    })
}

/// In this crate's own tests: the place where the process dies.
fn crash_point(step: u32) {
    #[cfg(test)]
    tests::crash_if_asked(step);
    let _ = step;
}

#[cfg(test)]
mod tests;
