//! A manifest from raw bytes through every check that needs no memory image: as it comes, and with
//! its checksums made to match, so that what lies behind them is reached.
#![no_main]

#[path = "../../snapshot-format/tests/common/reseal.rs"]
mod reseal;

use libfuzzer_sys::fuzz_target;
use offshoot_snapshot_format::Manifest;

fn parse(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let _left_over = manifest.sections().finish();
        assert!(manifest.memory_map().layout().chunk_count() <= 1 << 20);
    }
}

fuzz_target!(|bytes: &[u8]| {
    parse(bytes);
    let mut sealed = bytes.to_vec();
    reseal::reseal(&mut sealed);
    parse(&sealed);
});
