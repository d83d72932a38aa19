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

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DeviceError, Interrupt};
use crate::GuestRam;

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

/// An eventfd for each queue.
pub(crate) fn queue_events(count: usize) -> io::Result<Vec<Arc<EventFd>>> {
    (0..count)
        .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
        .collect()
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
