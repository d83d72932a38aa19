//! Open files of a chain: the top that is read and written, and the layers beneath it.
//!
//! A layer is opened once in a process, however many volumes stand on it, and is locked (shared)
//! for as long as it is open; the top is locked by whoever opened it. A chain is built from the
//! names in the headers, one file after the other, with an end to it.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

#[cfg(feature = "imago")]
use super::engine::SharedReader;
use super::header::{Backing, Fault, Header, HeaderError, read_header};
use crate::dir::{Room, StoreDir};
use crate::lock::Lock;
use crate::{Access, Error, ErrorKind, LayerName};

/// The longest chain that any store or image may have, whatever its options say.
pub const MAX_CHAIN_LIMIT: u32 = 64;

/// The image that is read or written, on top of its chain.
#[derive(Debug)]
pub(super) struct Top {
    /// What it is called in messages.
    pub(super) label: String,
    pub(super) file: Arc<File>,
    pub(super) header: Header,
    pub(super) backing: Option<Arc<Layer>>,
    pub(super) writable: bool,
}

impl Top {
    /// Files in the chain, the top included.
    pub(super) fn depth(&self) -> u32 {
        self.backing
            .as_ref()
            .map_or(0, |b| b.depth)
            .saturating_add(1)
    }
}

/// An immutable image that others stand on.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) label: String,
    pub(super) file: Arc<File>,
    pub(super) header: Header,
    pub(super) backing: Option<Arc<Layer>>,
    /// Files in the chain, this one included.
    pub(super) depth: u32,
    #[cfg(feature = "imago")]
    pub(super) reader: SharedReader,
}

impl Layer {
    pub(super) fn new(
        label: String,
        file: Arc<File>,
        header: Header,
        backing: Option<Arc<Layer>>,
    ) -> Self {
        let depth = backing.as_ref().map_or(0, |b| b.depth).saturating_add(1);
        Self {
            label,
            file,
            header,
            backing,
            depth,
            #[cfg(feature = "imago")]
            reader: SharedReader::default(),
        }
    }
}

/// Why a chain of images is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChainError {
    #[error("the image {label} is refused")]
    Header { label: String, source: HeaderError },
    #[error(
        "{label} names {name:?} as its backing file: only a layer of the same store is followed"
    )]
    ForeignBacking { label: String, name: String },
    #[error("{label} does not say that its backing file is qcow2, and formats are never guessed")]
    NoFormat { label: String },
    #[error("the chain comes back to {0}")]
    Cycle(String),
    #[error("the chain has more than {0} files")]
    TooLong(u32),
    #[error("the layer {0} beneath it is missing")]
    Missing(String),
    #[error("the layer {0} beneath it is being changed or deleted")]
    Busy(String),
    #[error("{0} is not finished: the freeze that makes it has not come to its end")]
    Unfinished(String),
}

impl ChainError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Header { source, .. } => match source.fault {
                Fault::Unsupported => ErrorKind::Unsupported,
                _ => ErrorKind::Damaged,
            },
            Self::TooLong(_) => ErrorKind::ChainTooLong,
            Self::Busy(_) => ErrorKind::InUse,
            Self::Unfinished(_) => ErrorKind::NotFound,
            _ => ErrorKind::Damaged,
        }
    }

    pub(super) fn into_error(self, operation: &'static str, object: &str) -> Error {
        Error::because(self.kind(), operation, object, self)
    }
}

/// What the backing file of an image in a store is called: relative to the image, so that
/// `qemu-img` finds it too. Volumes and layers are both one directory beneath the store.
pub(super) fn backing_name(store: &StoreDir, layer: &LayerName) -> String {
    format!("../layers/{}", store.file_name(layer.as_str()))
}

/// The layer that an image in a store stands on. The only names that are followed are those that
/// [`backing_name`] writes: a layer of the same store, said to be qcow2.
pub(super) fn backing_layer(label: &str, backing: &Backing) -> Result<LayerName, ChainError> {
    if backing.format.as_deref() != Some("qcow2") {
        return Err(ChainError::NoFormat {
            label: label.to_owned(),
        });
    }
    backing
        .name
        .strip_prefix("../layers/")
        .and_then(|rest| rest.strip_suffix(".qcow2"))
        .and_then(|name| LayerName::new(name).ok())
        .ok_or_else(|| ChainError::ForeignBacking {
            label: label.to_owned(),
            name: backing.name.clone(),
        })
}

/// Reads and checks a header, or says what is wrong with it.
pub(super) fn checked_header(
    file: &File,
    label: &str,
    operation: &'static str,
) -> Result<Header, Error> {
    read_header(file)
        .map_err(|e| Error::io(operation, label, e))?
        .map_err(|source| {
            ChainError::Header {
                label: label.to_owned(),
                source,
            }
            .into_error(operation, label)
        })
}

/// The layers of a store that this process has open.
#[derive(Debug, Default)]
pub(super) struct OpenLayers {
    open: Mutex<HashMap<LayerName, Weak<Layer>>>,
}

impl OpenLayers {
    /// Forgets what is open, for a forked child.
    pub(super) fn forget(&self) {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Opens a layer and all beneath it, at most `limit` files.
    pub(super) fn get(
        &self,
        store: &StoreDir,
        name: &LayerName,
        limit: u32,
        operation: &'static str,
    ) -> Result<Arc<Layer>, Error> {
        // One thread at a time: two that open the same chain would open it twice.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let object = store.describe(Room::Layers, name.as_str());
        let chain_error = |e: ChainError| e.into_error(operation, &object);

        let mut opened = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some(name.clone());
        let mut below = None;
        while let Some(name) = next {
            if let Some(layer) = open.get(&name).and_then(Weak::upgrade) {
                below = Some(layer);
                break;
            }
            let label = store.describe(Room::Layers, name.as_str());
            if !seen.insert(name.clone()) {
                return Err(chain_error(ChainError::Cycle(label)));
            }
            if seen.len() > limit as usize {
                return Err(chain_error(ChainError::TooLong(limit)));
            }
            let file = match store.open_locked(
                Room::Layers,
                name.as_str(),
                Access::ReadOnly,
                Lock::Shared,
            ) {
                Ok(Some(file)) => file,
                Ok(None) if opened.is_empty() => {
                    return Err(Error::new(ErrorKind::InUse, operation, &object));
                }
                Ok(None) => return Err(chain_error(ChainError::Busy(label))),
                Err(e) if e.kind() == io::ErrorKind::NotFound && !opened.is_empty() => {
                    return Err(chain_error(ChainError::Missing(label)));
                }
                Err(e) => return Err(Error::io(operation, &label, e)),
            };
            if is_unfinished(store, &file).map_err(|e| Error::io(operation, &label, e))? {
                return Err(chain_error(ChainError::Unfinished(label)));
            }
            let header = checked_header(&file, &label, operation)?;
            next = match &header.backing {
                Some(backing) => Some(backing_layer(&label, backing).map_err(&chain_error)?),
                None => None,
            };
            opened.push((name, label, file, header));
        }

        for (name, label, file, header) in opened.into_iter().rev() {
            let layer = Arc::new(Layer::new(label, Arc::new(file), header, below.take()));
            if layer.depth > limit {
                return Err(chain_error(ChainError::TooLong(limit)));
            }
            open.insert(name, Arc::downgrade(&layer));
            below = Some(layer);
        }
        open.retain(|_, layer| layer.strong_count() > 0);
        below
            .filter(|layer| layer.depth <= limit)
            .ok_or_else(|| chain_error(ChainError::TooLong(limit)))
    }

    /// Makes a layer known that has just been frozen in this process.
    pub(super) fn insert(&self, name: LayerName, layer: &Arc<Layer>) {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name, Arc::downgrade(layer));
    }
}

/// Whether a layer's file is still the file of a volume too: then the freeze between the two has not
/// switched the volume over to its overlay yet, and the file may be written to.
pub(super) fn is_unfinished(store: &StoreDir, layer: &File) -> io::Result<bool> {
    Ok(twin(store, Room::Volumes, layer)?.is_some())
}

/// The name in `room` that is the same file as `file`. Nothing is looked at for a file with one
/// name, which is the rule.
pub(super) fn twin(store: &StoreDir, room: Room, file: &File) -> io::Result<Option<String>> {
    if file.metadata()?.nlink() == 1 {
        return Ok(None);
    }
    for name in store.names(room)? {
        if crate::durable::is_named(store.room(room), &store.file_name(&name), file)? {
            return Ok(Some(name));
        }
    }
    Ok(None)
}
