//! One descriptor chain as plain ranges of guest memory, walked once and within bounds. What a
//! driver does with the framing of a buffer is its own affair (virtio 1.2, 2.7.4.1: a device
//! makes no assumption about it), so readers and writers here work across descriptors.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::GuestRam;

/// More descriptors than any queue here has entries: a longer chain is a loop or a flood
/// (virtio 1.2, 2.7.5.3.1: no chain longer than the queue).
const MAX_DESCRIPTORS: usize = 1024;

/// A chain that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChainFault {
    /// It is empty, loops, ends in the middle, or is longer than any queue.
    Broken,
    /// A buffer lies outside guest memory.
    Memory,
    /// It holds buffers of the wrong direction, or fewer bytes than needed.
    Shape,
}

/// The buffers of one direction of a chain. Kept between chains to save the allocation.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    parts: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl Buffers {
    /// Takes a chain whose buffers all have one direction.
    pub(crate) fn load<M>(
        &mut self,
        chain: DescriptorChain<M>,
        writable: bool,
    ) -> Result<(), ChainFault>
    where
        M: Deref<Target = GuestRam>,
    {
        self.parts.clear();
        self.len = 0;
        let mut open_end = true;
        for descriptor in chain {
            if self.parts.len() >= MAX_DESCRIPTORS {
                return Err(ChainFault::Broken);
            }
            if descriptor.is_write_only() != writable {
                return Err(ChainFault::Shape);
            }
            let len = usize::try_from(descriptor.len()).map_err(|_| ChainFault::Shape)?;
            self.parts.push((descriptor.addr(), len));
            self.len = self.len.saturating_add(len);
            open_end = descriptor.has_next();
        }
        // The iterator stops without a word when the chain loops or leaves the table.
        if open_end {
            Err(ChainFault::Broken)
        } else {
            Ok(())
        }
    }

    /// Bytes in all buffers.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Fills `data` from the buffers, starting `offset` bytes in.
    pub(crate) fn read(
        &self,
        memory: &GuestRam,
        offset: usize,
        data: &mut [u8],
    ) -> Result<(), ChainFault> {
        let mut left = data;
        self.each(offset, left.len(), |address, take| {
            let (head, tail) = std::mem::take(&mut left)
                .split_at_mut_checked(take)
                .ok_or(ChainFault::Shape)?;
            left = tail;
            memory
                .read_slice(head, address)
                .map_err(|_| ChainFault::Memory)
        })
    }

    /// Copies `data` into the buffers, starting `offset` bytes in.
    pub(crate) fn write(
        &self,
        memory: &GuestRam,
        offset: usize,
        data: &[u8],
    ) -> Result<(), ChainFault> {
        let mut left = data;
        self.each(offset, left.len(), |address, take| {
            let (head, tail) = left.split_at_checked(take).ok_or(ChainFault::Shape)?;
            left = tail;
            memory
                .write_slice(head, address)
                .map_err(|_| ChainFault::Memory)
        })
    }

    /// Calls `copy` with the contiguous pieces of `[offset, offset + len)`.
    fn each(
        &self,
        offset: usize,
        len: usize,
        mut copy: impl FnMut(GuestAddress, usize) -> Result<(), ChainFault>,
    ) -> Result<(), ChainFault> {
        let (mut skip, mut left) = (offset, len);
        for &(address, part) in &self.parts {
            if left == 0 {
                break;
            }
            let Some(room) = part.checked_sub(skip).filter(|&room| room != 0) else {
                skip = skip.saturating_sub(part);
                continue;
            };
            let take = room.min(left);
            let skipped = u64::try_from(skip).map_err(|_| ChainFault::Memory)?;
            let start = address.checked_add(skipped).ok_or(ChainFault::Memory)?;
            copy(start, take)?;
            left = left.saturating_sub(take);
            skip = 0;
        }
        if left == 0 {
            Ok(())
        } else {
            Err(ChainFault::Shape)
        }
    }
}
