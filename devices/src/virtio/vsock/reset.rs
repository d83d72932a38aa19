//! The transport reset after a restore (virtio 1.2, 5.10.6.7), and the gate that keeps traffic
//! back until the guest has handled it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Error as QueueError, Queue, QueueT};

use crate::GuestRam;
use crate::virtio::buffers::Buffers;
use crate::virtio::ring;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` as the driver reads it.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// How long a guest without event buffers is given to post one. Linux has eight of them posted
/// but for the microseconds in which it handles an event.
const NO_BUFFER_WAIT: Duration = Duration::from_millis(20);

/// Whether traffic may flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    Open,
    /// The event is to be sent when the device resumes. `goal` is that of an earlier reset that
    /// the guest had not handled when it was captured.
    Due {
        goal: Option<u16>,
    },
    /// The guest has no event buffer.
    NoBuffer {
        goal: Option<u16>,
        until: Instant,
    },
    /// The event is in the used ring; handled when the available index reaches `goal`.
    Sent {
        goal: u16,
        until: Instant,
    },
}

impl Gate {
    /// What is saved of it.
    pub(super) fn goal(self) -> Option<u16> {
        match self {
            Self::Open => None,
            Self::Due { goal } | Self::NoBuffer { goal, .. } => goal,
            Self::Sent { goal, .. } => Some(goal),
        }
    }

    /// When to look again at the latest.
    pub(super) fn alarm(self) -> Option<Instant> {
        match self {
            Self::Open | Self::Due { .. } => None,
            Self::NoBuffer { until, .. } | Self::Sent { until, .. } => Some(until),
        }
    }

    /// Moves on as far as the guest allows. Returns the new gate and whether an event was put
    /// into the used ring.
    pub(super) fn advance(
        self,
        queue: Option<&mut Queue>,
        memory: &GuestRam,
        limit: Duration,
    ) -> Result<(Self, bool), QueueError> {
        if self == Self::Open {
            return Ok((Self::Open, false));
        }
        let Some(queue) = queue.filter(|queue| queue.ready()) else {
            // A driver without an event queue never learns of resets: it gets its traffic.
            return Ok((Self::Open, false));
        };
        let now = Instant::now();
        let avail = queue.avail_idx(memory, Ordering::Acquire)?.0;
        match self {
            Self::Open => Ok((Self::Open, false)),
            Self::Due { goal } | Self::NoBuffer { goal, .. } => {
                let goal = next_goal(goal, avail, queue.size());
                // Ask for the notification of the buffer's return before the guest can see the
                // event, or a quick guest returns it unheard.
                ring::notify_after(queue, memory, goal.wrapping_sub(1))?;
                if send(queue, memory)? {
                    let until = now.checked_add(limit).unwrap_or(now);
                    return Ok((Self::Sent { goal, until }, true));
                }
                ring::notify_after(queue, memory, avail)?;
                Ok(match self {
                    Self::NoBuffer { until, .. } if now >= until => {
                        tracing::warn!("the guest takes no vsock events; it meets resets instead");
                        (Self::Open, false)
                    }
                    Self::NoBuffer { .. } => (self, false),
                    _ => (
                        Self::NoBuffer {
                            goal: self.goal(),
                            until: now.checked_add(NO_BUFFER_WAIT).unwrap_or(now),
                        },
                        false,
                    ),
                })
            }
            Self::Sent { goal, until } => {
                let handled = reached(avail, goal, queue.size());
                if !handled && now >= until {
                    tracing::warn!("the guest has not handled the vsock transport reset in time");
                }
                Ok(if handled || now >= until {
                    (Self::Open, false)
                } else {
                    (self, false)
                })
            }
        }
    }
}

/// The available index at which the event that is about to be sent has been handled, and every
/// earlier one with it: each returned buffer moves it by one.
fn next_goal(earlier: Option<u16>, avail: u16, size: u16) -> u16 {
    let behind = earlier.filter(|&goal| !reached(avail, goal, size));
    behind.unwrap_or(avail).wrapping_add(1)
}

/// Whether `avail` is at or past `goal`, which is never more than a queue ahead of it.
fn reached(avail: u16, goal: u16, size: u16) -> bool {
    let missing = goal.wrapping_sub(avail);
    missing == 0 || missing > size
}

/// Puts the event into a buffer of the guest's. False when it has none.
fn send(queue: &mut Queue, memory: &GuestRam) -> Result<bool, QueueError> {
    let mut buffers = Buffers::default();
    for _ in 0..queue.size() {
        let Some(chain) = ring::pop(queue, memory)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let written = buffers
            .load(chain, true)
            .and_then(|()| buffers.write(memory, 0, &TRANSPORT_RESET));
        if written.is_ok() {
            queue.add_used(memory, head, 4)?;
            return Ok(true);
        }
        queue.add_used(memory, head, 0)?;
    }
    Ok(false)
}
