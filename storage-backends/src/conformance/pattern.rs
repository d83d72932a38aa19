//! Writing and comparing content.

use std::io::{IoSlice, IoSliceMut};

use super::{Failure, ensure};
use crate::{LayerName, Volume, VolumeName};

/// A name that is known to be valid.
pub(crate) fn volume(name: &str) -> Result<VolumeName, Failure> {
    VolumeName::new(name).map_err(|e| Failure::new(e.to_string()))
}

/// A name that is known to be valid.
pub(crate) fn layer(name: &str) -> Result<LayerName, Failure> {
    LayerName::new(name).map_err(|e| Failure::new(e.to_string()))
}

/// Writes `bytes` at `offset`.
#[track_caller]
pub(crate) fn write(volume: &dyn Volume, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
    volume
        .write_vectored_at(&[IoSlice::new(bytes)], offset)
        .map_err(|e| Failure::from(e).during(format_args!("writing {} at {offset}", bytes.len())))
}

/// Reads `len` bytes at `offset`.
#[track_caller]
pub(crate) fn read(volume: &dyn Volume, offset: u64, len: usize) -> Result<Vec<u8>, Failure> {
    // Not zero, so that a read which leaves the buffer alone is noticed.
    let mut bytes = vec![0xa5; len];
    volume
        .read_vectored_at(&mut [IoSliceMut::new(&mut bytes)], offset)
        .map_err(|e| Failure::from(e).during(format_args!("reading {len} at {offset}")))?;
    Ok(bytes)
}

/// Fails unless the volume reads as `expected` at `offset`.
#[track_caller]
pub(crate) fn same(volume: &dyn Volume, offset: u64, expected: &[u8]) -> Result<(), Failure> {
    let found = read(volume, offset, expected.len())?;
    if found == expected {
        return Ok(());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(Failure::new(format!(
            "{} differs at byte {} (read of {} at {offset}): {:#04x} instead of {:#04x}",
            volume.name(),
            offset + at as u64,
            expected.len(),
            found.get(at).copied().unwrap_or(0),
            expected.get(at).copied().unwrap_or(0),
        ))),
    }
}

/// Fails unless the volume is `expected` from end to end.
#[track_caller]
pub(crate) fn is_whole(volume: &dyn Volume, expected: &[u8]) -> Result<(), Failure> {
    ensure(
        volume.size() == expected.len() as u64,
        format_args!("size {} instead of {}", volume.size(), expected.len()),
    )?;
    same(volume, 0, expected)
}
