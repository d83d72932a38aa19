//! Sizes that a volume can have.

use std::fmt;

use crate::{Error, ErrorKind};

/// Bytes in a sector, the granularity of a volume's size (virtio 1.2, 5.2.4: `capacity` counts
/// 512-byte sectors).
pub const SECTOR: u64 = 512;

/// The largest volume: the largest file offset, rounded down to a sector.
pub const MAX_SIZE: u64 = i64::MAX.unsigned_abs() & !(SECTOR - 1);

/// Why a size was refused.
#[derive(Debug, thiserror::Error)]
#[error("a size of {0} bytes is not a multiple of 512 between 512 and {MAX_SIZE}")]
pub(crate) struct BadSize(pub(crate) u64);

/// Whether a volume can be `size` bytes long.
pub(crate) fn is_valid(size: u64) -> bool {
    (SECTOR..=MAX_SIZE).contains(&size) && size.is_multiple_of(SECTOR)
}

/// Refuses a size that no volume can have.
pub(crate) fn check(
    operation: &'static str,
    object: impl fmt::Display,
    size: u64,
) -> Result<(), Error> {
    if is_valid(size) {
        Ok(())
    } else {
        Err(Error::because(
            ErrorKind::Invalid,
            operation,
            object,
            BadSize(size),
        ))
    }
}
