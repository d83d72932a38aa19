//! Scattered pieces of guest memory, as a descriptor chain names them.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestUsize, Permissions,
};

use crate::GuestRam;

/// One contiguous piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) addr: GuestAddress,
    pub(super) len: u32,
}

/// Pieces of guest memory in the order of their descriptors. Each lies in guest memory; they may
/// overlap, for a driver may say so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Spans {
    /// None is empty.
    spans: Vec<Span>,
    /// The sum of their lengths; a chain has at most 2^32 - 1 bytes (virtio 1.2, 2.7.5.2).
    len: u64,
}

impl Spans {
    /// Appends a piece; `false` when it is not in guest memory.
    pub(super) fn push(&mut self, memory: &GuestRam, addr: GuestAddress, len: u32) -> bool {
        if len == 0 {
            return true;
        }
        let Ok(size) = usize::try_from(len) else {
            return false;
        };
        let (Some(_), Some(sum)) = (
            addr.checked_add(GuestUsize::from(len)),
            self.len.checked_add(u64::from(len)),
        ) else {
            return false;
        };
        if !GuestMemory::check_range(memory, addr, size, Permissions::ReadWrite) {
            return false;
        }
        self.spans.push(Span { addr, len });
        self.len = sum;
        true
    }

    /// Bytes in all.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.spans.iter().copied()
    }

    /// Removes the last byte and returns its address.
    pub(super) fn pop_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.spans.last_mut()?;
        last.len = last.len.checked_sub(1)?;
        self.len = self.len.checked_sub(1)?;
        let addr = last.addr.checked_add(GuestUsize::from(last.len))?;
        if last.len == 0 {
            self.spans.pop();
        }
        Some(addr)
    }

    /// Reads the first `N` bytes and removes them; `None`, and unchanged, when there are fewer.
    pub(super) fn take_array<const N: usize>(&mut self, memory: &GuestRam) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let size = u64::try_from(N).ok()?;
        if self.len < size {
            return None;
        }
        let mut cursor = Cursor::new(self);
        cursor.read(memory, &mut bytes).ok()?;
        let (index, within) = (cursor.index, cursor.within);
        self.spans.drain(..index);
        if let Some(first) = self.spans.first_mut() {
            first.addr = first.addr.checked_add(GuestUsize::from(within))?;
            first.len = first.len.checked_sub(within)?;
        }
        self.len = self.len.checked_sub(size)?;
        Some(bytes)
    }

    /// Writes `bytes`, then zeroes to the end.
    pub(super) fn fill(&self, memory: &GuestRam, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        static ZEROES: [u8; 4096] = [0; 4096];
        let mut cursor = Cursor::new(self);
        let fits = usize::try_from(self.len).map_or(bytes.len(), |len| len.min(bytes.len()));
        cursor.write(memory, bytes.get(..fits).unwrap_or_default())?;
        let mut left = usize::try_from(self.len)
            .unwrap_or(usize::MAX)
            .saturating_sub(fits);
        while left > 0 {
            let n = left.min(ZEROES.len());
            cursor.write(memory, ZEROES.get(..n).unwrap_or_default())?;
            left = left.saturating_sub(n);
        }
        Ok(())
    }
}

/// A place in [`Spans`] that moves on as bytes are copied.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    spans: &'a Spans,
    index: usize,
    within: u32,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(spans: &'a Spans) -> Self {
        Self {
            spans,
            index: 0,
            within: 0,
        }
    }

    /// Copies from guest memory until `bytes` is full or the spans end.
    pub(super) fn read(
        &mut self,
        memory: &GuestRam,
        mut bytes: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        while let Some((addr, n)) = self.next_piece(bytes.len()) {
            let Some((now, later)) = bytes.split_at_mut_checked(n) else {
                break;
            };
            memory.read_slice(now, addr)?;
            bytes = later;
        }
        Ok(())
    }

    /// Copies to guest memory until `bytes` is used up or the spans end.
    pub(super) fn write(
        &mut self,
        memory: &GuestRam,
        mut bytes: &[u8],
    ) -> Result<(), GuestMemoryError> {
        while let Some((addr, n)) = self.next_piece(bytes.len()) {
            let Some((now, later)) = bytes.split_at_checked(n) else {
                break;
            };
            memory.write_slice(now, addr)?;
            bytes = later;
        }
        Ok(())
    }

    /// The next contiguous piece of at most `most` bytes; `None` when either has ended.
    fn next_piece(&mut self, most: usize) -> Option<(GuestAddress, usize)> {
        if most == 0 {
            return None;
        }
        let span = self.spans.spans.get(self.index)?;
        let left = span.len.checked_sub(self.within)?;
        let n = left.min(u32::try_from(most).unwrap_or(u32::MAX));
        let addr = span.addr.checked_add(GuestUsize::from(self.within))?;
        if n == left {
            self.index = self.index.checked_add(1)?;
            self.within = 0;
        } else {
            self.within = self.within.checked_add(n)?;
        }
        Some((addr, usize::try_from(n).ok()?))
    }
}
