//! Holes: finding them, making them, and zeroing without them.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, retry_on_intr};

use super::io::write_all_at;

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// The parts of a file that may hold something else than zeroes, in order. A file system that does
/// not tell calls everything data.
#[derive(Debug)]
pub(crate) struct DataRanges<'a> {
    file: &'a File,
    rest: Range<u64>,
}

impl<'a> DataRanges<'a> {
    /// Those within `range` of `file`.
    pub(crate) fn new(file: &'a File, range: Range<u64>) -> Self {
        Self { file, rest: range }
    }

    fn find(&mut self) -> io::Result<Option<Range<u64>>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let start = match seek(self.file, SeekFrom::Data(self.rest.start)) {
            Ok(at) => at,
            // No data up to the end.
            Err(Errno::NXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if start >= self.rest.end {
            return Ok(None);
        }
        let end = match seek(self.file, SeekFrom::Hole(start)) {
            Ok(at) => at.min(self.rest.end),
            // Shrunk in between: not something that a locked volume's file does.
            Err(e) => return Err(e.into()),
        };
        if end <= start {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.rest.start = end;
        Ok(Some(start..end))
    }
}

impl Iterator for DataRanges<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find().transpose();
        if !matches!(found, Some(Ok(_))) {
            self.rest.start = self.rest.end;
        }
        found
    }
}

/// Gives the range back to the file system; it reads as zeroes.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where the file system has no holes.
pub(crate) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    retry_on_intr(|| fallocate(file, flags, offset, len)).map_err(unsupported)
}

/// Makes the range read as zeroes and keeps space reserved for it.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where the file system cannot.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    retry_on_intr(|| fallocate(file, flags, offset, len)).map_err(unsupported)
}

fn unsupported(e: Errno) -> io::Error {
    match e {
        // musl, glibc and the kernel spell it in two ways.
        Errno::OPNOTSUPP | Errno::NOSYS => io::Error::new(io::ErrorKind::Unsupported, e),
        other => other.into(),
    }
}

/// Writes zeroes over the range, holes included.
pub(crate) fn write_zeroes(file: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let len =
            usize::try_from(range.end - at).map_or(ZEROES.len(), |left| left.min(ZEROES.len()));
        write_all_at(file, &[IoSlice::new(ZEROES.split_at(len).0)], at)?;
        at += len as u64;
    }
    Ok(())
}

/// Writes zeroes over what is not a hole in the range.
pub(crate) fn overwrite_data(file: &File, range: Range<u64>) -> io::Result<()> {
    for data in DataRanges::new(file, range) {
        write_zeroes(file, data?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 64 << 10).unwrap();
        file.write_all_at(&[1; 4096], 512 << 10).unwrap();
        let found: Vec<_> = DataRanges::new(&file, 0..1 << 20)
            .collect::<io::Result<_>>()
            .unwrap();
        let covers = |at: u64| found.iter().any(|r| r.contains(&at));
        assert!(covers(64 << 10) && covers((512 << 10) + 4095));
        assert!(!covers(0) && !covers(256 << 10) && !covers((1 << 20) - 1));
    }

    #[test]
    fn ranges_stay_within_what_was_asked_for() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 1 << 16], 0).unwrap();
        let found: Vec<_> = DataRanges::new(&file, 100..200)
            .collect::<io::Result<_>>()
            .unwrap();
        assert_eq!(found, std::slice::from_ref(&(100..200)));
    }

    #[test]
    fn zeroing_by_writing_leaves_the_neighbours() {
        for zero in [write_zeroes, overwrite_data] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[7; 200_000], 0).unwrap();
            zero(&file, 1_001..150_001).unwrap();
            let mut content = vec![9; 200_000];
            file.read_exact_at(&mut content, 0).unwrap();
            for (at, byte) in content.iter().enumerate() {
                let expected = if (1_001..150_001).contains(&at) { 0 } else { 7 };
                assert_eq!(*byte, expected, "at {at}");
            }
        }
    }
}
