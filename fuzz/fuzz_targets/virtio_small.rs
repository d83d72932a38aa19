//! The entropy device and the balloon against a driver that does anything.
#![no_main]

use std::io;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use offshoot_devices::virtio::balloon::{
    Balloon, BalloonConfig, GuestRange, PAGE_SIZE, PageReclaim,
};
use offshoot_devices::virtio::rng::{BytesPerSecond, Rng};
use offshoot_fuzz::{RAM, Script, drive};

/// Takes nothing back, but looks at what it is given.
#[derive(Debug)]
struct Inspector;

impl PageReclaim for Inspector {
    fn reclaim(&self, range: GuestRange) -> io::Result<()> {
        assert!(range.len > 0 && range.len % PAGE_SIZE == 0 && range.start.0 % PAGE_SIZE == 0);
        assert!(
            range.start.0 + range.len <= RAM as u64,
            "outside guest memory"
        );
        Ok(())
    }
}

fuzz_target!(|input: (Option<(bool, bool, bool)>, Script)| {
    let (balloon, script) = input;
    match balloon {
        Some((deflate_on_oom, statistics, page_reporting)) => {
            let config = BalloonConfig {
                deflate_on_oom,
                statistics,
                page_reporting,
            };
            let device = Balloon::new(config, Box::new(Inspector)).expect("a balloon");
            drive(Arc::new(Mutex::new(device)), &script);
        }
        None => {
            let rate = BytesPerSecond(NonZeroU32::MAX);
            let device = Rng::new(rate).expect("an entropy device");
            drive(Arc::new(Mutex::new(device)), &script);
        }
    }
});
