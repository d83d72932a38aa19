//! The snapshot format: bytes to plain data and back. Knows no KVM and no device.
#![forbid(unsafe_code)]

mod payload;

pub use payload::{Payload, PayloadError, SectionKind, decode_exact};
