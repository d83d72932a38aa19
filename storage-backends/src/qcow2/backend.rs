//! The store: volumes, layers, and what is done with them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::engine::{self, EngineKind};
use super::format::{NewImage, write_new};
use super::header::Header;
use super::layer::{
    ChainError, MAX_CHAIN_LIMIT, OpenLayers, Top, backing_layer, backing_name, checked_header,
    is_unfinished, twin,
};
use super::tables::ReadAt;
use super::volume::{Current, Qcow2Volume};
use crate::dir::{Room, StoreDir};
use crate::durable::{self, NewFile};
use crate::lock::Lock;
use crate::{
    Access, Capabilities, Durability, Error, ErrorKind, ForkCost, LayerName, StorageBackend, Usage,
    Volume, VolumeName, size,
};

/// The kind under which these stores are known.
const KIND: &str = "qcow2";

/// How a qcow2 store is used. Nothing of it is kept in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2Options {
    /// The library that reads and writes the images.
    pub engine: EngineKind,
    /// The most files that a chain may have, volume and layers counted: 2 to
    /// [`MAX_CHAIN_LIMIT`].
    pub max_chain: u32,
    /// Logarithm of the cluster size of new images: 12 (4 KiB) to 21 (2 MiB).
    pub cluster_bits: u32,
}

impl Default for Qcow2Options {
    /// imago, 32 files, clusters of 64 KiB.
    fn default() -> Self {
        Self {
            engine: EngineKind::default(),
            max_chain: 32,
            cluster_bits: 16,
        }
    }
}

impl Qcow2Options {
    /// The options that a configured kind stands for: `qcow2`, or `qcow2:<engine>`. `None` when it is
    /// not a qcow2 kind.
    #[must_use]
    pub fn from_kind(kind: &str) -> Option<Self> {
        match kind.split_once(':') {
            None if kind == KIND => Some(Self::default()),
            Some((KIND, engine)) => Some(Self {
                engine: engine.parse().ok()?,
                ..Self::default()
            }),
            _ => None,
        }
    }
}

/// Options that make no sense.
#[derive(Debug, thiserror::Error)]
#[error("max_chain must be 2 to {MAX_CHAIN_LIMIT} and is {}; cluster_bits must be 12 to 21 and is {}", .0.max_chain, .0.cluster_bits)]
struct BadOptions(Qcow2Options);

/// What keeps a layer from being deleted.
#[derive(Debug, thiserror::Error)]
#[error("{0} stands on it")]
struct Dependent(String);

/// A store of qcow2 images.
#[derive(Debug)]
pub struct Qcow2Backend {
    pub(super) store: StoreDir,
    pub(super) options: Qcow2Options,
    pub(super) layers: OpenLayers,
    /// The volumes that this object has open for writing.
    volumes: Mutex<HashMap<VolumeName, Weak<Qcow2Volume>>>,
}

impl Qcow2Backend {
    /// Opens the store in `dir`, or makes one of an empty or absent directory, and brings to an end
    /// what a crash has interrupted.
    ///
    /// # Errors
    /// `Unsupported` when the engine is not part of this build; `Invalid` for options out of
    /// range; `ForeignStore` when the directory is another backend's.
    pub fn open_store(dir: &Path, options: Qcow2Options) -> Result<Self, Error> {
        const OPERATION: &str = "open the store";
        options.engine.require(OPERATION, dir.display())?;
        if !(2..=MAX_CHAIN_LIMIT).contains(&options.max_chain)
            || !(12..=21).contains(&options.cluster_bits)
        {
            return Err(Error::because(
                ErrorKind::Invalid,
                OPERATION,
                dir.display(),
                BadOptions(options),
            ));
        }
        let backend = Self {
            store: StoreDir::open(dir, KIND, KIND)?,
            options,
            layers: OpenLayers::default(),
            volumes: Mutex::default(),
        };
        backend
            .recover_all()
            .map_err(|e| Error::io(OPERATION, dir.display(), e))?;
        Ok(backend)
    }

    /// Opens and locks a volume's file, for an operation on the whole volume.
    pub(super) fn lock_volume(
        &self,
        name: &VolumeName,
        access: Access,
        lock: Lock,
        operation: &'static str,
    ) -> Result<File, Error> {
        let label = self.label(name);
        let file = self
            .store
            .open_locked(Room::Volumes, name.as_str(), access, lock)
            .map_err(|e| Error::io(operation, &label, e))?
            .ok_or_else(|| Error::new(ErrorKind::InUse, operation, &label))?;
        if lock == Lock::Exclusive {
            self.recover(&file)
                .map_err(|e| Error::io(operation, &label, e))?;
        }
        Ok(file)
    }

    pub(super) fn label(&self, name: &VolumeName) -> String {
        self.store.describe(Room::Volumes, name.as_str())
    }

    /// The image in `file` with its chain.
    pub(super) fn top(
        &self,
        label: String,
        file: File,
        access: Access,
        operation: &'static str,
    ) -> Result<Top, Error> {
        let header = checked_header(&file, &label, operation)?;
        let backing = match &header.backing {
            None => None,
            Some(backing) => {
                let layer =
                    backing_layer(&label, backing).map_err(|e| e.into_error(operation, &label))?;
                Some(
                    self.layers
                        .get(&self.store, &layer, self.options.max_chain - 1, operation)
                        .map_err(
                            // What lies beneath a volume is its own content: not there means damaged.
                            |e| match e.kind() {
                                ErrorKind::NotFound => {
                                    Error::because(ErrorKind::Damaged, operation, &label, e)
                                }
                                _ => e,
                            },
                        )?,
                )
            }
        };
        Ok(Top {
            label,
            file: Arc::new(file),
            header,
            backing,
            writable: access == Access::ReadWrite,
        })
    }

    /// Writes an empty image into a new file and opens it, without giving it a name.
    pub(super) fn new_image(
        &self,
        label: String,
        new: &NewFile<'_>,
        image: &NewImage<'_>,
        backing: Option<Arc<super::layer::Layer>>,
        operation: &'static str,
    ) -> Result<Current, Error> {
        let header = write_new(new.file(), image).map_err(|e| Error::io(operation, &label, e))?;
        self.open_new(label, new, header, backing, operation)
    }

    /// Opens the image that was written into a new file.
    pub(super) fn open_new(
        &self,
        label: String,
        new: &NewFile<'_>,
        header: Header,
        backing: Option<Arc<super::layer::Layer>>,
        operation: &'static str,
    ) -> Result<Current, Error> {
        let file = new.file().try_clone();
        let top = Arc::new(Top {
            file: Arc::new(file.map_err(|e| Error::io(operation, &label, e))?),
            label,
            header,
            backing,
            writable: true,
        });
        let engine = engine::open(self.options.engine, &top, operation)?;
        Ok(Current { engine, top })
    }

    fn refuse_existing(
        &self,
        room: Room,
        name: &str,
        operation: &'static str,
    ) -> Result<(), Error> {
        let label = || self.store.describe(room, name);
        if self
            .store
            .exists(room, name)
            .map_err(|e| Error::io(operation, label(), e))?
        {
            return Err(Error::new(ErrorKind::Exists, operation, label()));
        }
        Ok(())
    }

    fn volumes_dir(&self) -> io::Result<OwnedFd> {
        self.store.room(Room::Volumes).try_clone_to_owned()
    }

    fn register(&self, name: &VolumeName, volume: Qcow2Volume) -> Arc<Qcow2Volume> {
        let volume = Arc::new(volume);
        let mut open = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, v| v.strong_count() > 0);
        open.insert(name.clone(), Arc::downgrade(&volume));
        volume
    }

    /// The handle of a volume that is open for writing through this object.
    pub(super) fn open_handle(&self, name: &VolumeName) -> Option<Arc<Qcow2Volume>> {
        self.volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .and_then(Weak::upgrade)
    }

    /// Whether an image's header says that it stands on `layer`.
    fn stands_on(
        &self,
        room: Room,
        name: &str,
        layer: &LayerName,
        operation: &'static str,
    ) -> Result<bool, Error> {
        let label = self.store.describe(room, name);
        let file = match self.store.open_unlocked(room, name, Access::ReadOnly) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io(operation, &label, e)),
        };
        let header = checked_header(&file, &label, operation)?;
        Ok(header
            .backing
            .is_some_and(|b| b.name == backing_name(&self.store, layer)))
    }

    fn names(&self, room: Room) -> Result<Vec<String>, Error> {
        let operation = match room {
            Room::Volumes => "list the volumes of",
            Room::Layers => "list the layers of",
        };
        self.store
            .names(room)
            .map_err(|e| Error::io(operation, self.store.room_path(room).display(), e))
    }
}

impl StorageBackend for Qcow2Backend {
    fn name(&self) -> &'static str {
        KIND
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            shares_blocks: true,
            fork_cost: ForkCost::Constant,
            reclaims_discard: true,
            max_chain: Some(self.options.max_chain),
        }
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
        let label = self.label(name);
        let fail = |e: io::Error| Error::io(OPERATION, &label, e);
        size::check(OPERATION, &label, size)?;
        self.refuse_existing(Room::Volumes, name.as_str(), OPERATION)?;

        let new = self.store.new_file(Room::Volumes).map_err(fail)?;
        let image = NewImage {
            size,
            cluster_bits: self.options.cluster_bits,
            backing: None,
        };
        let current = self.new_image(label.clone(), &new, &image, None, OPERATION)?;
        let directory = self.volumes_dir().map_err(fail)?;
        let volume = Qcow2Volume::in_directory(name.clone(), current, directory, false);
        fill(&volume)?;
        volume
            .exclusively(|c| c.engine.flush().and_then(|()| c.top.file.sync_all()))
            .map_err(fail)?;
        new.publish(&self.store.file_name(name.as_str()))
            .map_err(fail)?;
        let volume = self.register(name, volume);
        volume.flush().map_err(fail)?;
        Ok(volume)
    }

    fn open(&self, name: &VolumeName, access: Access) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "open";
        let lock = match access {
            Access::ReadWrite => Lock::Exclusive,
            Access::ReadOnly => Lock::Shared,
        };
        let file = self.lock_volume(name, access, lock, OPERATION)?;
        let top = Arc::new(self.top(self.label(name), file, access, OPERATION)?);
        if access == Access::ReadWrite {
            super::whole::prepare_for_writing(&top, self.options.engine, OPERATION)?;
        }
        let engine = engine::open(self.options.engine, &top, OPERATION)?;
        let current = Current { engine, top };
        match access {
            Access::ReadOnly => Ok(Arc::new(Qcow2Volume::new(name.clone(), current))),
            Access::ReadWrite => {
                let directory = self
                    .volumes_dir()
                    .map_err(|e| Error::io(OPERATION, self.label(name), e))?;
                Ok(self.register(
                    name,
                    Qcow2Volume::in_directory(name.clone(), current, directory, false),
                ))
            }
        }
    }

    fn freeze(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        durability: Durability,
    ) -> Result<(), Error> {
        self.freeze_volume(volume, layer, durability)
    }

    fn sync_layer(&self, layer: &LayerName) -> Result<(), Error> {
        const OPERATION: &str = "sync";
        let label = self.store.describe(Room::Layers, layer.as_str());
        let fail = |e: io::Error| Error::io(OPERATION, &label, e);
        let file = self
            .store
            .open_unlocked(Room::Layers, layer.as_str(), Access::ReadOnly)
            .map_err(fail)?;
        if is_unfinished(&self.store, &file).map_err(fail)? {
            return Err(ChainError::Unfinished(label.clone()).into_error(OPERATION, &label));
        }
        file.sync_all().map_err(fail)?;
        // The volume's switch to its overlay is what ends a freeze: it must be durable too.
        durable::sync_dir(self.store.room(Room::Layers)).map_err(fail)?;
        durable::sync_dir(self.store.room(Room::Volumes)).map_err(fail)
    }

    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "fork";
        let label = self.label(volume);
        let fail = |e: io::Error| Error::io(OPERATION, &label, e);
        self.refuse_existing(Room::Volumes, volume.as_str(), OPERATION)?;
        let below = self
            .layers
            .get(&self.store, layer, self.options.max_chain, OPERATION)?;
        if below.depth >= self.options.max_chain {
            return Err(
                ChainError::TooLong(self.options.max_chain).into_error(OPERATION, &below.label)
            );
        }
        let new = self.store.new_file(Room::Volumes).map_err(fail)?;
        let backing = backing_name(&self.store, layer);
        let image = NewImage {
            size: below.header.size,
            cluster_bits: self.options.cluster_bits,
            backing: Some(&backing),
        };
        let current = self.new_image(label.clone(), &new, &image, Some(below), OPERATION)?;
        let directory = self.volumes_dir().map_err(fail)?;
        new.publish(&self.store.file_name(volume.as_str()))
            .map_err(fail)?;
        Ok(self.register(
            volume,
            Qcow2Volume::in_directory(volume.clone(), current, directory, false),
        ))
    }

    fn open_layer(&self, layer: &LayerName) -> Result<Arc<dyn Volume>, Error> {
        const OPERATION: &str = "open";
        let open = self
            .layers
            .get(&self.store, layer, self.options.max_chain, OPERATION)?;
        let top = Arc::new(Top {
            label: open.label.clone(),
            file: Arc::clone(&open.file),
            header: open.header.clone(),
            backing: open.backing.clone(),
            writable: false,
        });
        let engine = engine::open(self.options.engine, &top, OPERATION)?;
        Ok(Arc::new(Qcow2Volume::new(
            layer.clone().into(),
            Current { engine, top },
        )))
    }

    fn flatten(&self, volume: &VolumeName) -> Result<(), Error> {
        self.flatten_volume(volume)
    }

    fn delete(&self, volume: &VolumeName) -> Result<(), Error> {
        const OPERATION: &str = "delete";
        let _locked = self.lock_volume(volume, Access::ReadOnly, Lock::Exclusive, OPERATION)?;
        self.store
            .remove(Room::Volumes, volume.as_str())
            .map_err(|e| Error::io(OPERATION, self.label(volume), e))
    }

    fn delete_layer(&self, layer: &LayerName) -> Result<(), Error> {
        const OPERATION: &str = "delete";
        let label = self.store.describe(Room::Layers, layer.as_str());
        let fail = |e: io::Error| Error::io(OPERATION, &label, e);
        let file = self
            .store
            .open_locked(
                Room::Layers,
                layer.as_str(),
                Access::ReadOnly,
                Lock::Exclusive,
            )
            .map_err(fail)?
            .ok_or_else(|| Error::new(ErrorKind::InUse, OPERATION, &label))?;
        if is_unfinished(&self.store, &file).map_err(fail)? {
            return Err(ChainError::Unfinished(label.clone()).into_error(OPERATION, &label));
        }
        for room in [Room::Volumes, Room::Layers] {
            for name in self.names(room)? {
                if self.stands_on(room, &name, layer, OPERATION)? {
                    let who = Dependent(self.store.describe(room, &name));
                    return Err(Error::because(ErrorKind::InUse, OPERATION, &label, who));
                }
            }
        }
        self.store
            .remove(Room::Layers, layer.as_str())
            .map_err(fail)
    }

    fn volumes(&self) -> Result<Vec<VolumeName>, Error> {
        Ok(self
            .names(Room::Volumes)?
            .into_iter()
            .filter_map(|n| VolumeName::new(n).ok())
            .collect())
    }

    fn layers(&self) -> Result<Vec<LayerName>, Error> {
        let mut layers = Vec::new();
        for name in self.names(Room::Layers)? {
            let Ok(name) = LayerName::new(name) else {
                continue;
            };
            let unfinished = self
                .store
                .open_unlocked(Room::Layers, name.as_str(), Access::ReadOnly)
                .and_then(|file| is_unfinished(&self.store, &file));
            match unfinished {
                Ok(false) => layers.push(name),
                Ok(true) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    return Err(Error::io(
                        "look at",
                        self.store.describe(Room::Layers, name.as_str()),
                        e,
                    ));
                }
            }
        }
        Ok(layers)
    }

    fn usage(&self, volume: &VolumeName) -> Result<Usage, Error> {
        const OPERATION: &str = "measure";
        /// Unit of `st_blocks` (stat(2)).
        const BLOCK: u64 = 512;
        let label = self.label(volume);
        let file = self
            .store
            .open_unlocked(Room::Volumes, volume.as_str(), Access::ReadOnly)
            .map_err(|e| Error::io(OPERATION, &label, e))?;
        let top = self.top(label.clone(), file, Access::ReadOnly, OPERATION)?;
        let own = |file: &File| {
            file.metadata()
                .map(|m| m.blocks().saturating_mul(BLOCK))
                .map_err(|e| Error::io(OPERATION, &label, e))
        };
        let mut shared = 0_u64;
        for layer in engine::chain(top.backing.as_ref()) {
            shared = shared.saturating_add(own(&layer.file)?);
        }
        Ok(Usage {
            size: top.header.size,
            own: own(&top.file)?,
            shared: Some(shared),
        })
    }

    fn check(&self, volume: &VolumeName) -> Result<(), Error> {
        self.check_volume(volume)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.store.descriptors()
    }

    fn forget_open(&self) {
        self.layers.forget();
        self.volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

impl Qcow2Backend {
    /// Ends what a crash has interrupted, in volumes that nobody is working on.
    fn recover_all(&self) -> io::Result<()> {
        for name in self.store.names(Room::Volumes)? {
            // Only what has two names can be amid a freeze; the lock says whether it still is.
            let file = match self
                .store
                .open_unlocked(Room::Volumes, &name, Access::ReadOnly)
            {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => continue,
            };
            if never_reached_the_disk(&file)? {
                let locked = self.store.open_locked(
                    Room::Volumes,
                    &name,
                    Access::ReadOnly,
                    Lock::Exclusive,
                )?;
                if let Some(locked) = locked
                    && never_reached_the_disk(&locked)?
                {
                    self.store.remove(Room::Volumes, &name)?;
                    tracing::info!(name, "removed a fork that a power cut left without content");
                }
                continue;
            }
            if file.metadata()?.nlink() > 1
                && let Some(locked) = self.store.open_locked(
                    Room::Volumes,
                    &name,
                    Access::ReadOnly,
                    Lock::Exclusive,
                )?
            {
                self.recover(&locked)?;
            }
        }
        Ok(())
    }

    /// Takes the layer's name from a volume whose freeze was interrupted before the volume was switched to
    /// its overlay: the freeze has not happened. The caller holds the volume's lock.
    fn recover(&self, volume: &File) -> io::Result<()> {
        while let Some(layer) = twin(&self.store, Room::Layers, volume)? {
            self.store.remove(Room::Layers, &layer)?;
            durable::sync_dir(self.store.room(Room::Layers))?;
            tracing::info!(layer, "took back an unfinished freeze");
        }
        Ok(())
    }
}

/// Whether a file is one that was forked and never flushed before the power went: its name reached
/// the disk, and the header, which no image is without, did not.
fn never_reached_the_disk(file: &File) -> io::Result<bool> {
    let mut start = [0; 512];
    file.fill_at(&mut start, 0)?;
    Ok(start == [0; 512])
}
