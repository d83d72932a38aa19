//! A store of raw files.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{Mode, fchmod, fstat};

use super::holes::punch;
use super::io::write_all_at;
use super::volume::RawVolume;
use crate::dir::{self, Room, StoreDir};
use crate::durable::{NewFile, sync_dir};
use crate::lock::Lock;
use crate::size::{self, BadSize};
use crate::{
    Access, Capabilities, Durability, Error, ErrorKind, ForkCost, LayerName, StorageBackend, Usage,
    Volume, VolumeName,
};

/// How a store of raw files duplicates one.
pub(crate) trait Duplicate: Send + Sync + Debug + 'static {
    /// The backend's name.
    const KIND: &'static str;
    /// A duplicate shares blocks with what it was made from.
    const SHARES_BLOCKS: bool;
    /// What its time grows with.
    const COST: ForkCost;
    /// A power cut leaves a duplicate that was renamed but never synced whole, empty or absent:
    /// its content is file system metadata, committed in order. Else it is synced before it gets
    /// its name.
    const ATOMIC: bool;

    /// Tries what it needs in the directory `dir` (which `path` names), and fails if it is not
    /// there. `scratch` is a new file in it, which it may write to.
    fn try_in(dir: BorrowedFd<'_>, scratch: &File, path: &Path) -> Result<Self, Error>
    where
        Self: Sized;

    /// Makes `to`, which is empty, read the same as `from`, which has `size` bytes.
    fn duplicate(&self, from: &File, to: &File, size: u64) -> io::Result<()>;

    /// How many bytes of the file's blocks belong to other files too.
    fn shared(&self, file: &File) -> io::Result<u64>;
}

/// The store: its directory, the way it duplicates, and what it has open for writing.
#[derive(Debug)]
pub(crate) struct RawStore<D> {
    dir: Arc<StoreDir>,
    method: D,
    reclaims_discard: bool,
    /// A volume that is open for writing here may be frozen here. Entries of closed volumes are
    /// dropped when the next one is opened.
    writers: Mutex<HashMap<VolumeName, Weak<RawVolume>>>,
}

impl<D: Duplicate> RawStore<D> {
    /// Opens or makes the store at `path`. What it needs is tried first, so that a directory where
    /// it cannot be is left as it was.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let (method, reclaims_discard) = Self::try_at(path)?;
        let dir = StoreDir::open(path, D::KIND, "raw")?;
        Ok(Self {
            dir: Arc::new(dir),
            method,
            reclaims_discard,
            writers: Mutex::new(HashMap::new()),
        })
    }

    /// What a store at `path` could do.
    pub(crate) fn probe(path: &Path) -> Result<Capabilities, Error> {
        let (_, reclaims_discard) = Self::try_at(path)?;
        Ok(Self::capabilities_with(reclaims_discard))
    }

    fn try_at(path: &Path) -> Result<(D, bool), Error> {
        let dir = dir::for_trial(path, D::KIND)?;
        let fail = |e| Error::io("open the store", path.display(), e);
        let scratch = NewFile::create(dir.as_fd(), Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let reclaims_discard = can_punch(scratch.file()).map_err(fail)?;
        let method = D::try_in(dir.as_fd(), scratch.file(), path)?;
        Ok((method, reclaims_discard))
    }

    fn capabilities_with(reclaims_discard: bool) -> Capabilities {
        Capabilities {
            shares_blocks: D::SHARES_BLOCKS,
            fork_cost: D::COST,
            reclaims_discard,
            max_chain: None,
        }
    }

    fn volume_error(&self, operation: &'static str, name: &VolumeName, e: io::Error) -> Error {
        self.dir.error(operation, Room::Volumes, name.as_str(), e)
    }

    fn layer_error(&self, operation: &'static str, name: &LayerName, e: io::Error) -> Error {
        self.dir.error(operation, Room::Layers, name.as_str(), e)
    }

    fn fail(&self, kind: ErrorKind, operation: &'static str, room: Room, name: &str) -> Error {
        Error::new(kind, operation, self.dir.describe(room, name))
    }

    /// Refuses a taken name before work is put into what would have it.
    fn refuse_taken(&self, operation: &'static str, room: Room, name: &str) -> Result<(), Error> {
        match self.dir.exists(room, name) {
            Ok(false) => Ok(()),
            Ok(true) => Err(self.fail(ErrorKind::Exists, operation, room, name)),
            Err(e) => Err(self.dir.error(operation, room, name, e)),
        }
    }

    /// The size of the volume that `file` is.
    fn size_of(
        &self,
        operation: &'static str,
        room: Room,
        name: &str,
        file: &File,
    ) -> Result<u64, Error> {
        let len = file
            .metadata()
            .map_err(|e| self.dir.error(operation, room, name, e))?
            .len();
        if size::is_valid(len) {
            Ok(len)
        } else {
            let object = self.dir.describe(room, name);
            Err(Error::because(
                ErrorKind::Damaged,
                operation,
                object,
                BadSize(len),
            ))
        }
    }

    fn writers(&self) -> MutexGuard<'_, HashMap<VolumeName, Weak<RawVolume>>> {
        // The map is whole at every step, so a panic elsewhere has not spoilt it.
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out a volume that is open for writing, and remembers it.
    fn hand_out(&self, volume: RawVolume) -> Arc<dyn Volume> {
        let volume = Arc::new(volume);
        let mut writers = self.writers();
        writers.retain(|_, open| open.strong_count() > 0);
        writers.insert(volume.name().clone(), Arc::downgrade(&volume));
        volume
    }

    /// Opens a volume that must not be open elsewhere, or only by readers for a shared lock.
    fn open_volume(
        &self,
        operation: &'static str,
        name: &VolumeName,
        access: Access,
        lock: Lock,
    ) -> Result<File, Error> {
        self.dir
            .open_locked(Room::Volumes, name.as_str(), access, lock)
            .map_err(|e| self.volume_error(operation, name, e))?
            .ok_or_else(|| self.fail(ErrorKind::InUse, operation, Room::Volumes, name.as_str()))
    }

    fn open_layer_file(&self, operation: &'static str, name: &LayerName) -> Result<File, Error> {
        self.dir
            .open_unlocked(Room::Layers, name.as_str(), Access::ReadOnly)
            .map_err(|e| self.layer_error(operation, name, e))
    }

    /// Makes a layer that reads as `from` does.
    fn layer_from(
        &self,
        from: &File,
        size: u64,
        layer: &LayerName,
        durability: Durability,
    ) -> io::Result<()> {
        let durable = !D::ATOMIC || durability == Durability::Now;
        let new = self.dir.new_file(Room::Layers)?;
        self.method.duplicate(from, new.file(), size)?;
        fchmod(new.file(), Mode::RUSR | Mode::RGRP | Mode::ROTH)?;
        self.publish(new, Room::Layers, layer.as_str(), durable)?;
        Ok(())
    }

    /// Gives a complete file its name.
    fn publish(&self, new: NewFile<'_>, room: Room, name: &str, durable: bool) -> io::Result<File> {
        if durable {
            new.file().sync_all()?;
        }
        let file = new.publish(&self.dir.file_name(name))?;
        if durable && let Err(e) = sync_dir(self.dir.room(room)) {
            self.dir.remove(room, name)?;
            return Err(e);
        }
        Ok(file)
    }
}

impl<D: Duplicate> StorageBackend for RawStore<D> {
    fn name(&self) -> &'static str {
        D::KIND
    }

    fn capabilities(&self) -> Capabilities {
        Self::capabilities_with(self.reclaims_discard)
    }

    fn create(&self, name: &VolumeName, size: u64) -> Result<Arc<dyn Volume>, Error> {
        self.create_filled(name, size, &mut |_| Ok(()))
    }

    fn create_filled(
        &self,
        name: &VolumeName,
        size: u64,
        fill: &mut dyn FnMut(&dyn Volume) -> Result<(), Error>,
    ) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "create";
        let fail = |e| self.volume_error(OPERATION, name, e);
        size::check(
            OPERATION,
            self.dir.describe(Room::Volumes, name.as_str()),
            size,
        )?;
        self.refuse_taken(OPERATION, Room::Volumes, name.as_str())?;
        let new = self.dir.new_file(Room::Volumes).map_err(fail)?;
        new.file().set_len(size).map_err(fail)?;
        let file = new.file().try_clone().map_err(fail)?;
        let volume = RawVolume::writable(self.dir.clone(), name.clone(), file, size, true);
        fill(&volume)?;
        self.publish(new, Room::Volumes, name.as_str(), true)
            .map_err(fail)?;
        Ok(self.hand_out(volume))
    }

    fn open(&self, name: &VolumeName, access: Access) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "open";
        let lock = match access {
            Access::ReadWrite => Lock::Exclusive,
            Access::ReadOnly => Lock::Shared,
        };
        let file = self.open_volume(OPERATION, name, access, lock)?;
        let size = self.size_of(OPERATION, Room::Volumes, name.as_str(), &file)?;
        let (dir, name) = (self.dir.clone(), name.clone());
        Ok(match access {
            Access::ReadWrite => self.hand_out(RawVolume::writable(dir, name, file, size, false)),
            Access::ReadOnly => Arc::new(RawVolume::readable(dir, name, file, size)),
        })
    }

    fn freeze(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        durability: Durability,
    ) -> Result<(), Error> {
        const OPERATION: &str = "freeze";
        self.refuse_taken(OPERATION, Room::Layers, layer.as_str())?;
        let open = self.writers().get(volume).and_then(Weak::upgrade);
        let made = if let Some(open) = open {
            self.layer_from(open.file(), open.size(), layer, durability)
        } else {
            let file = self.open_volume(OPERATION, volume, Access::ReadOnly, Lock::Shared)?;
            let size = self.size_of(OPERATION, Room::Volumes, volume.as_str(), &file)?;
            self.layer_from(&file, size, layer, durability)
        };
        made.map_err(|e| self.layer_error(OPERATION, layer, e))
    }

    fn sync_layer(&self, layer: &LayerName) -> Result<(), Error> {
        const OPERATION: &str = "sync";
        let file = self.open_layer_file(OPERATION, layer)?;
        file.sync_all()
            .and_then(|()| sync_dir(self.dir.room(Room::Layers)))
            .map_err(|e| self.layer_error(OPERATION, layer, e))
    }

    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "fork";
        let fail = |e| self.volume_error(OPERATION, volume, e);
        let from = self.open_layer_file(OPERATION, layer)?;
        let size = self.size_of(OPERATION, Room::Layers, layer.as_str(), &from)?;
        self.refuse_taken(OPERATION, Room::Volumes, volume.as_str())?;
        let new = self.dir.new_file(Room::Volumes).map_err(fail)?;
        self.method
            .duplicate(&from, new.file(), size)
            .map_err(fail)?;
        let durable = !D::ATOMIC;
        let file = self
            .publish(new, Room::Volumes, volume.as_str(), durable)
            .map_err(fail)?;
        let (dir, name) = (self.dir.clone(), volume.clone());
        Ok(self.hand_out(RawVolume::writable(dir, name, file, size, durable)))
    }

    fn open_layer(&self, layer: &LayerName) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "open";
        let file = self.open_layer_file(OPERATION, layer)?;
        let size = self.size_of(OPERATION, Room::Layers, layer.as_str(), &file)?;
        let name = VolumeName::from(layer.clone());
        Ok(Arc::new(RawVolume::readable(
            self.dir.clone(),
            name,
            file,
            size,
        )))
    }

    fn flatten(&self, volume: &VolumeName) -> Result<(), Error> {
        const OPERATION: &str = "flatten";
        let file = self.open_volume(OPERATION, volume, Access::ReadOnly, Lock::Exclusive)?;
        self.size_of(OPERATION, Room::Volumes, volume.as_str(), &file)?;
        Ok(())
    }

    fn delete(&self, volume: &VolumeName) -> Result<(), Error> {
        const OPERATION: &str = "delete";
        let _locked = self.open_volume(OPERATION, volume, Access::ReadOnly, Lock::Exclusive)?;
        self.dir
            .remove(Room::Volumes, volume.as_str())
            .map_err(|e| self.volume_error(OPERATION, volume, e))
    }

    fn delete_layer(&self, layer: &LayerName) -> Result<(), Error> {
        self.dir
            .remove(Room::Layers, layer.as_str())
            .map_err(|e| self.layer_error("delete", layer, e))
    }

    fn volumes(&self) -> Result<Vec<VolumeName>, Error> {
        self.dir
            .list(Room::Volumes, |name| VolumeName::new(name).ok())
    }

    fn layers(&self) -> Result<Vec<LayerName>, Error> {
        self.dir
            .list(Room::Layers, |name| LayerName::new(name).ok())
    }

    fn usage(&self, volume: &VolumeName) -> Result<Usage, Error> {
        const OPERATION: &str = "measure";
        let fail = |e| self.volume_error(OPERATION, volume, e);
        let file = self
            .dir
            .open_unlocked(Room::Volumes, volume.as_str(), Access::ReadOnly)
            .map_err(fail)?;
        let stat = fstat(&file).map_err(|e| fail(e.into()))?;
        // st_blocks counts 512 bytes each, whatever the file system's block size.
        let allocated = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let shared = self.method.shared(&file).map_err(fail)?.min(allocated);
        Ok(Usage {
            size: self.size_of(OPERATION, Room::Volumes, volume.as_str(), &file)?,
            own: allocated - shared,
            shared: Some(shared),
        })
    }

    fn check(&self, volume: &VolumeName) -> Result<(), Error> {
        const OPERATION: &str = "check";
        let file = self
            .dir
            .open_unlocked(Room::Volumes, volume.as_str(), Access::ReadOnly)
            .map_err(|e| self.volume_error(OPERATION, volume, e))?;
        self.size_of(OPERATION, Room::Volumes, volume.as_str(), &file)?;
        Ok(())
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.dir.descriptors()
    }

    fn forget_open(&self) {
        self.writers().clear();
    }
}

/// Whether a hole can be made in `scratch`.
fn can_punch(scratch: &File) -> io::Result<bool> {
    write_all_at(scratch, &[IoSlice::new(&[1; 4096])], 0)?;
    match punch(scratch, 0, 4096) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(e) => Err(e),
    }
}
