//! Drivers for virtio 1.2 devices on virtio-mmio.

pub(crate) mod balloon;
pub(crate) mod blk;
pub(crate) mod mmio;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod vsock;
