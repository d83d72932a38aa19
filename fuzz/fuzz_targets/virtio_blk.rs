//! virtio-blk on a real volume against a driver that does anything.
#![no_main]

use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use offshoot_devices::virtio::blk::{Blk, BlkConfig, BlkHost};
use offshoot_fuzz::{Script, drive};
use offshoot_storage::{Volume, VolumeName};

static VOLUME: LazyLock<Arc<dyn Volume>> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("offshoot-fuzz-blk-{}", std::process::id()));
    let _gone = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a directory");
    let backend = offshoot_storage::copy::open(&dir).expect("a store");
    let volume = backend
        .create(&VolumeName::new("disk").expect("a name"), 1 << 20)
        .expect("a volume");
    // The volume lives on through its descriptor; nothing stays behind on the disk.
    let _gone = std::fs::remove_dir_all(&dir);
    volume
});

fuzz_target!(|script: Script| {
    let host = BlkHost::new(Arc::clone(&VOLUME));
    let blk = Blk::new(BlkConfig::new("disk"), host).expect("a drive");
    drive(Arc::new(Mutex::new(blk)), &script);
});
