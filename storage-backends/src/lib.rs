//! The storage plug: block volumes that can be frozen and forked.
//!
//! A backend keeps two kinds of things under names: **volumes**, which a
//! machine writes to, and **layers**, which never change again. [`freeze`]
//! makes a layer out of a volume's present content; [`fork`] makes a volume
//! out of a layer.
//!
//! [`freeze`]: StorageBackend::freeze
//! [`fork`]: StorageBackend::fork

mod backend;
pub mod conformance;
pub mod copy;
mod dir;
mod durable;
mod error;
pub mod faults;
mod filesystem;
pub mod image;
mod lock;
mod name;
pub mod qcow2;
mod raw;
pub mod reflink;
pub mod registry;
mod size;
mod volume;

pub use backend::{Access, Capabilities, Durability, ForkCost, StorageBackend, Usage};
pub use error::{Error, ErrorKind};
pub use name::{InvalidName, LayerName, VolumeName};
pub use registry::{open_backend, probe};
pub use size::{MAX_SIZE, SECTOR};
pub use volume::Volume;
