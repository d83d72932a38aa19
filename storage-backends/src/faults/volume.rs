//! A volume that fails, with a write cache that can be lost.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Fault, Faults, Operation};
use crate::conformance::Rng;
use crate::{SECTOR, Volume, VolumeName};

const SECTOR_LEN: usize = 512;
const _: () = assert!(SECTOR_LEN as u64 == SECTOR);

/// The sectors that are held back, by number: what a disk writes whole or not at all.
type Cache = BTreeMap<u64, [u8; SECTOR_LEN]>;

/// The volume.
#[derive(Debug)]
pub(super) struct FaultyVolume {
    inner: Arc<dyn Volume>,
    faults: Faults,
    cache: Mutex<Cache>,
}

impl FaultyVolume {
    pub(super) fn new(inner: Arc<dyn Volume>, faults: Faults) -> Self {
        Self {
            inner,
            faults,
            cache: Mutex::default(),
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends all that is held back to the real volume.
    pub(super) fn send(&self) -> io::Result<()> {
        send(&*self.inner, &mut self.cache())
    }

    /// The power goes: each sector that is held back gets to the disk or is lost.
    pub(super) fn lose(&self, rng: &mut Rng) {
        let mut cache = self.cache();
        cache.retain(|_, _| rng.below(2) == 0);
        if let Err(error) = send(&*self.inner, &mut cache) {
            tracing::debug!(%error, "the disk failed during the power cut");
        }
    }

    fn refuse_outside(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn refuse_change(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_read_only() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.refuse_outside(offset, len)
    }

    /// Writes `bytes`, or keeps them until a flush.
    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if !self.faults.holds_writes_back() {
            return self.inner.write_vectored_at(&[IoSlice::new(bytes)], offset);
        }
        let mut cache = self.cache();
        for (number, at, part) in sectors(bytes.len(), offset) {
            let sector = match cache.get_mut(&number) {
                Some(sector) => sector,
                None => {
                    let mut old = [0; SECTOR_LEN];
                    self.inner
                        .read_vectored_at(&mut [IoSliceMut::new(&mut old)], number * SECTOR)?;
                    cache.entry(number).or_insert(old)
                }
            };
            sector[at..at + part.len()].copy_from_slice(&bytes[part]);
        }
        Ok(())
    }
}

/// The sectors that a range touches: number, where in the sector, which part of the range.
fn sectors(len: usize, offset: u64) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let position = offset + done as u64;
        let at = usize::try_from(position % SECTOR).unwrap_or(0);
        let part = done..len.min(done + SECTOR_LEN - at);
        done = part.end;
        Some((position / SECTOR, at, part))
    })
}

fn send(inner: &dyn Volume, cache: &mut Cache) -> io::Result<()> {
    while let Some((number, sector)) = cache.first_key_value() {
        inner.write_vectored_at(&[IoSlice::new(sector)], number * SECTOR)?;
        cache.pop_first();
    }
    Ok(())
}

impl Volume for FaultyVolume {
    fn name(&self) -> &VolumeName {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.faults.next(Operation::Read).map_err(Fault::error)?;
        let cache = self.cache();
        self.inner.read_vectored_at(bufs, offset)?;
        let mut position = offset;
        for buf in bufs {
            for (number, at, part) in sectors(buf.len(), position) {
                if let Some(sector) = cache.get(&number) {
                    let len = part.len();
                    buf[part].copy_from_slice(&sector[at..at + len]);
                }
            }
            position += buf.len() as u64;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        self.refuse_change(offset, bytes.len() as u64)?;
        match self.faults.next(Operation::Write) {
            Ok(()) => self.put(&bytes, offset),
            Err(fault) => {
                if !self.faults.is_off() {
                    self.put(bytes.split_at(bytes.len() / 2).0, offset)?;
                }
                Err(fault.error())
            }
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.faults.next(Operation::Flush).map_err(Fault::error)?;
        self.send()?;
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.refuse_change(offset, len)?;
        self.faults.next(Operation::Discard).map_err(Fault::error)?;
        // The sectors on the edges may be held back. The lock stays until the zeroes are there, so
        // that a neighbour's write does not keep the rest of its sector from before.
        let mut cache = self.cache();
        send(&*self.inner, &mut cache)?;
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.refuse_change(offset, len)?;
        self.faults
            .next(Operation::WriteZeroes)
            .map_err(Fault::error)?;
        let mut cache = self.cache();
        send(&*self.inner, &mut cache)?;
        self.inner.write_zeroes(offset, len, unmap)
    }

    fn raw_file(&self) -> Option<&File> {
        None
    }
}

impl Drop for FaultyVolume {
    /// A process that ends loses nothing: what was written is the system's to keep.
    fn drop(&mut self) {
        if !self.faults.is_off()
            && let Err(error) = self.send()
        {
            tracing::debug!(%error, "what was held back could not be written");
        }
    }
}
