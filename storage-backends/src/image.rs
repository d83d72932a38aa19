//! Import and export of disk images.
//!
//! A format is always said, never guessed: what a guest wrote at the start of its raw disk must not
//! turn the disk into something else.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::{ControlFlow, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, fstat, openat};

use crate::durable::{self, NewFile};
use crate::qcow2::SingleImage;
use crate::raw::{DataRanges, read_exact_at, write_all_at};
use crate::{Error, ErrorKind, StorageBackend, Volume, VolumeName, size};

/// How an image file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, holes where nothing was written.
    Raw,
    /// QEMU's qcow2, one file on its own.
    Qcow2,
}

impl Format {
    /// The format's name, as `qemu-img` knows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Not the name of a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no image format {0:?}; the formats are raw and qcow2")]
pub struct UnknownFormat(String);

impl std::str::FromStr for Format {
    type Err = UnknownFormat;
    fn from_str(s: &str) -> Result<Self, UnknownFormat> {
        match s {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(UnknownFormat(other.chars().take(64).collect())),
        }
    }
}

/// How far an import or export has come, in bytes of content (holes do not count).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub done: u64,
    /// Of how many.
    pub total: u64,
}

/// Is told of progress, at least once and last when all is done, and may stop the work.
pub type Watch<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// How much is read and written at once.
const PART: usize = 1 << 20;
/// What is looked at for being zero.
const BLOCK: usize = 64 << 10;

/// Why an image is not imported.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "its length of {0} bytes is not a multiple of 512, the sector of a disk: make it one \
         (truncate --size=%512) if the rest may be zeroes"
    )]
    NotSectors(u64),
    #[error("it is neither a regular file nor a block device")]
    NotAnImage,
    #[error("the target needs a file name")]
    NoName,
}

/// Makes the volume `name` from the image at `source`. A file or a block device will do. The volume
/// appears when it is whole and durable, or never.
///
/// # Errors
/// `NotFound`; `Damaged` or `Unsupported` for an image that is refused (a raw one whose length is
/// not a multiple of 512, a qcow2 one with a backing file among them); `Cancelled`; what
/// [`StorageBackend::create_filled`] returns.
pub fn import(
    source: &Path,
    format: Format,
    backend: &dyn StorageBackend,
    name: &VolumeName,
    watch: &mut Watch<'_>,
) -> Result<Arc<dyn Volume>, Error> {
    const OPERATION: &str = "import";
    let label = source.display().to_string();
    let fail = |e| Error::io(OPERATION, &label, e);
    let source = Source::open(source, format, &label)?;
    let ranges = source.ranges()?;
    let mut progress = Reporter::new(&ranges, watch);
    backend.create_filled(name, source.size(), &mut |volume| {
        let read = |buf: &mut [u8], at| source.read(buf, at).map_err(fail);
        let write = |bytes: &[u8], at| {
            volume
                .write_vectored_at(&[IoSlice::new(bytes)], at)
                .map_err(|e| Error::io(OPERATION, name, e))
        };
        transfer(&ranges, read, write, |len| {
            progress.step(OPERATION, &label, len)
        })
    })
}

/// Writes the content of `volume` to a new image at `target`, which appears when it is whole and
/// durable, or never. The caller sees to it that nobody writes to the volume meanwhile.
///
/// # Errors
/// `Exists` when there is something at `target`; `StorageFull`; `Cancelled`.
pub fn export(
    volume: &dyn Volume,
    target: &Path,
    format: Format,
    watch: &mut Watch<'_>,
) -> Result<(), Error> {
    const OPERATION: &str = "export to";
    let label = target.display().to_string();
    let fail = |e: io::Error| Error::io(OPERATION, &label, e);
    let refuse = |why| Error::because(ErrorKind::Invalid, OPERATION, &label, why);
    let name = target.file_name().ok_or_else(|| refuse(Refusal::NoName))?;
    let dir = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(CWD, dir, flags, Mode::empty()).map_err(|e| fail(e.into()))?;
    if durable::is_taken(dir.as_fd(), name).map_err(fail)? {
        return Err(Error::new(ErrorKind::Exists, OPERATION, &label));
    }
    remove_abandoned(&dir).map_err(fail)?;

    let new = NewFile::create(dir.as_fd(), Mode::RUSR | Mode::WUSR).map_err(fail)?;
    let image = Target::create(&new, format, volume.size(), &label)?;
    let ranges = content_of(volume).map_err(fail)?;
    let mut progress = Reporter::new(&ranges, watch);
    let read = |buf: &mut [u8], at| {
        volume
            .read_vectored_at(&mut [IoSliceMut::new(buf)], at)
            .map_err(|e| Error::io("read", volume.name(), e))
    };
    let write = |bytes: &[u8], at| image.write(bytes, at).map_err(fail);
    transfer(&ranges, read, write, |len| {
        progress.step(OPERATION, &label, len)
    })?;
    image.finish().map_err(fail)?;
    new.publish(name).map_err(fail)?;
    durable::sync_dir(&dir).map_err(fail)
}

/// Copies the ranges, passing over blocks of zeroes: both ends begin as all zero.
fn transfer(
    ranges: &[Range<u64>],
    read: impl Fn(&mut [u8], u64) -> Result<(), Error>,
    write: impl Fn(&[u8], u64) -> Result<(), Error>,
    mut step: impl FnMut(u64) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut buf = vec![0; PART];
    step(0)?;
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).map_or(PART, |left| left.min(PART));
            let part = buf.split_at_mut(len).0;
            read(part, at)?;
            for (offset, block) in (at..).step_by(BLOCK).zip(part.chunks(BLOCK)) {
                if block.iter().any(|byte| *byte != 0) {
                    write(block, offset)?;
                }
            }
            at += len as u64;
            step(len as u64)?;
        }
    }
    Ok(())
}

/// Tells the watcher, and hears whether to stop.
struct Reporter<'a, 'w> {
    progress: Progress,
    watch: &'a mut Watch<'w>,
}

impl<'a, 'w> Reporter<'a, 'w> {
    fn new(ranges: &[Range<u64>], watch: &'a mut Watch<'w>) -> Self {
        let total = ranges.iter().map(|r| r.end - r.start).sum();
        Self {
            progress: Progress { done: 0, total },
            watch,
        }
    }

    fn step(&mut self, operation: &'static str, label: &str, len: u64) -> Result<(), Error> {
        self.progress.done += len;
        match (self.watch)(self.progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::new(ErrorKind::Cancelled, operation, label)),
        }
    }
}

/// An image that is read.
enum Source {
    Raw { file: File, size: u64 },
    Qcow2(SingleImage),
}

impl Source {
    fn open(path: &Path, format: Format, label: &str) -> Result<Self, Error> {
        const OPERATION: &str = "import";
        let fail = |e: io::Error| Error::io(OPERATION, label, e);
        let refuse = |why| Error::because(ErrorKind::Unsupported, OPERATION, label, why);
        // NONBLOCK: a FIFO that nobody writes to is refused, not waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd: OwnedFd = openat(CWD, path, flags, Mode::empty()).map_err(|e| fail(e.into()))?;
        let kind = fstat(&fd).map_err(|e| fail(e.into()))?.st_mode;
        let file = File::from(fd);
        match FileType::from_raw_mode(kind) {
            FileType::RegularFile | FileType::BlockDevice => {}
            _ => return Err(refuse(Refusal::NotAnImage)),
        }
        match format {
            Format::Qcow2 => {
                let image = SingleImage::open(file, label.to_owned(), OPERATION)?;
                if size::is_valid(image.size()) {
                    Ok(Self::Qcow2(image))
                } else {
                    Err(refuse(Refusal::NotSectors(image.size())))
                }
            }
            Format::Raw => {
                let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(fail)?;
                if size::is_valid(size) {
                    Ok(Self::Raw { file, size })
                } else {
                    Err(refuse(Refusal::NotSectors(size)))
                }
            }
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(image) => image.size(),
        }
    }

    fn ranges(&self) -> Result<Vec<Range<u64>>, Error> {
        const OPERATION: &str = "import";
        match self {
            Self::Raw { file, size } => DataRanges::new(file, 0..*size)
                .collect::<io::Result<_>>()
                .map_err(|e| Error::io(OPERATION, "the image", e)),
            Self::Qcow2(image) => image.ranges(OPERATION),
        }
    }

    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Raw { file, .. } => read_exact_at(file, &mut [IoSliceMut::new(buf)], at),
            Self::Qcow2(image) => image.read(buf, at),
        }
    }
}

/// An image that is written.
enum Target<'a> {
    Raw(&'a File),
    Qcow2(SingleImage),
}

impl<'a> Target<'a> {
    fn create(new: &'a NewFile<'_>, format: Format, size: u64, label: &str) -> Result<Self, Error> {
        const OPERATION: &str = "export to";
        let fail = |e| Error::io(OPERATION, label, e);
        match format {
            Format::Raw => {
                new.file().set_len(size).map_err(fail)?;
                Ok(Self::Raw(new.file()))
            }
            Format::Qcow2 => {
                let file = new.file().try_clone().map_err(fail)?;
                let image = SingleImage::create(file, label.to_owned(), size, OPERATION)?;
                Ok(Self::Qcow2(image))
            }
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => write_all_at(file, &[IoSlice::new(bytes)], at),
            Self::Qcow2(image) => image.write(bytes, at),
        }
    }

    fn finish(&self) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.sync_all(),
            Self::Qcow2(image) => image.finish(),
        }
    }
}

/// What of a volume may be something else than zeroes, as far as that can be told beforehand.
fn content_of(volume: &dyn Volume) -> io::Result<Vec<Range<u64>>> {
    match volume.raw_file() {
        Some(file) => DataRanges::new(file, 0..volume.size()).collect(),
        None => Ok(std::iter::once(0..volume.size()).collect()),
    }
}

/// Removes what an export that was killed has left in the directory.
fn remove_abandoned(dir: &OwnedFd) -> io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if let Ok(name) = entry.file_name().to_str()
            && durable::is_temporary(name)
            && durable::remove_if_abandoned(dir.as_fd(), name)?
        {
            tracing::info!(name, "removed what an interrupted export had left");
        }
    }
    Ok(())
}
