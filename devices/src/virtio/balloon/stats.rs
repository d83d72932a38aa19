//! What the guest says of its memory (virtio 1.2, 5.5.6.4).

/// The most bytes of statistics that are looked at; Linux sends 10 for each of some 16 tags.
pub(super) const MAX_BYTES: usize = 640;
const ENTRY: usize = 10;

/// The guest's own figures, each as far as it gave it. Bytes, unless said otherwise. They are claims
/// of an untrusted guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct GuestStats {
    /// Swapped in since boot.
    pub swap_in: Option<u64>,
    /// Swapped out since boot.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O, a count.
    pub major_faults: Option<u64>,
    /// Page faults that did not, a count.
    pub minor_faults: Option<u64>,
    /// Memory that is not in use.
    pub free: Option<u64>,
    /// All memory.
    pub total: Option<u64>,
    /// What could be allocated without swapping.
    pub available: Option<u64>,
    /// Page cache and the like, which can be given up quickly.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated, a count.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated, a count.
    pub hugetlb_failures: Option<u64>,
}

impl GuestStats {
    /// Reads entries of a 16-bit tag and a 64-bit value. Tags that are not known are passed over
    /// (5.5.6.4.2), as is an entry that is cut off.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for entry in bytes.chunks_exact(ENTRY) {
            let &[t0, t1, ref value @ ..] = entry else {
                continue;
            };
            let Ok(value) = <[u8; 8]>::try_from(value) else {
                continue;
            };
            let field = match u16::from_le_bytes([t0, t1]) {
                0 => &mut stats.swap_in,
                1 => &mut stats.swap_out,
                2 => &mut stats.major_faults,
                3 => &mut stats.minor_faults,
                4 => &mut stats.free,
                5 => &mut stats.total,
                6 => &mut stats.available,
                7 => &mut stats.disk_caches,
                8 => &mut stats.hugetlb_allocations,
                9 => &mut stats.hugetlb_failures,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(value));
        }
        stats
    }
}
