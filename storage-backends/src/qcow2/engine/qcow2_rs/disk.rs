//! A disk: an image with the layers beneath it, as the disk's thread works on them.
//!
//! The chain is ours: the library knows single images only. A cluster that the top says nothing
//! about is read from below, and copied up as a whole before a part of it is written.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Arc;

use super::device::{Device, MAX_SLICES};
use super::{L2_SLICE_BITS, Mapped};
use crate::qcow2::engine::chain;
use crate::qcow2::layer::{Layer, Top};
use crate::size::SECTOR;

/// What a cluster was before a write that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Zero,
}

/// A layer beneath, opened when something is first read from it.
#[derive(Debug)]
struct Below {
    layer: Arc<Layer>,
    device: Option<Device>,
}

/// An open disk.
#[derive(Debug)]
pub(super) struct Disk {
    top: Device,
    below: Vec<Below>,
    label: String,
    /// Clusters for which the library has a place, but whose content never got there (no space is
    /// left, say): by the top's word they have data, and in truth they are what they were. While there are such
    /// clusters, no metadata is written.
    unwritten: BTreeMap<u64, Before>,
    /// Slices of L2 tables that the library has in its cache. It is emptied before it is full: when it
    /// is full, the library writes metadata out without any order.
    slices: HashSet<u64>,
}

impl Disk {
    pub(super) fn open(top: &Top) -> io::Result<Self> {
        let below = chain(top.backing.as_ref())
            .map(|layer| Below {
                layer: Arc::clone(layer),
                device: None,
            })
            .collect();
        Ok(Self {
            top: Device::open(Arc::clone(&top.file), &top.header, top.writable)?,
            below,
            label: top.label.clone(),
            unwritten: BTreeMap::new(),
            slices: HashSet::new(),
        })
    }

    pub(super) fn file(&self) -> &Arc<super::file::ImageFile> {
        &self.top.file
    }

    /// Reads from any offset on.
    pub(super) fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let (start, end) = sectors(offset, len as u64);
        let mut buf = vec![0; whole(end.saturating_sub(start))?];
        self.make_room_in_cache()?;
        self.fill(0, &mut buf, start)?;
        let skip = whole(offset.saturating_sub(start))?;
        buf.drain(..skip.min(buf.len()));
        buf.truncate(len);
        Ok(buf)
    }

    /// Writes at any offset.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pieces(offset, data.len() as u64, |disk, at, len| {
            let start = whole(at.saturating_sub(offset))?;
            let end = start.saturating_add(whole(len)?);
            disk.write_in_cluster(at, data.get(start..end).unwrap_or_default())
        })
    }

    /// Makes a range read as zeroes. What has no data stays so; a whole cluster of the top that has
    /// becomes a hole in the file when `unmap` says so; all else is written with zeroes. (The library
    /// cannot mark clusters as zero, nor free them.)
    pub(super) fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let zeroes = vec![0; whole(self.top.cluster.min(len))?];
        self.pieces(offset, len, |disk, at, len| {
            let is_whole = at % disk.top.cluster == 0
                && (len == disk.top.cluster || at.saturating_add(len) == disk.top.size);
            match disk.top_mapped(at)? {
                Mapped::Zero => Ok(()),
                Mapped::Nothing if !disk.has_data_below(at, len)? => Ok(()),
                Mapped::Nothing if is_whole => disk.allocate(at, Before::Nothing, None, &[]),
                Mapped::Data { at: place, .. } if is_whole && unmap => {
                    disk.top.file.punch(place, disk.top.cluster)
                }
                _ => {
                    let zeroes = zeroes.get(..whole(len)?).unwrap_or_default();
                    disk.write_in_cluster(at, zeroes)
                }
            }
        })
    }

    /// Hands all metadata to the kernel; with `wait`, returns once everything written before would
    /// survive a power cut.
    pub(super) fn flush(&mut self, wait: bool) -> io::Result<()> {
        let unwritten: Vec<_> = self.unwritten.iter().map(|(c, b)| (*c, *b)).collect();
        for (cluster, before) in unwritten {
            let at = cluster.saturating_mul(self.top.cluster);
            self.allocate(at, before, None, &[])?;
        }
        self.top.collect_metadata()?;
        self.top.file.replay(wait)?;
        if wait {
            self.top.file.sync()?;
        }
        Ok(())
    }

    /// Writes what there is to be written, and says so when that fails: then the writes since the
    /// last flush are lost, as in a power cut.
    pub(super) fn close(mut self) {
        if !self.top.file.is_sealed()
            && let Err(error) = self.flush(false)
        {
            tracing::error!(
                image = self.label,
                %error,
                "the volume failed: what was written to it since its last flush is lost"
            );
        }
        self.abandon();
    }

    /// Closes the files and leaves the image as it is on the disk.
    pub(super) fn abandon(self) {
        self.top.file.close();
        for below in &self.below {
            if let Some(device) = &below.device {
                device.file.close();
            }
        }
    }

    #[cfg(test)]
    pub(super) fn pretend_full(&mut self) {
        self.top.handed_out(u64::MAX);
    }

    #[cfg(test)]
    pub(super) fn forget_tables(&mut self) {
        self.top.shrink().unwrap();
    }

    /// Calls `f` with the part of the range in each cluster.
    fn pieces(
        &mut self,
        offset: u64,
        len: u64,
        mut f: impl FnMut(&mut Self, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            self.make_room_in_cache()?;
            let cluster_end = (at / self.top.cluster)
                .saturating_add(1)
                .saturating_mul(self.top.cluster);
            let n = end.min(cluster_end).saturating_sub(at);
            f(self, at, n)?;
            at = at.saturating_add(n);
        }
        Ok(())
    }

    /// Writes a part of one cluster.
    fn write_in_cluster(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let before = match self.top_mapped(offset)? {
            Mapped::Data { owned: true, .. } => {
                let (start, end) = sectors(offset, data.len() as u64);
                if (start, end) == (offset, offset.saturating_add(data.len() as u64)) {
                    return self.top.write(data, offset);
                }
                let mut buf = vec![0; whole(end.saturating_sub(start))?];
                self.top.read(&mut buf, start)?;
                put(&mut buf, start, offset, data)?;
                return self.top.write(&buf, start);
            }
            Mapped::Nothing => Before::Nothing,
            Mapped::Zero => Before::Zero,
            // Images that are written to have neither: `Unfit` and `prepare_for_writing`.
            Mapped::Data { owned: false, .. } | Mapped::Compressed => {
                return Err(io::Error::other("the cluster cannot be written in place"));
            }
        };
        self.allocate(offset, before, Some(offset), data)
    }

    /// Gives the cluster at `offset` a place, with what it held before and with `data` at `at`.
    fn allocate(
        &mut self,
        offset: u64,
        before: Before,
        at: Option<u64>,
        data: &[u8],
    ) -> io::Result<()> {
        let number = offset / self.top.cluster;
        let start = number.saturating_mul(self.top.cluster);
        let len = self.top.cluster.min(self.top.size.saturating_sub(start));
        let retry = self.unwritten.contains_key(&number);
        if !retry {
            self.top.has_room()?;
        }
        // A fresh cluster is zeroed by the library: of zeroes, one sector says enough.
        let is_new_zero = at.is_none() && !retry;
        let is_covered = data.len() as u64 == len;
        let empty = before == Before::Zero || is_new_zero || !self.has_data_below(start, len)?;
        let (from, to) = match at {
            _ if retry || (!empty && !is_covered) => (start, start.saturating_add(len)),
            Some(at) => sectors(at, data.len() as u64),
            None => (start, start.saturating_add(SECTOR)),
        };
        let mut content = vec![0; whole(to.saturating_sub(from))?];
        if !empty && !is_covered {
            self.fill(1, &mut content, from)?;
        }
        if let Some(at) = at {
            put(&mut content, from, at, data)?;
        }
        let outcome = self.top.write(&content, from);
        if let Ok(Mapped::Data { at: place, .. }) = self.top.mapped(start) {
            self.top.handed_out(place);
            if outcome.is_err() {
                self.unwritten.insert(number, before);
            } else {
                self.unwritten.remove(&number);
            }
        }
        outcome
    }

    /// What the top says of a cluster, and is to be believed.
    fn top_mapped(&mut self, offset: u64) -> io::Result<Mapped> {
        let cluster = offset / self.top.cluster;
        match self.unwritten.get(&cluster) {
            Some(Before::Nothing) => return Ok(Mapped::Nothing),
            Some(Before::Zero) => return Ok(Mapped::Zero),
            None => {}
        }
        self.slices
            .insert(cluster.wrapping_shr(L2_SLICE_BITS.saturating_sub(3).into()));
        self.top.mapped(offset)
    }

    fn make_room_in_cache(&mut self) -> io::Result<()> {
        if self.slices.len() >= MAX_SLICES {
            if !self.top.file.is_sealed() {
                self.flush(true)?;
            }
            self.top.shrink()?;
            self.slices.clear();
        }
        Ok(())
    }

    /// An image of the chain: 0 is the top.
    fn image(&mut self, level: usize) -> io::Result<Option<&Device>> {
        let Some(level) = level.checked_sub(1) else {
            return Ok(Some(&self.top));
        };
        let Some(below) = self.below.get_mut(level) else {
            return Ok(None);
        };
        if below.device.is_none() {
            let file = Arc::clone(&below.layer.file);
            below.device = Some(Device::open(file, &below.layer.header, false)?);
        }
        Ok(below.device.as_ref())
    }

    fn mapped(&mut self, level: usize, offset: u64) -> io::Result<Mapped> {
        if level == 0 {
            return self.top_mapped(offset);
        }
        self.image(level)?
            .map_or(Ok(Mapped::Nothing), |device| device.mapped(offset))
    }

    /// Fills `buf`, whole sectors, with what the chain from `level` down has. The chain is short
    /// ([`MAX_CHAIN_LIMIT`](crate::qcow2::MAX_CHAIN_LIMIT)), and so is the recursion.
    fn fill(&mut self, level: usize, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            let Some(n) = self.extent(level, offset, buf.len() as u64)? else {
                // Past the end of the chain, or of a backing file that is shorter than its overlay.
                buf.fill(0);
                return Ok(());
            };
            let (piece, rest) = std::mem::take(&mut buf).split_at_mut(whole(n)?);
            match self.mapped(level, offset)? {
                Mapped::Nothing => self.fill(level.saturating_add(1), piece, offset)?,
                Mapped::Zero => piece.fill(0),
                Mapped::Data { .. } | Mapped::Compressed => {
                    if let Some(device) = self.image(level)? {
                        device.read(piece, offset)?;
                    }
                }
            }
            buf = rest;
            offset = offset.saturating_add(n);
        }
        Ok(())
    }

    /// Whether any layer has data in the range.
    fn has_data_below(&mut self, offset: u64, len: u64) -> io::Result<bool> {
        self.has_data(1, offset, len)
    }

    fn has_data(&mut self, level: usize, mut offset: u64, len: u64) -> io::Result<bool> {
        let end = offset.saturating_add(len);
        while offset < end {
            let Some(n) = self.extent(level, offset, end.saturating_sub(offset))? else {
                return Ok(false);
            };
            let found = match self.mapped(level, offset)? {
                Mapped::Nothing => self.has_data(level.saturating_add(1), offset, n)?,
                Mapped::Zero => false,
                Mapped::Data { .. } | Mapped::Compressed => true,
            };
            if found {
                return Ok(true);
            }
            offset = offset.saturating_add(n);
        }
        Ok(false)
    }

    /// How much of the range lies in one cluster of the image at this level; `None` when there is no such image,
    /// or it ends before.
    fn extent(&mut self, level: usize, offset: u64, len: u64) -> io::Result<Option<u64>> {
        let Some(device) = self.image(level)? else {
            return Ok(None);
        };
        let rest = device.cluster.saturating_sub(offset % device.cluster);
        let end = device.size.saturating_sub(offset);
        Ok(Some(len.min(rest).min(end)).filter(|n| *n > 0))
    }
}

/// The whole sectors around a range.
fn sectors(offset: u64, len: u64) -> (u64, u64) {
    let end = offset.saturating_add(len);
    (
        offset.saturating_sub(offset % SECTOR),
        end.next_multiple_of(SECTOR),
    )
}

/// Puts `data`, which belongs at `at`, into `buf`, which starts at `start`.
fn put(buf: &mut [u8], start: u64, at: u64, data: &[u8]) -> io::Result<()> {
    let from = whole(at.saturating_sub(start))?;
    let room = buf.get_mut(from..from.saturating_add(data.len()));
    room.ok_or_else(|| io::Error::other("the data is longer than its cluster"))?
        .copy_from_slice(data);
    Ok(())
}

fn whole(n: u64) -> io::Result<usize> {
    usize::try_from(n).map_err(io::Error::other)
}
