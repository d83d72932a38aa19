//! Making a layer of a volume, in steps each of which leaves the volume whole.
//!
//! ```text
//!                                    volumes/v       layers/l
//! 0  before                          A               -
//! 1  A is synced                     A               -
//! 2  overlay O complete and synced   A               -          O under a temporary name
//! 3  link                            A               A
//! 4  layers/ is synced               A               A
//! 5  rename                          O -> l          A
//! 6  volumes/ is synced              O -> l          A          at once, or with the next flush
//! ```
//! A crash before 3 leaves a temporary file. Between 3 and 5 the two names are one file: such a layer
//! is not there for anybody ([`is_unfinished`](super::layer::is_unfinished)), because the volume
//! may still be written to, and whoever next locks the volume takes the name away again. From 5 on
//! the freeze has happened. There is no moment at which `volumes/v` is not the volume's content,
//! and no journal: the two names tell how far it got.
//!
//! Step 4 is there for the power cut: were the rename on the disk and the link not, A would be gone.

use std::io;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, fchmod, linkat};

use super::backend::Qcow2Backend;
use super::format::NewImage;
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
                engine
                    .flush()
                    .map_err(|e| Error::io(OPERATION, self.label(volume), e))?;
                let next = self.freeze_top(volume, layer, &current.top)?;
                engine.seal();
                *current = next;
                handle.name_changed();
                self.end_freeze(volume, durability)
            });
        }
        let file = self.lock_volume(volume, Access::ReadWrite, Lock::Exclusive, OPERATION)?;
        file.sync_all()
            .map_err(|e| Error::io(OPERATION, self.label(volume), e))?;
        let top = Arc::new(self.top(self.label(volume), file, Access::ReadWrite, OPERATION)?);
        self.freeze_top(volume, layer, &top)?;
        // Nobody holds a handle that could flush later.
        self.end_freeze(volume, Durability::Now)
    }

    /// Steps 2 to 5. Returns the overlay, open; everything that can fail does so before step 5.
    fn freeze_top(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        top: &Arc<Top>,
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
        crash_point(1);

        let header = checked_header(&top.file, &top.label, OPERATION)?;
        let frozen = Arc::new(Layer::new(
            layer_label.clone(),
            Arc::clone(&top.file),
            header,
            top.backing.clone(),
        ));
        let new = self.store.new_file(Room::Volumes).map_err(fail)?;
        let backing = backing_name(&self.store, layer);
        let image = NewImage {
            size: frozen.header.size,
            cluster_bits: self.options.cluster_bits,
            backing: Some(&backing),
        };
        let next = self.new_image(
            label.clone(),
            &new,
            &image,
            Some(Arc::clone(&frozen)),
            OPERATION,
        )?;
        new.file().sync_all().map_err(fail)?;
        crash_point(2);

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
        crash_point(3);
        let switched = durable::sync_dir(layers).and_then(|()| {
            crash_point(4);
            new.replace(&from)
        });
        if let Err(e) = switched {
            if let Err(error) = self.store.remove(Room::Layers, layer.as_str()) {
                tracing::warn!(%layer, %error, "an unfinished layer could not be removed; opening the volume will");
            }
            return Err(fail(e));
        }
        crash_point(5);

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

    /// Step 6.
    fn end_freeze(&self, volume: &VolumeName, durability: Durability) -> Result<(), Error> {
        if durability == Durability::Now {
            durable::sync_dir(self.store.room(Room::Volumes))
                .map_err(|e| Error::io(OPERATION, self.label(volume), e))?;
        }
        crash_point(6);
        Ok(())
    }
}

/// In this crate's own tests: the place where the process dies.
fn crash_point(step: u32) {
    #[cfg(test)]
    tests::crash_if_asked(step);
    let _ = step;
}

#[cfg(test)]
mod tests;
