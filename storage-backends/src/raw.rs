//! Volumes and layers as raw files: what copy and reflink have in common.
//!
//! A volume's bytes are its file's bytes, its size is the file's length. Volumes have mode 0600 and
//! are locked by whoever has them open; layers have mode 0444 and are only ever opened for reading.

mod holes;
mod io;
mod store;
mod volume;

pub(crate) use holes::DataRanges;
pub(crate) use io::{read_exact_at, write_all_at};
pub(crate) use store::{Duplicate, RawStore};
