//! The decoders of every section that is not a small device's (those are in `device_state`).
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_devices::virtio::blk::BlkState;
use offshoot_devices::virtio::net::NetState;
use offshoot_devices::virtio::vsock::VsockState;
use offshoot_snapshot_format::{Metadata, Payload, Requirements};
use offshoot_vmm::PlatformState;
use offshoot_vmm::arch::{VcpuState, VmState};

/// What decodes encodes again, and decodes to the same bytes.
fn round_trip<P: Payload>(bytes: &[u8]) {
    if let Ok(payload) = P::decode(P::VERSION, bytes) {
        let again = payload.encode().expect("what was decoded encodes");
        let twice = P::decode(P::VERSION, &again).expect("what was encoded decodes");
        assert_eq!(twice.encode().expect("encodes"), again);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    match kind % 8 {
        0 => round_trip::<Requirements>(bytes),
        1 => round_trip::<Metadata>(bytes),
        2 => round_trip::<VcpuState>(bytes),
        3 => round_trip::<VmState>(bytes),
        4 => round_trip::<BlkState>(bytes),
        5 => round_trip::<VsockState>(bytes),
        6 => round_trip::<PlatformState>(bytes),
        _ => round_trip::<NetState>(bytes),
    }
});
