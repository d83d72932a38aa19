//! Kernel images of every kind into small guest RAM.
#![no_main]

use std::borrow::Cow;

use libfuzzer_sys::fuzz_target;
use offshoot_devices::GuestRam;
use offshoot_vmm::boot::{self, BootSource, Image, PlatformInfo};
use vm_memory::GuestAddress;

fuzz_target!(|bytes: &[u8]| {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("guest memory");
    let source = BootSource::new(Image::Bytes(Cow::Owned(bytes.to_vec())));
    let platform = PlatformInfo {
        vcpus: 1,
        virtio: Vec::new(),
        serial: true,
    };
    let _outcome = boot::load(&memory, &source, &platform);
});
