//! A volume whose faults and delays a test decides, over a real file.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use offshoot_storage::{Volume, VolumeName};

/// A raw file as a volume. It hands out the file itself only if `raw` is set.
#[derive(Debug)]
pub(super) struct TestVolume {
    name: VolumeName,
    pub(super) file: File,
    size: u64,
    pub(super) raw: bool,
    pub(super) read_only: bool,
    /// Every change and every flush fails with EIO.
    pub(super) fail_changes: AtomicBool,
    /// Every read fails with EIO, after it has filled its buffers.
    pub(super) fail_reads: AtomicBool,
    /// Every call panics.
    pub(super) panics: AtomicBool,
    /// Calls wait while it is closed.
    pub(super) gate: Gate,
    pub(super) flushes: AtomicU64,
}

/// Lets calls pass, or holds them.
#[derive(Debug, Default)]
pub(super) struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
    /// How many calls have come to the gate.
    pub(super) came: AtomicU64,
}

impl Gate {
    pub(super) fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        self.came.fetch_add(1, Ordering::SeqCst);
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.changed.wait(closed).unwrap();
        }
    }
}

impl TestVolume {
    pub(super) fn new(size: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Self {
            name: VolumeName::new("test").unwrap(),
            file,
            size,
            raw: true,
            read_only: false,
            fail_changes: AtomicBool::new(false),
            fail_reads: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            gate: Gate::default(),
            flushes: AtomicU64::new(0),
        }
    }

    pub(super) fn arc(self) -> Arc<Self> {
        Arc::new(self)
    }

    pub(super) fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).unwrap()];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn enter(&self, fault: &AtomicBool) -> io::Result<()> {
        self.gate.pass();
        assert!(!self.panics.load(Ordering::SeqCst), "told to");
        if fault.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        inside
            .then_some(())
            .ok_or(io::ErrorKind::InvalidInput.into())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.enter(&self.fail_changes)?;
        self.check(offset, len)?;
        let zeroes = vec![0; usize::try_from(len).unwrap()];
        self.file.write_all_at(&zeroes, offset)
    }
}

impl Volume for TestVolume {
    fn name(&self) -> &VolumeName {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], mut offset: u64) -> io::Result<()> {
        let len: usize = bufs.iter().map(|b| b.len()).sum();
        self.check(offset, len as u64)?;
        for buf in &mut *bufs {
            self.file.read_exact_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        self.enter(&self.fail_reads)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        self.enter(&self.fail_changes)?;
        let len: usize = bufs.iter().map(|b| b.len()).sum();
        self.check(offset, len as u64)?;
        for buf in bufs {
            self.file.write_all_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.enter(&self.fail_changes)?;
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn raw_file(&self) -> Option<&File> {
        self.raw.then_some(&self.file)
    }
}
