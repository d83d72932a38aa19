//! Backends by name, and which of them a directory can have.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::Mode;

use crate::durable::NewFile;
use crate::qcow2::{Qcow2Backend, Qcow2Options};
use crate::{Capabilities, Error, ErrorKind, ForkCost, StorageBackend, copy, dir, reflink};

/// What is known of a backend without a store of it.
#[derive(Debug, Clone, Copy)]
struct Entry {
    name: &'static str,
    open: fn(&Path) -> Result<Arc<dyn StorageBackend>, Error>,
    probe: fn(&Path) -> Result<Capabilities, Error>,
}

/// The backends of this crate, the best for forks first.
const BACKENDS: &[Entry] = &[
    Entry {
        name: reflink::NAME,
        open: reflink::open,
        probe: reflink::probe,
    },
    Entry {
        name: QCOW2,
        open: open_qcow2,
        probe: probe_qcow2,
    },
    Entry {
        name: copy::NAME,
        open: copy::open,
        probe: copy::probe,
    },
];

const QCOW2: &str = "qcow2";

fn open_qcow2(dir: &Path) -> Result<Arc<dyn StorageBackend>, Error> {
    let store = Qcow2Backend::open_store(dir, Qcow2Options::default())?;
    Ok(Arc::new(store))
}

/// A qcow2 store needs nothing but files that it can write, and its engine.
fn probe_qcow2(path: &Path) -> Result<Capabilities, Error> {
    const OPERATION: &str = "open the store";
    let options = Qcow2Options::default();
    options.engine.require(OPERATION, path.display())?;
    let dir = dir::for_trial(path, QCOW2)?;
    NewFile::create(dir.as_fd(), Mode::RUSR | Mode::WUSR)
        .map_err(|e| Error::io(OPERATION, path.display(), e))?;
    Ok(Capabilities {
        shares_blocks: true,
        fork_cost: ForkCost::Constant,
        reclaims_discard: true,
        max_chain: Some(options.max_chain),
    })
}

/// The name is not that of a backend.
#[derive(Debug, thiserror::Error)]
#[error("the backends are: {}, qcow2:<engine>", names().collect::<Vec<_>>().join(", "))]
struct UnknownBackend;

/// The names of the backends that [`open_backend`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    BACKENDS.iter().map(|entry| entry.name)
}

/// Opens the directory `dir` as a store of the backend `kind` (one of [`names`], or `qcow2:` and
/// the name of an engine), making it one if it is empty or
/// absent (its parent must exist).
///
/// # Errors
/// `Invalid` for a `kind` that is none; `ForeignStore` when another backend has the directory;
/// `Unsupported` when its file system cannot do what the backend needs.
pub fn open_backend(kind: &str, dir: &Path) -> Result<Arc<dyn StorageBackend>, Error> {
    if let Some(entry) = BACKENDS.iter().find(|entry| entry.name == kind) {
        return (entry.open)(dir);
    }
    if let Some(options) = Qcow2Options::from_kind(kind) {
        return Ok(Arc::new(Qcow2Backend::open_store(dir, options)?));
    }
    Err(Error::because(
        ErrorKind::Invalid,
        "open the storage backend",
        format_args!("{kind:?}"),
        UnknownBackend,
    ))
}

/// What a backend could do in a directory, or why it cannot.
#[derive(Debug)]
pub struct Probe {
    /// The backend's name, for [`open_backend`].
    pub kind: &'static str,
    /// What it can do there, or the refusal that opening it would meet.
    pub outcome: Result<Capabilities, Error>,
}

/// Asks every backend about `dir`, which may be absent, empty or a store. Nothing is made that
/// stays.
#[must_use]
pub fn probe(dir: &Path) -> Vec<Probe> {
    BACKENDS
        .iter()
        .map(|entry| Probe {
            kind: entry.name,
            outcome: (entry.probe)(dir),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("store");
        let able: Vec<_> = probe(&dir)
            .into_iter()
            .filter(|p| p.outcome.is_ok())
            .map(|p| p.kind)
            .collect();
        assert!(able.contains(&"copy"));
        assert!(!dir.exists(), "probing makes nothing");
        for kind in able {
            let promised = probe(&dir).into_iter().find(|p| p.kind == kind).unwrap();
            let store = open_backend(kind, &dir).unwrap();
            assert_eq!(store.name(), kind);
            assert_eq!(store.capabilities(), promised.outcome.unwrap());
            drop(store);
            drop(open_backend(kind, &dir).unwrap());
            for other in names().filter(|other| *other != kind) {
                let error = open_backend(other, &dir).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ForeignStore);
                let cause = std::error::Error::source(&error).unwrap().to_string();
                assert!(cause.contains(kind) && cause.contains(other), "{cause}");
            }
            for found in probe(&dir) {
                assert_eq!(found.outcome.is_ok(), found.kind == kind);
            }
            std::fs::remove_dir_all(&dir).unwrap();
        }
    }

    #[test]
    fn an_unknown_backend_is_refused_with_the_known_ones() {
        let error = open_backend("floppy", Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            cause.contains("copy") && cause.contains("reflink"),
            "{cause}"
        );
    }
}
