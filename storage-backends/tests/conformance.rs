//! The conformance suite itself: a backend that breaks a promise fails the case that is about it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

use offshoot_storage::conformance::{self, Options};
use offshoot_storage::{
    Access, Capabilities, Durability, Error, LayerName, StorageBackend, Usage, Volume, VolumeName,
    copy,
};

/// What is wrong with a backend that is otherwise the copy backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defect {
    DiscardDoesNothing,
    DiscardRoundsToBlocks,
    ZeroesSpillOver,
    ReadOnlyIsWritable,
    ShortReadsLeaveTheRest,
    OutOfRangeIsCut,
    LosesUnflushedWritesOnFreeze,
    SharesBlocksIsALie,
    ListsAreUnsorted,
    FailedFillStays,
    EverybodyMayOpen,
    FlattenOpenVolumes,
    TwoForksOfOneName,
}

#[derive(Debug)]
struct Broken(Arc<dyn StorageBackend>, Defect);

#[derive(Debug)]
struct BrokenVolume(Arc<dyn Volume>, Defect);

impl Broken {
    fn volume(&self, volume: Arc<dyn Volume>) -> Arc<dyn Volume> {
        Arc::new(BrokenVolume(volume, self.1))
    }
}

impl Volume for BrokenVolume {
    fn name(&self) -> &VolumeName {
        self.0.name()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        self.0.is_read_only() && self.1 != Defect::ReadOnlyIsWritable
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let most = match self.1 {
            Defect::ShortReadsLeaveTheRest => bufs.len().min(1024),
            _ => bufs.len(),
        };
        self.0.read_vectored_at(bufs.split_at_mut(most).0, offset)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        if self.1 == Defect::OutOfRangeIsCut && offset >= self.size() {
            return Ok(());
        }
        self.0.write_vectored_at(bufs, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.1 {
            Defect::DiscardDoesNothing => self.0.discard(offset, 0),
            Defect::DiscardRoundsToBlocks => {
                let start = offset.next_multiple_of(4096);
                let end = (offset + len) / 4096 * 4096;
                self.0
                    .discard(start.min(self.size()), end.saturating_sub(start))
            }
            _ => self.0.discard(offset, len),
        }
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match self.1 {
            Defect::ZeroesSpillOver if len > 0 && offset + len < self.size() => {
                self.0.write_zeroes(offset, len + 1, unmap)
            }
            _ => self.0.write_zeroes(offset, len, unmap),
        }
    }
    fn raw_file(&self) -> Option<&File> {
        None
    }
}

impl StorageBackend for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.0.capabilities();
        capabilities.shares_blocks |= self.1 == Defect::SharesBlocksIsALie;
        capabilities
    }
    fn create(&self, name: &VolumeName, size: u64) -> Result<Arc<dyn Volume>, Error> {
        Ok(self.volume(self.0.create(name, size)?))
    }
    fn create_filled(
        &self,
        name: &VolumeName,
        size: u64,
        fill: &mut dyn FnMut(&dyn Volume) -> Result<(), Error>,
    ) -> Result<Arc<dyn Volume>, Error> {
        if self.1 == Defect::FailedFillStays {
            let volume = self.0.create(name, size)?;
            fill(&*volume)?;
            return Ok(self.volume(volume));
        }
        Ok(self.volume(self.0.create_filled(name, size, fill)?))
    }
    fn open(&self, name: &VolumeName, access: Access) -> Result<Arc<dyn Volume>, Error> {
        let access = match self.1 {
            Defect::EverybodyMayOpen => Access::ReadOnly,
            _ => access,
        };
        Ok(self.volume(self.0.open(name, access)?))
    }
    fn freeze(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        durability: Durability,
    ) -> Result<(), Error> {
        if self.1 == Defect::LosesUnflushedWritesOnFreeze {
            let size = self.0.usage(volume)?.size;
            let scratch = VolumeName::new("scratch").unwrap();
            self.0.create(&scratch, size)?;
            self.0.freeze(&scratch, layer, durability)?;
            return self.0.delete(&scratch);
        }
        self.0.freeze(volume, layer, durability)
    }
    fn sync_layer(&self, layer: &LayerName) -> Result<(), Error> {
        self.0.sync_layer(layer)
    }
    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Result<Arc<dyn Volume>, Error> {
        if self.1 == Defect::TwoForksOfOneName && self.0.volumes()?.contains(volume) {
            return self.0.open_layer(layer);
        }
        Ok(self.volume(self.0.fork(layer, volume)?))
    }
    fn open_layer(&self, layer: &LayerName) -> Result<Arc<dyn Volume>, Error> {
        Ok(self.volume(self.0.open_layer(layer)?))
    }
    fn flatten(&self, volume: &VolumeName) -> Result<(), Error> {
        if self.1 == Defect::FlattenOpenVolumes {
            return self.0.check(volume);
        }
        self.0.flatten(volume)
    }
    fn delete(&self, volume: &VolumeName) -> Result<(), Error> {
        self.0.delete(volume)
    }
    fn delete_layer(&self, layer: &LayerName) -> Result<(), Error> {
        self.0.delete_layer(layer)
    }
    fn volumes(&self) -> Result<Vec<VolumeName>, Error> {
        let mut names = self.0.volumes()?;
        if self.1 == Defect::ListsAreUnsorted {
            names.reverse();
        }
        Ok(names)
    }
    fn layers(&self) -> Result<Vec<LayerName>, Error> {
        self.0.layers()
    }
    fn usage(&self, volume: &VolumeName) -> Result<Usage, Error> {
        self.0.usage(volume)
    }
    fn check(&self, volume: &VolumeName) -> Result<(), Error> {
        self.0.check(volume)
    }
    fn descriptors(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        self.0.descriptors()
    }
    fn forget_open(&self) {
        self.0.forget_open();
    }
}

#[test]
fn every_defect_is_found_by_the_case_that_is_about_it() {
    use Defect::{
        DiscardDoesNothing, DiscardRoundsToBlocks, EverybodyMayOpen, FailedFillStays,
        FlattenOpenVolumes, ListsAreUnsorted, LosesUnflushedWritesOnFreeze, OutOfRangeIsCut,
        ReadOnlyIsWritable, SharesBlocksIsALie, ShortReadsLeaveTheRest, TwoForksOfOneName,
        ZeroesSpillOver,
    };
    for (defect, case) in [
        (DiscardDoesNothing, "zeroes"),
        (DiscardRoundsToBlocks, "zeroes"),
        (ZeroesSpillOver, "model"),
        (ReadOnlyIsWritable, "reopening"),
        (ShortReadsLeaveTheRest, "reads and writes"),
        (OutOfRangeIsCut, "reads and writes"),
        (LosesUnflushedWritesOnFreeze, "freezing an open volume"),
        (SharesBlocksIsALie, "capabilities"),
        (ListsAreUnsorted, "names"),
        (FailedFillStays, "filled creation"),
        (EverybodyMayOpen, "locks"),
        (FlattenOpenVolumes, "flattening"),
        (TwoForksOfOneName, "threads on one store"),
    ] {
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let open = |path: &Path| -> Result<Arc<dyn StorageBackend>, Error> {
            Ok(Arc::new(Broken(copy::open(path)?, defect)))
        };
        let mut options = Options::default();
        options.only = Some(case.to_owned());
        let report = conformance::run(&open, dir.path(), &options);
        let failed: Vec<_> = report.failures().map(|(name, _)| name).collect();
        assert_eq!(failed, [case], "{defect:?}\n{report}");
    }
}

#[test]
fn a_run_without_cases_has_not_passed() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = Options::default();
    options.only = Some("no such case".to_owned());
    assert!(!conformance::run(&copy::open, dir.path(), &options).passed());
}

#[test]
fn a_failure_names_the_seed_and_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| -> Result<Arc<dyn StorageBackend>, Error> {
        Ok(Arc::new(Broken(copy::open(path)?, Defect::ZeroesSpillOver)))
    };
    let mut options = Options::default();
    options.only = Some("model".to_owned());
    options.operations = 500;
    options.seed = 0xabc;
    let report = conformance::run(&open, dir.path(), &options).to_string();
    for part in [
        "FAIL  model",
        "seed 0xabc",
        "step ",
        "differs at byte",
        "model.rs:",
    ] {
        assert!(report.contains(part), "{part} is not in {report}");
    }
}
