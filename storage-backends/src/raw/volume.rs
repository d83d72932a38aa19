//! One raw file, open.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::holes::{overwrite_data, punch, write_zeroes, zero_range};
use super::io::{read_exact_at, write_all_at};
use crate::dir::{Room, StoreDir};
use crate::{Volume, VolumeName};

/// An open volume or layer.
#[derive(Debug)]
pub(crate) struct RawVolume {
    name: VolumeName,
    size: u64,
    read_only: bool,
    /// Its lock is this volume's lock.
    file: File,
    dir: Arc<StoreDir>,
    /// The name is known to be durable.
    named: AtomicBool,
}

impl RawVolume {
    /// A volume on a locked file, open for writing. `named`: its name is durable already.
    pub(crate) fn writable(
        dir: Arc<StoreDir>,
        name: VolumeName,
        file: File,
        size: u64,
        named: bool,
    ) -> Self {
        Self {
            name,
            size,
            read_only: false,
            file,
            dir,
            named: AtomicBool::new(named),
        }
    }

    /// A volume or layer that is only read.
    pub(crate) fn readable(dir: Arc<StoreDir>, name: VolumeName, file: File, size: u64) -> Self {
        Self {
            name,
            size,
            read_only: true,
            file,
            dir,
            named: AtomicBool::new(true),
        }
    }

    /// Its file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The range, if it lies inside the volume.
    fn range(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(offset..end),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn writable_range(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.range(offset, len)
    }
}

/// The length of all slices together.
fn total<'a>(lens: impl Iterator<Item = &'a [u8]>) -> io::Result<u64> {
    lens.map(<[u8]>::len)
        .try_fold(0, usize::checked_add)
        .map(|len| len as u64)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Whether `result` says that the file system cannot.
fn is_unsupported(result: &io::Result<()>) -> bool {
    matches!(result, Err(e) if e.kind() == io::ErrorKind::Unsupported)
}

impl Volume for RawVolume {
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
        self.range(offset, total(bufs.iter().map(|b| &**b))?)?;
        read_exact_at(&self.file, bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.writable_range(offset, total(bufs.iter().map(|b| &**b))?)?;
        write_all_at(&self.file, bufs, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.named.load(Ordering::Acquire) {
            return self.file.sync_data();
        }
        // A fork's file and name were not synced when it was made.
        self.file.sync_all()?;
        crate::durable::sync_dir(self.dir.room(Room::Volumes))?;
        self.named.store(true, Ordering::Release);
        Ok(())
    }

    /// Where the file system has no holes, the zeroes are written: the range reads the same, and
    /// the backend's capabilities have said that the space does not come back.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = self.writable_range(offset, len)?;
        if range.is_empty() {
            return Ok(());
        }
        let punched = punch(&self.file, offset, len);
        if is_unsupported(&punched) {
            return overwrite_data(&self.file, range);
        }
        punched
    }

    /// Without `unmap` space stays reserved: by the file system where it can (ZERO_RANGE), else by
    /// writing zeroes everywhere. With `unmap` this is a discard.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            return self.discard(offset, len);
        }
        let range = self.writable_range(offset, len)?;
        if range.is_empty() {
            return Ok(());
        }
        let zeroed = zero_range(&self.file, offset, len);
        if is_unsupported(&zeroed) {
            return write_zeroes(&self.file, range);
        }
        zeroed
    }

    fn raw_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
