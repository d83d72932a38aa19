//! One open volume, as a device sees it.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};

use crate::VolumeName;

/// An open volume: a block device of a fixed size, usable from several
/// threads at once.
///
/// Offsets and lengths are bytes and need no alignment. A range that is not
/// inside the volume is refused with [`io::ErrorKind::InvalidInput`] and
/// changes nothing. Two overlapping requests in flight at once may land in
/// either order; requests that do not overlap never disturb one another.
pub trait Volume: Send + Sync + Debug {
    /// The name under which the backend knows this volume (or layer).
    fn name(&self) -> &VolumeName;

    /// Size in bytes, a multiple of [`SECTOR`](crate::SECTOR); never changes while the volume is open.
    fn size(&self) -> u64;

    /// Whether every change is refused (with [`io::ErrorKind::PermissionDenied`]).
    fn is_read_only(&self) -> bool;

    /// Fills all of `bufs` from `offset` on. What was never written reads as zeroes.
    ///
    /// # Errors
    /// When the range is not inside the volume or the storage fails; `bufs` are then unspecified.
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()>;

    /// Writes all of `bufs` from `offset` on. Durable after the next [`flush`](Volume::flush).
    ///
    /// # Errors
    /// As for reads; [`io::ErrorKind::StorageFull`] when the store has no space. A failed write
    /// leaves each byte of its range old or new, and the rest of the volume as it was.
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()>;

    /// Returns once every write completed before the call would survive a power cut.
    ///
    /// # Errors
    /// When the storage fails; then no earlier write may be taken for durable.
    fn flush(&self) -> io::Result<()>;

    /// Gives the range back where the backend can. It reads as zeroes afterwards.
    ///
    /// # Errors
    /// As for writes.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As for writes.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// The file whose bytes are this volume's bytes at the same offsets, when there is one: a
    /// device may then do its reads and writes on it directly (io_uring), as one that keeps the
    /// volume open meanwhile. It stays valid for as long as the volume is open, also across a
    /// freeze. Two things remain the user's to keep: it stays within [`size`](Volume::size), and
    /// [`flush`](Volume::flush), not an fdatasync of its own, makes a forked volume durable for the
    /// first time (the file's name must become durable too); after one successful `flush` the two
    /// are the same. Its position is not to be relied on.
    fn raw_file(&self) -> Option<&File>;
}
