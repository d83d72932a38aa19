//! Checksums that match: what a hostile writer's manifest has. The fuzz target uses it, too.

/// The manifest's fixed places, as docs/snapshot-format.md gives them.
pub(crate) const HEADER: usize = 128;
pub(crate) const ENTRY: usize = 32;
pub(crate) const TRAILER: usize = 32;

/// Makes all checksums of a manifest match its bytes again, as far as the table's own words allow: what a
/// hostile writer would do.
pub(crate) fn reseal(bytes: &mut [u8]) {
    let u32_at = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
    let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
    if bytes.len() < HEADER + TRAILER {
        return;
    }
    let room = (bytes.len() - HEADER - TRAILER) / ENTRY;
    let count = (u32_at(bytes, 32) as usize).min(room);
    for entry in (0..count).map(|i| HEADER + i * ENTRY) {
        let offset = u64_at(bytes, entry + 16);
        let end = offset.saturating_add(u64_at(bytes, entry + 24));
        if end <= bytes.len() as u64 {
            let range = usize::try_from(offset).unwrap()..usize::try_from(end).unwrap();
            let sum = crc32c::crc32c(&bytes[range]).to_le_bytes();
            bytes[entry + 12..entry + 16].copy_from_slice(&sum);
        }
    }
    let sum = crc32c::crc32c(&bytes[HEADER..HEADER + count * ENTRY]).to_le_bytes();
    bytes[36..40].copy_from_slice(&sum);
    let sum = crc32c::crc32c(&bytes[..124]).to_le_bytes();
    bytes[124..128].copy_from_slice(&sum);
    let trailer = bytes.len() - TRAILER;
    let digest = blake3::hash(&bytes[..trailer]);
    bytes[trailer..].copy_from_slice(digest.as_bytes());
}
