//! The qcow2 backend: a fork is a new overlay of a few kilobytes.
//!
//! What images are accepted and why, how a freeze survives a crash, how long a chain may be and
//! what each engine is fenced off from is told in `docs/qcow2.md`.

mod backend;
mod engine;
mod format;
mod freeze;
mod header;
mod image;
mod layer;
mod spec;
mod tables;
mod volume;
mod whole;

pub use backend::{Qcow2Backend, Qcow2Options};
pub use engine::{EngineKind, UnknownEngine};
pub use header::{Backing, Fault, Header, HeaderError, check_header};
pub(crate) use image::SingleImage;
pub use layer::MAX_CHAIN_LIMIT;
pub use tables::{ReadAt, TableError, check_tables};
