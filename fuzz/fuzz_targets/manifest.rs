//! A manifest from raw bytes through every check that needs no memory image.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_snapshot_format::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let _sections = manifest.sections().finish();
    }
});
