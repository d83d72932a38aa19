//! One packet into the guest's receive buffers (virtio 1.2, 5.1.6.4).

use virtio_queue::{Error as QueueError, Queue, QueueT};

use super::header::HEADER_LEN;
use crate::GuestRam;
use crate::virtio::buffers::Buffers;
use crate::virtio::{DeviceError, ring};

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It is in so many used chains.
    Done { chains: usize },
    /// It does not fit into the buffers that the driver makes, or they are no buffers.
    Dropped,
    /// The driver has too few buffers for it now.
    NoRoom,
}

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

pub(super) fn deliver(
    queue: &mut Queue,
    memory: &GuestRam,
    buffers: &mut Buffers,
    packet: &mut [u8],
    mergeable: bool,
) -> Result<Delivery, DeviceError> {
    let first = queue.next_avail();
    let chains = match plan(queue, memory, buffers, packet.len(), mergeable)? {
        Ok(chains) => chains,
        Err(Delivery::NoRoom) => {
            queue.set_next_avail(first);
            return Ok(Delivery::NoRoom);
        }
        Err(other) => return Ok(other),
    };
    queue.set_next_avail(first);
    let count = u16::try_from(chains).unwrap_or(u16::MAX).to_le_bytes();
    if let Some(field) = packet.get_mut(NUM_BUFFERS..HEADER_LEN) {
        field.copy_from_slice(&count);
    }
    let mut used = Vec::with_capacity(chains);
    let mut rest: &[u8] = packet;
    for _ in 0..chains {
        let chain = ring::pop(queue, memory)?.ok_or(CHANGED)?;
        let head = chain.head_index();
        buffers.load(chain, true).map_err(|_| CHANGED)?;
        let (now, later) = rest
            .split_at_checked(buffers.len().min(rest.len()))
            .ok_or(CHANGED)?;
        buffers.write(memory, 0, now).map_err(|_| OUTSIDE)?;
        used.push((head, u32::try_from(now.len()).unwrap_or(u32::MAX)));
        rest = later;
    }
    if !rest.is_empty() {
        return Err(CHANGED);
    }
    ring::add_used_together(queue, memory, &used)?;
    Ok(Delivery::Done { chains })
}

const CHANGED: DeviceError =
    DeviceError::Driver("a descriptor changed after it was made available");
const OUTSIDE: DeviceError = DeviceError::Driver("a receive buffer is outside guest memory");

/// How many chains a packet of `len` bytes takes. Moves the queue on over what it looked at; a
/// chain that is no buffer is used up.
fn plan(
    queue: &mut Queue,
    memory: &GuestRam,
    buffers: &mut Buffers,
    len: usize,
    mergeable: bool,
) -> Result<Result<usize, Delivery>, QueueError> {
    let before = queue.next_avail();
    let most = if mergeable { queue.size() } else { 1 };
    let mut room = 0usize;
    for chains in 1..=usize::from(most) {
        let Some(chain) = ring::pop(queue, memory)? else {
            return Ok(Err(Delivery::NoRoom));
        };
        let head = chain.head_index();
        if buffers.load(chain, true).is_err() || (chains == 1 && buffers.len() < HEADER_LEN) {
            // Only the first in line can be given back alone: those before this one are tried
            // again with the next packet.
            if chains == 1 {
                queue.add_used(memory, head, 0)?;
                return Ok(Err(Delivery::Dropped));
            }
            queue.set_next_avail(before);
            return Err(QueueError::InvalidChain);
        }
        room = room.saturating_add(buffers.len());
        if room >= len {
            return Ok(Ok(chains));
        }
    }
    // All that the driver can ever post is not enough for this packet.
    queue.set_next_avail(before);
    Ok(Err(Delivery::Dropped))
}
