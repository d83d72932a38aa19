//! FIEMAP: which of a file's extents belong to other files too.
//!
//! # Rules of the unsafe code
//! One ioctl, on one `repr(C)` structure that says itself how many extents it has room for; the
//! kernel writes nothing beyond it, and every bit pattern of it is a valid value.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Extents asked for at once.
const BATCH: usize = 128;
const BATCH_U32: u32 = 128;

/// `_IOWR('f', 11, struct fiemap)`, linux/fs.h.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;
/// The last extent of the file.
const LAST: u32 = 0x1;
/// Space is shared with other files.
const SHARED: u32 = 0x2000;

/// `struct fiemap_extent`, linux/fiemap.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` and room for extents behind it.
#[repr(C)]
#[derive(Debug)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; BATCH],
}

const _: () = assert!(size_of::<Extent>() == 56);
const _: () = assert!(size_of::<Map>() == 32 + 56 * BATCH);
const _: () = assert!(BATCH_U32 as usize == BATCH);

/// How many bytes of `file` lie in shared extents. Data that has not reached the disk yet belongs
/// to nobody else and is not waited for.
pub(super) fn shared_bytes(file: &File) -> io::Result<u64> {
    let mut shared = 0_u64;
    let mut start = 0;
    loop {
        let mut map = Map {
            start,
            length: u64::MAX.saturating_sub(start),
            flags: 0,
            mapped: 0,
            count: BATCH_U32,
            reserved: 0,
            extents: [Extent::default(); BATCH],
        };
        // SAFETY: `map` lives until the call returns and is exclusively borrowed; `count` extents
        // fit behind its header (asserted above), and the kernel writes at most that many.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
        if result < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        let found = map
            .extents
            .get(..usize::try_from(map.mapped).unwrap_or(BATCH))
            .unwrap_or(&map.extents);
        for extent in found {
            if extent.flags & SHARED != 0 {
                shared = shared.saturating_add(extent.length);
            }
        }
        match found.last() {
            Some(last) if last.flags & LAST == 0 => {
                let next = last.logical.saturating_add(last.length);
                if next <= start {
                    // Extents that do not advance would keep us here for ever.
                    return Err(io::ErrorKind::InvalidData.into());
                }
                start = next;
            }
            _ => return Ok(shared),
        }
    }
}
