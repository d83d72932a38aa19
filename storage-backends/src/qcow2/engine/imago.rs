//! The `imago` engine: several threads, metadata cached in the process.
//!
//! What it is not trusted with: opening files (we open, lock and check them and hand over
//! descriptors), following backing files (the chain is built here, layer by layer, with every
//! implicit open denied), and the order in which things reach the disk (see [`storage`]).
//!
//! imago's metadata is written back by [`write_back`](Engine::write_back) and when an image is
//! dropped.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping};

use self::storage::ImageFile;
use super::{Engine, chain};
use crate::qcow2::layer::{Layer, Top};
use crate::{Error, ErrorKind};

mod storage;

/// An open image of this engine.
pub(in crate::qcow2) type Access = FormatAccess<ImageFile>;

/// One open image.
#[derive(Debug)]
pub(super) struct Imago {
    /// Reads and writes share it. Zeroing takes it alone: imago looks at a cluster's neighbourhood
    /// before it zeroes the whole cluster, and a write that lands in between would be lost.
    access: RwLock<Access>,
    file: Arc<storage::Shared>,
    cluster_size: u64,
}

impl Imago {
    pub(super) fn open(top: &Arc<Top>, operation: &'static str) -> Result<Self, Error> {
        let damaged = |e: io::Error| match e.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::Other => {
                Error::because(ErrorKind::Damaged, operation, &top.label, e)
            }
            _ => Error::io(operation, &top.label, e),
        };
        let backing = top
            .backing
            .as_ref()
            .map(reader)
            .transpose()
            .map_err(damaged)?;
        let file = storage::Shared::new(Arc::clone(&top.file), &top.header, top.writable);
        let access =
            open_one(ImageFile::new(Arc::clone(&file)), top.writable, backing).map_err(damaged)?;
        Ok(Self {
            access: RwLock::new(access),
            file,
            cluster_size: top.header.cluster_size(),
        })
    }

    /// Host ranges of the whole clusters in the guest range.
    fn host_ranges(
        access: &Access,
        offset: u64,
        len: u64,
        cluster: u64,
    ) -> io::Result<Vec<(u64, u64)>> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut at = offset.next_multiple_of(cluster);
        let end = offset + len;
        // The image's last cluster may be cut short by its size; it is still a whole cluster.
        let end = if end == access.size() {
            end
        } else {
            end - end % cluster
        };
        while at < end {
            let (mapping, n) = access.get_shallow_mapping(at, end - at)?;
            if n == 0 {
                break;
            }
            if let ShallowMapping::Raw { offset, .. } = mapping {
                match ranges.last_mut() {
                    Some((start, len)) if *start + *len == offset => *len += n,
                    _ => ranges.push((offset, n)),
                }
            }
            at += n;
        }
        Ok(ranges)
    }
}

/// The reader of a layer, shared by all images above it. Built from the base up: no recursion.
fn reader(layer: &Arc<Layer>) -> io::Result<Arc<Access>> {
    let layers: Vec<_> = chain(Some(layer)).collect();
    let mut below: Option<Arc<Access>> = None;
    for layer in layers.into_iter().rev() {
        let slot: &Mutex<Option<Arc<Access>>> = &layer.reader.imago;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let access = match slot.as_ref() {
            Some(access) => Arc::clone(access),
            None => {
                let file = storage::Shared::new(Arc::clone(&layer.file), &layer.header, false);
                let access = Arc::new(open_one(ImageFile::new(file), false, below)?);
                *slot = Some(Arc::clone(&access));
                access
            }
        };
        below = Some(access);
    }
    below.ok_or_else(|| io::Error::other("an empty chain of layers"))
}

fn open_one(file: ImageFile, writable: bool, backing: Option<Arc<Access>>) -> io::Result<Access> {
    let image = Qcow2::<ImageFile, Arc<Access>>::builder(file)
        .write(writable)
        .backing(backing)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

impl Engine for Imago {
    fn read(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let bufs: Vec<_> = bufs.iter_mut().map(|b| IoSliceMut::new(b)).collect();
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        access.readv(IoVectorMut::from(bufs), offset)
    }

    fn write(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let bufs: Vec<_> = bufs.iter().map(|b| IoSlice::new(b)).collect();
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        access.writev(IoVector::from(bufs), offset)
    }

    /// Zeroed clusters keep their place in the file, and with `unmap` that place becomes a hole.
    /// imago could free the clusters instead, but then a power cut could leave two guest clusters
    /// with one host cluster between them: it does not order its writes on the disk.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let holes = if unmap {
            Self::host_ranges(&access, offset, len, self.cluster_size)?
        } else {
            Vec::new()
        };
        access.write_zeroes(offset, len)?;
        for (start, len) in holes {
            self.file.punch(start, len)?;
        }
        Ok(())
    }

    fn write_back(&self) -> io::Result<()> {
        self.access
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .flush()
    }

    fn flush(&self) -> io::Result<()> {
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        self.file.arm_barrier();
        access.flush()?;
        access.sync()
    }

    fn seal(&self) {
        self.file.seal();
    }
}
