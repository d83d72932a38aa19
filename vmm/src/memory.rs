//! Guest RAM: where it lies in the guest, what backs it on the host, and how it is given back.
//!
//! # Rules of the unsafe code here
//! A `Mapping` owns one `mmap` of ours. Its address and length never change while it lives, it
//! stays readable and writable, and what lies behind it is replaced only by `madvise`, which
//! changes bytes but unmaps nothing. Rust never holds a reference into it: the guest and the
//! kernel write to it at any time, so all access goes through `vm-memory`'s volatile slices.
//!
//! `vm-memory` borrows the mapping by a raw pointer and does not know its owner. `Mapping`
//! therefore keeps a handle on `vm-memory`'s region, and unmaps only when it holds the last one:
//! as long as anybody could still reach the bytes, they stay mapped.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use offshoot_devices::GuestRam;
use offshoot_devices::virtio::balloon::{GuestRange, PageReclaim};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use crate::error::{Context, Error, ErrorKind, Result};

/// Where low RAM ends at the latest, and with it begins the space for devices.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where high RAM begins.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// The size of the huge pages that mappings are aligned for.
const HUGE_PAGE: usize = 2 << 20;
const MIB: u64 = 1 << 20;

/// An amount of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RamSize(u64);

impl RamSize {
    /// The smallest machine.
    pub const MIN: Self = Self(2 * MIB);
    /// The largest machine.
    pub const MAX: Self = Self(1 << 42);

    /// `mib` MiB of RAM.
    ///
    /// # Errors
    /// When there is no machine of this size.
    pub fn from_mib(mib: u64) -> Result<Self> {
        Self::from_bytes(mib.saturating_mul(MIB))
    }

    /// `bytes` bytes of RAM, a multiple of 1 MiB.
    ///
    /// # Errors
    /// When there is no machine of this size.
    pub fn from_bytes(bytes: u64) -> Result<Self> {
        let size = Self(bytes);
        if bytes.is_multiple_of(MIB) && (Self::MIN..=Self::MAX).contains(&size) {
            Ok(size)
        } else {
            Err(Error::new(
                ErrorKind::Config,
                format!("{bytes} bytes is not a size of RAM: whole MiB from 2 MiB to 4 TiB"),
            ))
        }
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// One contiguous piece of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamPart {
    /// Where the guest sees it.
    pub guest: GuestAddress,
    /// Where it lies in the memory image, in bytes.
    pub image: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// The parts of RAM of a machine of the given size: from 0, and from 4 GiB what does not fit
/// under the device space.
#[must_use]
pub fn ram_parts(size: RamSize) -> Vec<RamPart> {
    let low = size.0.min(LOW_RAM_END);
    let mut parts = vec![RamPart {
        guest: GuestAddress(0),
        image: 0,
        len: low,
    }];
    if size.0 > low {
        parts.push(RamPart {
            guest: GuestAddress(HIGH_RAM_START),
            image: low,
            len: size.0 - low,
        });
    }
    parts
}

/// Our own mapping of one part of RAM.
#[derive(Debug)]
struct Mapping {
    region: Option<Arc<MmapRegion>>,
    /// Whether it ends with this object; an inherited one ends with the process.
    ours: bool,
}

impl Mapping {
    /// Maps `len` bytes privately, 2 MiB aligned: fresh zeroes, or `file` from `offset` on.
    fn new(len: usize, file: Option<(&File, u64)>) -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let reserve = len
            .checked_add(HUGE_PAGE)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let raw = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserve,
                libc::PROT_NONE,
                flags | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let raw: *mut u8 = raw.cast();
        let head = raw.align_offset(HUGE_PAGE);
        // Within the reservation: head < HUGE_PAGE, so head + len <= reserve.
        let start = raw.wrapping_add(head);
        let (fd, fd_offset, anonymous) = match file {
            Some((file, offset)) => (
                file.as_raw_fd(),
                libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?,
                0,
            ),
            None => (-1, 0, libc::MAP_ANONYMOUS),
        };
        // SAFETY: `start..start + len` lies inside the reservation just made, which nobody knows
        // of yet; the calls below only replace or shorten that reservation.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                len,
                prot,
                flags | libc::MAP_FIXED | anonymous,
                fd,
                fd_offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: as above; the reservation is whole, the failed call changed nothing.
            unsafe { libc::munmap(raw.cast(), reserve) };
            return Err(error);
        }
        // SAFETY: the two ends of the reservation that the mapping does not cover, page-aligned
        // because `len` and the alignment are; nobody uses them.
        unsafe {
            if head > 0 {
                libc::munmap(raw.cast(), head);
            }
            let tail = reserve - head - len;
            if tail > 0 {
                libc::munmap(start.wrapping_add(len).cast(), tail);
            }
        }
        if file.is_none() {
            // SAFETY: advice on a mapping of ours changes no content. Where huge pages are off
            // it fails, and the mapping works with small ones.
            unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: `start..start + len` is mapped, readable and writable, until `drop`, which
        // checks that nobody but this `Mapping` holds the region.
        let region = unsafe {
            MmapRegionBuilder::<()>::new(len)
                .with_raw_mmap_pointer(start)
                .with_mmap_prot(prot)
                .with_mmap_flags(flags)
                .build()
        };
        let region = region.map_err(|e| {
            // SAFETY: the mapping made above, which no one else has seen.
            unsafe { libc::munmap(start.cast(), len) };
            io::Error::other(e)
        })?;
        Ok(Self {
            region: Some(Arc::new(region)),
            ours: true,
        })
    }

    fn region(&self) -> io::Result<Arc<MmapRegion>> {
        self.region
            .clone()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        match self.region.take().map(Arc::try_unwrap) {
            Some(Ok(region)) => {
                // SAFETY: the mapping is ours, and `try_unwrap` proved that nobody else holds the
                // region through which its bytes could be reached.
                unsafe { libc::munmap(region.as_ptr().cast(), region.size()) };
            }
            Some(Err(still_used)) => {
                tracing::error!(
                    bytes = still_used.size(),
                    "guest memory is still in use; it stays mapped"
                );
            }
            None => {}
        }
    }
}

/// What a machine's RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory, zero at first, with huge pages where the host has them.
    Anonymous,
    /// A private mapping of a memory image.
    Image,
}

/// A machine's RAM, mapped.
#[derive(Debug)]
pub struct Memory {
    // Before `mappings`: it is dropped first, so that they find themselves the last holders.
    ram: Arc<GuestRam>,
    mappings: Vec<Mapping>,
    size: RamSize,
    backing: Backing,
}

impl Memory {
    /// Fresh RAM, all zero.
    ///
    /// # Errors
    /// When the address space cannot be had.
    pub fn anonymous(size: RamSize) -> Result<Self> {
        Self::map(size, None)
    }

    /// RAM that begins as a copy of `image`, which holds the parts one after the other. Pages are
    /// shared with every other mapping of the file until they are written. The file's bytes must
    /// not change while it is mapped.
    ///
    /// # Errors
    /// When the image is shorter than the RAM or cannot be mapped.
    pub fn from_image(size: RamSize, image: &File, offset: u64) -> Result<Self> {
        let len = image
            .metadata()
            .context("cannot read the memory image's size")?
            .len();
        if offset.checked_add(size.0).is_none_or(|end| end > len) {
            return Err(Error::new(
                ErrorKind::BadState,
                format!(
                    "the memory image is too short: {len} bytes, for {} bytes of RAM at {offset}",
                    size.0
                ),
            ));
        }
        Self::map(size, Some((image, offset)))
    }

    fn map(size: RamSize, image: Option<(&File, u64)>) -> Result<Self> {
        const WHAT: &str = "cannot map the guest's memory";
        let mut mappings = Vec::new();
        for part in ram_parts(size) {
            let len = usize::try_from(part.len)
                .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))
                .context(WHAT)?;
            let file = image.map(|(file, offset)| (file, offset + part.image));
            mappings.push(Mapping::new(len, file).context(WHAT)?);
        }
        let backing = match image {
            Some(_) => Backing::Image,
            None => Backing::Anonymous,
        };
        Self::over(mappings, size, backing)
    }

    fn over(mappings: Vec<Mapping>, size: RamSize, backing: Backing) -> Result<Self> {
        const WHAT: &str = "cannot map the guest's memory";
        let mut regions = Vec::new();
        for (part, mapping) in ram_parts(size).into_iter().zip(&mappings) {
            let region = GuestRegionMmap::with_arc(mapping.region().context(WHAT)?, part.guest)
                .ok_or_else(|| Error::new(ErrorKind::Config, WHAT))?;
            regions.push(region);
        }
        let ram = GuestRam::from_regions(regions)
            .map_err(|e| Error::because(ErrorKind::System, WHAT, e))?;
        Ok(Self {
            ram: Arc::new(ram),
            mappings,
            size,
            backing,
        })
    }

    /// The same RAM as another machine's, for a process that was forked from that machine's: there
    /// the other machine is gone, and its pages are this process's own copies. The other `Memory`
    /// must stay alive, forgotten, because the mappings are its.
    pub(crate) fn inherited(other: &Self) -> Result<Self> {
        let mappings = other.mappings.iter().map(|mapping| Mapping {
            region: mapping.region.clone(),
            ours: false,
        });
        Self::over(mappings.collect(), other.size, other.backing)
    }

    /// The RAM as devices see it.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// How much it is.
    #[must_use]
    pub fn size(&self) -> RamSize {
        self.size
    }

    /// What it is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The parts, each with the host address at which this process has it mapped.
    pub(crate) fn host_parts(&self) -> impl Iterator<Item = (RamPart, *mut u8)> + '_ {
        let pointers = self
            .mappings
            .iter()
            .filter_map(|m| m.region.as_ref())
            .map(|r| r.as_ptr());
        ram_parts(self.size).into_iter().zip(pointers)
    }
}

/// Gives `len` bytes of RAM from `start` on back to the host. The guest has said that it does not
/// need their content.
///
/// Anonymous RAM reads as zeroes afterwards. RAM that began as an image falls back to what the
/// image has there: the private copy is given back and the image's page is shared with every
/// other copy again. That is the guest's own older content, which virtio allows (1.2, 5.5.6: what
/// a page holds after the balloon is undefined; page poisoning is not offered). The alternative,
/// fresh anonymous memory mapped over the hole, would split the mapping at every page that a guest
/// names, up to the host's limit on mappings.
///
/// # Errors
/// When the range is not page-aligned RAM, or the host refuses.
pub fn reclaim(ram: &GuestRam, start: GuestAddress, len: usize) -> Result<()> {
    const WHAT: &str = "cannot give guest memory back";
    if !start.0.is_multiple_of(4096) || !len.is_multiple_of(4096) {
        return Err(Error::new(ErrorKind::Device, WHAT));
    }
    let slice = ram
        .get_slice(start, len)
        .map_err(|e| Error::because(ErrorKind::Device, WHAT, e))?;
    // SAFETY: `get_slice` proved the range to lie inside one mapping of guest RAM. Its content
    // may change at any time anyway (volatile), and it stays mapped.
    let done = unsafe {
        libc::madvise(
            slice.ptr_guard_mut().as_ptr().cast(),
            len,
            libc::MADV_DONTNEED,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context(WHAT)
    }
}

/// Gives pages that the balloon names back to the host.
#[derive(Debug)]
pub(crate) struct RamReclaim(Arc<GuestRam>);

impl RamReclaim {
    pub(crate) fn boxed(memory: &Memory) -> Box<dyn PageReclaim> {
        Box::new(Self(Arc::clone(&memory.ram)))
    }
}

impl PageReclaim for RamReclaim {
    fn reclaim(&self, range: GuestRange) -> io::Result<()> {
        let len = usize::try_from(range.len).map_err(|_| io::ErrorKind::InvalidInput)?;
        reclaim(&self.0, range.start, len).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::*;

    #[test]
    fn parts_leave_the_device_space_out() {
        let small = RamSize::from_mib(256).unwrap();
        assert_eq!(ram_parts(small).len(), 1);
        let large = RamSize::from_mib(3584).unwrap();
        let parts = ram_parts(large);
        assert_eq!(parts[0].len, LOW_RAM_END);
        assert_eq!(parts[1].guest, GuestAddress(HIGH_RAM_START));
        assert_eq!(parts[1].image, LOW_RAM_END);
        assert_eq!(parts[1].len, 512 * MIB);
        assert!(RamSize::from_mib(1).is_err());
        assert!(RamSize::from_bytes(4096 + 2 * MIB).is_err());
        assert!(RamSize::from_mib(u64::MAX).is_err());
    }

    #[test]
    fn mappings_are_aligned_and_start_as_zeroes() {
        let memory = Memory::anonymous(RamSize::from_mib(3584).unwrap()).unwrap();
        for region in memory.ram().iter() {
            assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0);
        }
        let byte: u8 = memory
            .ram()
            .read_obj(GuestAddress(HIGH_RAM_START + 12345))
            .unwrap();
        assert_eq!(byte, 0);
        assert!(
            memory
                .ram()
                .read_obj::<u8>(GuestAddress(LOW_RAM_END))
                .is_err()
        );
        assert_eq!(
            memory.ram().iter().map(|r| r.len()).sum::<u64>(),
            3584 * MIB
        );
    }

    #[test]
    fn an_image_is_copied_on_write_and_comes_back_when_reclaimed() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(4096 + 2 * MIB).unwrap();
        file.seek(SeekFrom::Start(4096 + 8192)).unwrap();
        file.write_all(b"before").unwrap();
        let size = RamSize::from_mib(2).unwrap();
        let one = Memory::from_image(size, &file, 4096).unwrap();
        let other = Memory::from_image(size, &file, 4096).unwrap();
        let at = GuestAddress(8192);
        one.ram().write_slice(b"change", at).unwrap();
        let read = |m: &Memory| {
            let mut bytes = [0; 6];
            m.ram().read_slice(&mut bytes, at).unwrap();
            bytes
        };
        assert_eq!(&read(&one), b"change");
        assert_eq!(&read(&other), b"before");
        reclaim(one.ram(), GuestAddress(8192), 4096).unwrap();
        assert_eq!(&read(&one), b"before");
        assert!(reclaim(one.ram(), GuestAddress(8193), 4096).is_err());
        assert!(reclaim(one.ram(), GuestAddress(2 * MIB), 4096).is_err());
        assert!(Memory::from_image(size, &file, 8192).is_err());
    }

    #[test]
    fn reclaimed_anonymous_memory_is_zero() {
        let memory = Memory::anonymous(RamSize::from_mib(4).unwrap()).unwrap();
        memory.ram().write_obj(7_u64, GuestAddress(4096)).unwrap();
        reclaim(memory.ram(), GuestAddress(4096), 4096).unwrap();
        assert_eq!(memory.ram().read_obj::<u64>(GuestAddress(4096)).unwrap(), 0);
    }

    #[test]
    fn memory_in_use_outlives_its_machine() {
        let memory = Memory::anonymous(RamSize::from_mib(2).unwrap()).unwrap();
        let ram = Arc::clone(memory.ram());
        drop(memory);
        ram.write_obj(1_u8, GuestAddress(0)).unwrap();
    }
}
