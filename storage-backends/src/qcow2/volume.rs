//! One open qcow2 volume or layer.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::engine::Engine;
use super::layer::Top;
use crate::{Volume, VolumeName};

/// What a freeze swaps: the image that is written to and the engine that does it.
#[derive(Debug)]
pub(super) struct Current {
    // Dropped in this order: the engine's last words go to the file while it is locked.
    pub(super) engine: Box<dyn Engine>,
    pub(super) top: Arc<Top>,
}

/// An open volume or layer.
#[derive(Debug)]
pub(super) struct Qcow2Volume {
    name: VolumeName,
    size: u64,
    read_only: bool,
    current: RwLock<Current>,
    /// The directory to sync with the next flush, while the file's name is not durable yet.
    directory: Option<OwnedFd>,
    /// Whether that has to be done; held while it is.
    unnamed: Mutex<bool>,
}

impl Qcow2Volume {
    pub(super) fn new(name: VolumeName, current: Current) -> Self {
        Self {
            name,
            size: current.top.header.size,
            read_only: !current.top.writable,
            current: RwLock::new(current),
            directory: None,
            unnamed: Mutex::new(false),
        }
    }

    /// The same, for a writable volume in `directory`; `durable` says whether its name has been synced.
    pub(super) fn in_directory(
        name: VolumeName,
        current: Current,
        directory: OwnedFd,
        durable: bool,
    ) -> Self {
        Self {
            directory: Some(directory),
            unnamed: Mutex::new(!durable),
            ..Self::new(name, current)
        }
    }

    /// Runs `swap` while no request is in flight.
    pub(super) fn exclusively<T>(&self, swap: impl FnOnce(&mut Current) -> T) -> T {
        swap(&mut self.current.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next flush has to sync the directory too.
    pub(super) fn name_changed(&self) {
        *self.unnamed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn with<T>(&self, f: impl FnOnce(&dyn Engine) -> io::Result<T>) -> io::Result<T> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        f(&*current.engine)
    }

    /// Whether there is anything to do for a range that lies inside the volume.
    fn check(&self, offset: u64, len: u64) -> io::Result<bool> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the range is not inside the volume",
            ));
        }
        Ok(len > 0)
    }

    fn check_change(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.check(offset, len)
    }
}

impl Volume for Qcow2Volume {
    fn name(&self) -> &VolumeName {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        if self.check(offset, bufs.iter().map(|b| b.len() as u64).sum())? {
            self.with(|engine| engine.read(bufs, offset))?;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        if self.check_change(offset, bufs.iter().map(|b| b.len() as u64).sum())? {
            self.with(|engine| engine.write(bufs, offset))?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.with(|engine| {
            engine.flush()?;
            let mut unnamed = self.unnamed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(directory) = &self.directory
                && *unnamed
            {
                rustix::fs::fsync(directory)?;
                *unnamed = false;
            }
            Ok(())
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if self.check_change(offset, len)? {
            self.with(|engine| engine.write_zeroes(offset, len, unmap))?;
        }
        Ok(())
    }

    fn raw_file(&self) -> Option<&File> {
        None
    }
}
