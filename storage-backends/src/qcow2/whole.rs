//! Operations on a whole volume: checking, repairing refcounts, flattening.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use super::backend::Qcow2Backend;
use super::engine::{self, Engine, EngineKind};
use super::format::NewImage;
use super::layer::{Top, checked_header};
use super::tables::{self, TableError, refcounts};
use crate::dir::Room;
use crate::durable;
use crate::lock::{Lock, try_lock};
use crate::{Access, Error, ErrorKind, VolumeName};

impl TableError {
    pub(super) fn into_error(self, operation: &'static str, object: &str) -> Error {
        match self {
            Self::Io(e) => Error::io(operation, object, e),
            Self::TooLarge { .. } => {
                Error::because(ErrorKind::Unsupported, operation, object, self)
            }
            _ => Error::because(ErrorKind::Damaged, operation, object, self),
        }
    }
}

/// What one engine does not write to.
#[derive(Debug, thiserror::Error)]
#[error(
    "the engine {0} does not write to images with compressed clusters: flatten the volume first, or use imago"
)]
struct CompressedClusters(EngineKind);

/// Walks the tables of an image that is about to be written to, and writes its refcounts anew when they
/// do not agree: after a crash they may not, and the engines believe them. What `engine` in particular
/// cannot deal with is refused or put differently.
pub(super) fn prepare_for_writing(
    top: &Top,
    engine: EngineKind,
    operation: &'static str,
) -> Result<(), Error> {
    let fail = |e: TableError| e.into_error(operation, &top.label);
    let mut used = tables::walk(&*top.file, &top.header).map_err(fail)?;
    if engine == EngineKind::Qcow2Rs {
        if used.has_compressed() {
            return Err(Error::because(
                ErrorKind::Unsupported,
                operation,
                &top.label,
                CompressedClusters(engine),
            ));
        }
        if tables::simplify_entries(&top.file, &top.header).map_err(fail)? {
            used = tables::walk(&*top.file, &top.header).map_err(fail)?;
        }
    }
    let found = refcounts::compare(&*top.file, &top.header, &used).map_err(fail)?;
    if found != refcounts::Differences::default() {
        tracing::info!(
            image = top.label,
            found.missing,
            found.leaked,
            "recounting after an interrupted write"
        );
        refcounts::rewrite(&top.file, &top.header, &mut used).map_err(fail)?;
    }
    Ok(())
}

impl Qcow2Backend {
    pub(super) fn check_volume(&self, volume: &VolumeName) -> Result<(), Error> {
        const OPERATION: &str = "check";
        let label = self.label(volume);
        if let Some(handle) = self.open_handle(volume) {
            return handle.exclusively(|current| {
                current
                    .engine
                    .write_back()
                    .map_err(|e| Error::io(OPERATION, &label, e))?;
                // Tables may have moved since the image was opened.
                let header = checked_header(&current.top.file, &label, OPERATION)?;
                tables::check(&*current.top.file, &header)
                    .map_err(|e| e.into_error(OPERATION, &label))?;
                check_layers(&current.top, OPERATION)
            });
        }
        let file = self
            .store
            .open_unlocked(Room::Volumes, volume.as_str(), Access::ReadOnly)
            .map_err(|e| Error::io(OPERATION, &label, e))?;
        // Somebody who has it open for writing writes refcounts ahead of what uses them.
        let quiet = try_lock(&file, Lock::Shared).map_err(|e| Error::io(OPERATION, &label, e))?;
        let top = self.top(label.clone(), file, Access::ReadOnly, OPERATION)?;
        match tables::check(&*top.file, &top.header) {
            Err(TableError::Refcounts { missing: 0, .. }) if !quiet => {}
            result => result.map_err(|e| e.into_error(OPERATION, &label))?,
        }
        check_layers(&top, OPERATION)
    }

    pub(super) fn flatten_volume(&self, volume: &VolumeName) -> Result<(), Error> {
        const OPERATION: &str = "flatten";
        let label = self.label(volume);
        let fail = |e: std::io::Error| Error::io(OPERATION, &label, e);
        let file = self.lock_volume(volume, Access::ReadOnly, Lock::Exclusive, OPERATION)?;
        let old = Arc::new(self.top(label.clone(), file, Access::ReadOnly, OPERATION)?);
        if old.backing.is_none() {
            return Ok(());
        }
        let from = engine::open(self.options.engine, &old, OPERATION)?;
        let new = self.store.new_file(Room::Volumes).map_err(fail)?;
        let image = NewImage {
            size: old.header.size,
            cluster_bits: self.options.cluster_bits,
            backing: None,
        };
        let to = self.new_image(label.clone(), &new, &image, None, OPERATION)?;
        for (offset, len) in content(&old).map_err(|e| e.into_error(OPERATION, &label))? {
            copy(&*from, &*to.engine, offset, len).map_err(fail)?;
        }
        to.engine
            .flush()
            .and_then(|()| to.top.file.sync_all())
            .map_err(fail)?;
        new.replace(&self.store.file_name(volume.as_str()))
            .map_err(fail)?;
        durable::sync_dir(self.store.room(Room::Volumes)).map_err(fail)
    }
}

fn check_layers(top: &Top, operation: &'static str) -> Result<(), Error> {
    for layer in engine::chain(top.backing.as_ref()) {
        match tables::check(&*layer.file, &layer.header) {
            // A process that died may have left leaks in what was frozen later: only space.
            Err(TableError::Refcounts { missing: 0, .. }) => {}
            result => result.map_err(|e| e.into_error(operation, &layer.label))?,
        }
    }
    Ok(())
}

/// The ranges that any image of the chain says something about, in order and apart.
pub(super) fn content(top: &Top) -> Result<Vec<(u64, u64)>, TableError> {
    let mut ranges = Vec::new();
    let mut add = |start: u64, len: u64| {
        let len = len.min(top.header.size.saturating_sub(start));
        if len == 0 {
            return;
        }
        match ranges.last_mut() {
            Some((s, l)) if *s + *l == start => *l += len,
            _ => ranges.push((start, len)),
        }
    };
    tables::mapped_ranges(&*top.file, &top.header, &mut add)?;
    for layer in engine::chain(top.backing.as_ref()) {
        tables::mapped_ranges(&*layer.file, &layer.header, &mut add)?;
    }
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (start, len) in ranges {
        match merged.last_mut() {
            Some((s, l)) if *s + *l >= start => *l = (*l).max(start + len - *s),
            _ => merged.push((start, len)),
        }
    }
    Ok(merged)
}

/// Copies a range, passing over blocks of zeroes.
fn copy(from: &dyn Engine, to: &dyn Engine, mut offset: u64, mut len: u64) -> std::io::Result<()> {
    const PART: u64 = 1 << 20;
    /// What is looked at for being zero.
    const BLOCK: usize = 64 << 10;
    let mut buf = vec![0; usize::try_from(PART.min(len)).unwrap_or(0)];
    while len > 0 {
        let n = PART.min(len);
        let part = buf
            .get_mut(..usize::try_from(n).unwrap_or(0))
            .unwrap_or_default();
        from.read(&mut [IoSliceMut::new(part)], offset)?;
        for (at, block) in (offset..).step_by(BLOCK).zip(part.chunks(BLOCK)) {
            if block.iter().any(|b| *b != 0) {
                to.write(&[IoSlice::new(block)], at)?;
            }
        }
        offset += n;
        len -= n;
    }
    Ok(())
}
