//! The pilot: a tiny bare-metal guest, and its driver on the host.
//!
//! [`PILOT_ELF`] boots by PVH and by the Linux 64-bit protocol, under Offshoot, QEMU
//! `-M microvm` and Firecracker. It drives disks, network cards and vsock, reports its state and
//! does what [`PilotClient`] asks of it; `docs/pilot.md` has the whole of it. It is built from
//! `kernel/` by this package's build script.

mod client;

pub use client::{ClientError, PilotClient, connect_vsock};
pub use offshoot_protocol as protocol;

/// The guest's image: an ELF executable with a PVH note.
pub const PILOT_ELF: &[u8] = include_bytes!(env!("OFFSHOOT_PILOT_IMAGE"));
