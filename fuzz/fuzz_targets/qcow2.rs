//! The checks that stand before every qcow2 library: header, then tables and refcounts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_storage::qcow2::{check_header, check_tables};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = check_header(bytes, bytes.len() as u64) {
        let _verdict = check_tables(bytes, &header);
    }
});
