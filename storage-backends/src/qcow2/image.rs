//! Single qcow2 images outside of any store: what is imported and exported.
//!
//! An imported image is anybody's: its header and tables are checked as those of a store's images
//! are, and one that names a backing file is refused, because following the name would read
//! whatever file its maker chose.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use super::engine::{self, Engine, EngineKind};
use super::format::{NewImage, write_new};
use super::layer::{Top, checked_header};
use super::{tables, whole};
use crate::{Error, ErrorKind};

/// Clusters of 64 KiB, as `qemu-img` makes them.
const CLUSTER_BITS: u32 = 16;

/// Why an image that is sound is not imported.
#[derive(Debug, thiserror::Error)]
#[error(
    "it stands on a backing file {0:?}, which is not followed: make it whole first \
     (qemu-img convert)"
)]
struct HasBacking(String);

/// An image that is read or written as a whole.
#[derive(Debug)]
pub(crate) struct SingleImage {
    top: Arc<Top>,
    engine: Box<dyn Engine>,
}

impl SingleImage {
    /// Opens a foreign image for reading.
    pub(crate) fn open(file: File, label: String, operation: &'static str) -> Result<Self, Error> {
        let header = checked_header(&file, &label, operation)?;
        if let Some(backing) = header.backing {
            let why = HasBacking(backing.name);
            return Err(Error::because(
                ErrorKind::Unsupported,
                operation,
                label,
                why,
            ));
        }
        tables::walk(&file, &header).map_err(|e| e.into_error(operation, &label))?;
        Self::over(file, label, header, false, operation)
    }

    /// Makes an image of `size` bytes in `file`, which is empty, and opens it for writing.
    pub(crate) fn create(
        file: File,
        label: String,
        size: u64,
        operation: &'static str,
    ) -> Result<Self, Error> {
        let image = NewImage {
            size,
            cluster_bits: CLUSTER_BITS,
            backing: None,
        };
        let header = write_new(&file, &image).map_err(|e| Error::io(operation, &label, e))?;
        Self::over(file, label, header, true, operation)
    }

    fn over(
        file: File,
        label: String,
        header: super::Header,
        writable: bool,
        operation: &'static str,
    ) -> Result<Self, Error> {
        let top = Arc::new(Top {
            label,
            file: Arc::new(file),
            header,
            backing: None,
            writable,
        });
        let engine = engine::open(EngineKind::default(), &top, operation)?;
        Ok(Self { top, engine })
    }

    /// The image's size as a disk.
    pub(crate) fn size(&self) -> u64 {
        self.top.header.size
    }

    /// What may be something else than zeroes, in order.
    pub(crate) fn ranges(&self, operation: &'static str) -> Result<Vec<Range<u64>>, Error> {
        let ranges =
            whole::content(&self.top).map_err(|e| e.into_error(operation, &self.top.label))?;
        Ok(ranges
            .into_iter()
            .map(|(start, len)| start..start.saturating_add(len))
            .collect())
    }

    /// Fills `buf` from `offset` on.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.engine.read(&mut [IoSliceMut::new(buf)], offset)
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.engine.write(&[IoSlice::new(bytes)], offset)
    }

    /// Returns once all of it would survive a power cut.
    pub(crate) fn finish(&self) -> std::io::Result<()> {
        self.engine.flush()?;
        self.top.file.sync_all()
    }
}
