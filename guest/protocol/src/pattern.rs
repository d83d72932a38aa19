//! The pattern that memory, disks and streams are filled with and compared to.
//!
//! Each word of 8 bytes depends on the seed and on its own place only, so any piece can be made
//! or checked alone, in any order and on either side.

/// The word at byte `place` (a multiple of 8) under `seed`; on disk and wire it is little-endian.
#[inline]
pub fn word(seed: u64, place: u64) -> u64 {
    // The finaliser of MurmurHash3 over a Weyl sequence: neighbours share no bits to speak of.
    let mut x = seed.wrapping_add(
        (place >> 3)
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15),
    );
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// Fills `bytes`, the first of which lies at `place` (a multiple of 8).
pub fn fill(bytes: &mut [u8], seed: u64, place: u64) {
    let mut at = place;
    for chunk in bytes.chunks_mut(8) {
        for (to, from) in chunk.iter_mut().zip(word(seed, at).to_le_bytes()) {
            *to = from;
        }
        at = at.wrapping_add(8);
    }
}

/// Compares `bytes`, the first of which lies at `place` (a multiple of 8): how many words differ,
/// and the place of the first.
pub fn compare(bytes: &[u8], seed: u64, place: u64) -> (u64, Option<u64>) {
    let mut bad = 0u64;
    let mut first = None;
    let mut at = place;
    for chunk in bytes.chunks(8) {
        let expected = word(seed, at).to_le_bytes();
        if chunk.iter().zip(expected.iter()).any(|(a, b)| a != b) {
            bad = bad.saturating_add(1);
            first = first.or(Some(at));
        }
        at = at.wrapping_add(8);
    }
    (bad, first)
}
