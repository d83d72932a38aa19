//! The loop over a virtqueue that small devices share.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceError, Interrupt};
use crate::GuestRam;
use crate::event::event;

/// The most descriptors of one chain that the small devices look at. A driver may make a chain of
/// 65535 through an indirect table; none of these devices has a use for so many.
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// What a device made of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is done with it, and has written so many bytes.
    Used(u32),
    /// It leaves this chain, and all behind it, in the available ring for now.
    Later,
}

/// Gives the available chains, at most one queue's worth, to `handle`, then interrupts the driver
/// when it wants that. If more were available, `event` is written, so that the queue's turn comes
/// again after everybody else's. A queue that is not ready is left alone.
pub(crate) fn serve(
    queue: &mut Queue,
    memory: &GuestRam,
    interrupt: &Interrupt,
    event: &EventFd,
    mut handle: impl FnMut(DescriptorChain<&GuestRam>) -> Result<Outcome, DeviceError>,
) -> Result<(), DeviceError> {
    if !queue.ready() {
        return Ok(());
    }
    let mut budget = queue.size();
    let mut used = false;
    'drain: loop {
        queue.disable_notification(memory)?;
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            if budget == 0 {
                queue.go_to_previous_position();
                wake(event)?;
                break 'drain;
            }
            budget = budget.saturating_sub(1);
            match handle(chain)? {
                Outcome::Used(len) => {
                    queue.add_used(memory, head, len)?;
                    used = true;
                }
                Outcome::Later => {
                    queue.go_to_previous_position();
                    break 'drain;
                }
            }
        }
        if !queue.enable_notification(memory)? {
            break;
        }
    }
    if used && queue.needs_notification(memory)? {
        interrupt.used_buffer().map_err(cannot_interrupt)?;
    }
    Ok(())
}

/// Takes the next available chain. An available index that no driver could have written is an
/// error, not an empty queue (`pop_descriptor_chain` makes no difference between them).
pub(crate) fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestRam,
) -> Result<Option<DescriptorChain<&'m GuestRam>>, Error> {
    Ok(queue.iter(memory)?.next())
}

/// Asks to be notified when the available index moves past `index`. `enable_notification` asks for
/// the index that is taken next, which lies behind when chains are left in the available ring on
/// purpose: buffers that come after them would then go unheard.
pub(crate) fn notify_after(queue: &mut Queue, memory: &GuestRam, index: u16) -> Result<(), Error> {
    queue.enable_notification(memory)?;
    if queue.event_idx_enabled() {
        // virtio 1.2, 2.7.8: avail_event stands behind the used ring's elements.
        let offset = u64::from(queue.size()).saturating_mul(8).saturating_add(4);
        let address = GuestAddress(queue.used_ring())
            .checked_add(offset)
            .ok_or(Error::AddressOverflow)?;
        memory
            .store(index.to_le(), address, Ordering::SeqCst)
            .map_err(Error::GuestMemory)?;
        fence(Ordering::SeqCst);
    }
    Ok(())
}

/// Puts several chains into the used ring so that the driver sees all of them or none
/// (virtio 1.2, 5.1.6.4.1: the buffers of one packet belong together). The queue counts them as one
/// for its interrupt suppression: after more than one, interrupt in any case.
pub(crate) fn add_used_together(
    queue: &mut Queue,
    memory: &GuestRam,
    used: &[(u16, u32)],
) -> Result<(), Error> {
    let Some((&(last, last_len), before)) = used.split_last() else {
        return Ok(());
    };
    let mut index = queue.next_used();
    for &(head, len) in before {
        // virtio 1.2, 2.7.8: le16 flags, le16 idx, then elements of le32 id and le32 len.
        let slot = u64::from(index.checked_rem(queue.size()).ok_or(Error::InvalidSize)?);
        let address = GuestAddress(queue.used_ring())
            .checked_add(slot.saturating_mul(8).saturating_add(4))
            .ok_or(Error::AddressOverflow)?;
        let element = (u64::from(len) << 32) | u64::from(head);
        memory
            .write_slice(&element.to_le_bytes(), address)
            .map_err(Error::GuestMemory)?;
        index = index.wrapping_add(1);
    }
    queue.set_next_used(index);
    queue.add_used(memory, last, last_len)
}

/// An eventfd for each queue.
pub(crate) fn queue_events(count: usize) -> io::Result<Vec<Arc<EventFd>>> {
    (0..count).map(|_| event().map(Arc::new)).collect()
}

/// Takes what was notified; an eventfd that was not is not waited for.
pub(crate) fn drain(event: &EventFd) {
    // EAGAIN: there is nothing to take.
    let _ = event.read();
}

pub(crate) fn cannot_interrupt(source: io::Error) -> DeviceError {
    DeviceError::Host {
        context: "cannot raise the interrupt",
        source,
    }
}

pub(crate) fn wake(event: &EventFd) -> Result<(), DeviceError> {
    event.write(1).map_err(|source| DeviceError::Host {
        context: "cannot write a queue's eventfd",
        source,
    })
}
