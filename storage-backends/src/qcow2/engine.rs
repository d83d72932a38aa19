//! What reads and writes an image whose header and chain have been checked.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::str::FromStr;
use std::sync::Arc;

use super::layer::{Layer, Top};
use crate::{Error, ErrorKind};

#[cfg(feature = "imago")]
pub(super) mod imago;
#[cfg(feature = "qcow2-rs")]
pub(super) mod qcow2_rs;

/// The library that reads and writes the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EngineKind {
    /// The `imago` crate (cargo feature `imago`, on by default).
    #[default]
    Imago,
    /// The `qcow2-rs` crate (cargo feature `qcow2-rs`, off by default).
    Qcow2Rs,
}

impl EngineKind {
    /// The engine's name: that of its crate and of its cargo feature.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Imago => "imago",
            Self::Qcow2Rs => "qcow2-rs",
        }
    }

    /// Whether it was compiled in.
    #[must_use]
    pub const fn is_compiled_in(self) -> bool {
        match self {
            Self::Imago => cfg!(feature = "imago"),
            Self::Qcow2Rs => cfg!(feature = "qcow2-rs"),
        }
    }

    /// Refuses an engine that was not compiled in.
    pub(crate) fn require(
        self,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Result<(), Error> {
        if self.is_compiled_in() {
            return Ok(());
        }
        Err(Error::because(
            ErrorKind::Unsupported,
            operation,
            object,
            EngineMissing(self),
        ))
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An engine name that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no qcow2 engine {0:?}; the engines are imago and qcow2-rs")]
pub struct UnknownEngine(String);

impl FromStr for EngineKind {
    type Err = UnknownEngine;
    fn from_str(s: &str) -> Result<Self, UnknownEngine> {
        match s {
            "imago" => Ok(Self::Imago),
            "qcow2-rs" => Ok(Self::Qcow2Rs),
            other => Err(UnknownEngine(other.chars().take(64).collect())),
        }
    }
}

/// An engine that this build does not have.
#[derive(Debug, thiserror::Error)]
#[error("the qcow2 engine {0} is not part of this build; build with the cargo feature {0}")]
struct EngineMissing(EngineKind);

/// An open image with its chain of layers beneath.
///
/// Every range that is passed in lies inside the image and is not empty; the image is writable
/// when a changing call comes. May be called from several threads at once.
pub(super) trait Engine: Send + Sync + fmt::Debug {
    /// Fills `bufs` from `offset` on.
    fn read(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()>;

    /// Writes `bufs` from `offset` on.
    fn write(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()>;

    /// Makes the range read as zeroes, whatever the layers beneath hold, and with `unmap` gives
    /// its space back where the engine can.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Hands all cached metadata to the kernel, without waiting for the disk.
    fn write_back(&self) -> io::Result<()>;

    /// Returns once everything written before would survive a power cut.
    fn flush(&self) -> io::Result<()>;

    /// From now on refuses every write: the image has become a layer.
    fn seal(&self);
}

/// Opens the image `top` with an engine; `operation` names what is being done in an error.
pub(super) fn open(
    kind: EngineKind,
    top: &Arc<Top>,
    operation: &'static str,
) -> Result<Box<dyn Engine>, Error> {
    kind.require(operation, &top.label)?;
    match kind {
        #[cfg(feature = "imago")]
        EngineKind::Imago => Ok(Box::new(imago::Imago::open(top, operation)?)),
        #[cfg(feature = "qcow2-rs")]
        EngineKind::Qcow2Rs => Ok(Box::new(qcow2_rs::Qcow2Rs::open(top, operation)?)),
        #[allow(
            unreachable_patterns,
            reason = "which engines remain depends on the features"
        )]
        _ => Err(Error::because(
            ErrorKind::Unsupported,
            operation,
            &top.label,
            EngineMissing(kind),
        )),
    }
}

/// The state that an engine keeps for a layer that several images share.
#[cfg(feature = "imago")]
#[derive(Debug, Default)]
pub(super) struct SharedReader {
    pub(super) imago: std::sync::Mutex<Option<Arc<imago::Access>>>,
}

/// Layers from the top's backing file down to the base.
pub(super) fn chain(first: Option<&Arc<Layer>>) -> impl Iterator<Item = &Arc<Layer>> {
    std::iter::successors(first, |layer| layer.backing.as_ref())
}
