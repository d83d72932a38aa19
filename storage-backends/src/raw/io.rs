//! Whole transfers at an offset, without a position shared between threads.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};

use rustix::io::{preadv, pwritev, retry_on_intr};

/// Fills all of `bufs` from `offset` on. The file ending early is an error: a volume's file has
/// the volume's size.
pub(crate) fn read_exact_at(
    file: &File,
    bufs: &mut [IoSliceMut<'_>],
    offset: u64,
) -> io::Result<()> {
    let total: usize = bufs.iter().map(|b| b.len()).sum();
    let mut done = retry_on_intr(|| preadv(file, bufs, offset))?;
    // Going on is rare: more slices than the kernel takes at once, or a signal. The caller's slices
    // stay as they are.
    while done < total {
        let mut skip = done;
        let mut rest = Vec::new();
        for buf in bufs.iter_mut() {
            let past = skip.min(buf.len());
            skip -= past;
            if past < buf.len() {
                rest.push(IoSliceMut::new(buf.split_at_mut(past).1));
            }
        }
        match retry_on_intr(|| preadv(file, &mut rest, offset + done as u64))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Writes all of `bufs` from `offset` on.
pub(crate) fn write_all_at(file: &File, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
    let total: usize = bufs.iter().map(|b| b.len()).sum();
    let mut done = retry_on_intr(|| pwritev(file, bufs, offset))?;
    while done < total {
        let mut skip = done;
        let mut rest = Vec::new();
        for buf in bufs {
            let past = skip.min(buf.len());
            skip -= past;
            if past < buf.len() {
                rest.push(IoSlice::new(buf.split_at(past).1));
            }
        }
        match retry_on_intr(|| pwritev(file, &rest, offset + done as u64))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => done += n,
        }
    }
    Ok(())
}
