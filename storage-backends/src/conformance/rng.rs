//! Random numbers that are the same everywhere for a seed.

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is not zero. Not quite even, which tests do not need.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// An index below `len`, which is not zero.
    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// Fills `buf`: four random kilobytes, repeated, but no two pages alike. (Debug builds
    /// spend most of the suite's time here.)
    pub(crate) fn fill(&mut self, buf: &mut [u8]) {
        let mut page = [0; 4096];
        for word in page.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        for chunk in buf.chunks_mut(page.len()) {
            page[..8].copy_from_slice(&self.next().to_le_bytes());
            chunk.copy_from_slice(page.split_at(chunk.len()).0);
        }
    }

    /// `len` bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.fill(&mut buf);
        buf
    }
}
