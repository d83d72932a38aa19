//! A volume whose faults and delays a test decides, over one of the copy backend.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use offshoot_storage::{StorageBackend, Volume, VolumeName, copy};

/// A volume of the copy backend. It hands out its file only if `raw` is set.
#[derive(Debug)]
pub(super) struct TestVolume {
    inner: Arc<dyn Volume>,
    _backend: Arc<dyn StorageBackend>,
    _dir: tempfile::TempDir,
    pub(super) raw: bool,
    /// Handed out instead of the volume's own file.
    pub(super) raw_instead: Option<File>,
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
        let dir = tempfile::tempdir().unwrap();
        let backend = copy::open(dir.path()).unwrap();
        let inner = backend
            .create(&VolumeName::new("test").unwrap(), size)
            .unwrap();
        Self {
            inner,
            _backend: backend,
            _dir: dir,
            raw: true,
            raw_instead: None,
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
        let mut bytes = vec![0; usize::try_from(self.inner.size()).unwrap()];
        self.inner
            .read_vectored_at(&mut [IoSliceMut::new(&mut bytes)], 0)
            .unwrap();
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
}

impl Volume for TestVolume {
    fn name(&self) -> &VolumeName {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.inner.read_vectored_at(bufs, offset)?;
        self.enter(&self.fail_reads)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.enter(&self.fail_changes)?;
        self.inner.write_vectored_at(bufs, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.enter(&self.fail_changes)?;
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.enter(&self.fail_changes)?;
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.enter(&self.fail_changes)?;
        self.inner.write_zeroes(offset, len, unmap)
    }

    fn raw_file(&self) -> Option<&File> {
        if self.raw_instead.is_some() {
            self.raw_instead.as_ref()
        } else {
            self.inner.raw_file().filter(|_| self.raw)
        }
    }
}
