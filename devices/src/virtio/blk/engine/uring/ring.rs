//! The ring itself: the only place where the kernel is handed addresses of guest memory.
//!
//! # Rules
//! 1. An entry names only guest memory that [`RingWithMemory::memory`] maps (found through
//!    `GuestMemory::get_slices`, which checks every piece) and an `iovec` array in its slot.
//! 2. The slot keeps the array, unmoved and unchanged, until the kernel has completed the entry:
//!    [`Slot::in_kernel`] says that it has not, and nothing touches the array of such a slot.
//! 3. `memory` outlives every entry: [`RingWithMemory`] owns an `Arc` of it, and its drop first
//!    waits until no entry is in the kernel, or else leaks both (a leak is safe).
//! 4. The file is registered with the ring, so that the kernel's own reference to it counts, not a
//!    descriptor number that may be closed or reused.
//! 5. Guest memory is never made a Rust slice: the kernel and the guest change it at will.
//!
//! A process that is forked while a ring is idle must not use or drop the inherited ring; its
//! mappings are not inherited (`MADV_DONTFORK`) and its descriptor should be closed.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::{GuestMemory, Permissions};

use crate::GuestRam;
use crate::virtio::blk::spans::Spans;

/// `UIO_MAXIOV`: the most pieces in one entry.
const MAX_PIECES: usize = 1024;

/// The most kernel threads for what a file system cannot do asynchronously (buffered writes on
/// most): those on one file take turns anyway.
const KERNEL_WORKERS: u32 = 4;

/// The registered file.
const FILE: types::Fixed = types::Fixed(0);

/// A ring for one file, not yet bound to a guest's memory.
#[derive(Debug)]
pub(in super::super::super) struct Ring(Uring);

struct Uring(IoUring);

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoUring({})", self.0.as_raw_fd())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel takes a closed ring apart later, by a worker of its own, and would hold the
        // file and its lock until then: whoever opens the volume next would find it in use.
        if let Err(error) = self.0.submitter().unregister_files() {
            tracing::debug!(%error, "io_uring lets go of a file later");
        }
    }
}

impl Ring {
    /// Opens a ring for `slots` entries at a time on `file`.
    pub(in super::super::super) fn open(file: &File, slots: usize) -> io::Result<Self> {
        let entries = u32::try_from(slots.next_power_of_two())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let ring = IoUring::builder().dontfork().build(entries)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        // Kernels before 5.15 do not know this limit and keep their own, also a small one.
        if let Err(error) = ring
            .submitter()
            .register_iowq_max_workers(&mut [KERNEL_WORKERS; 2])
        {
            tracing::debug!(%error, "io_uring keeps its own limit of kernel workers");
        }
        Ok(Self(Uring(ring)))
    }

    /// Binds the ring to the memory that its entries will name.
    pub(super) fn with_memory(self, memory: Arc<GuestRam>, slots: usize) -> RingWithMemory {
        RingWithMemory {
            ring: ManuallyDrop::new(self.0),
            memory: ManuallyDrop::new(memory),
            slots: ManuallyDrop::new((0..slots).map(|_| Slot::default()).collect()),
            pushed: VecDeque::new(),
            in_kernel: 0,
            failed: VecDeque::new(),
            dead: None,
        }
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file to the guest.
    Read,
    /// From the guest to the file.
    Write,
}

/// A piece of guest memory as the kernel takes it.
#[derive(Debug)]
#[repr(transparent)]
struct Piece(libc::iovec);

// SAFETY: the address in it is never dereferenced on our side; it names guest memory, which every
// thread of the process may name.
unsafe impl Send for Piece {}

/// What one operation has in the ring.
#[derive(Debug, Default)]
struct Slot {
    /// What is left to be moved.
    pieces: VecDeque<Piece>,
    /// Where in the file it goes on.
    offset: u64,
    /// `None` for a sync.
    direction: Option<Direction>,
    /// Whether the kernel may use `pieces`.
    in_kernel: bool,
}

/// A ring whose entries name a guest's memory.
#[derive(Debug)]
pub(super) struct RingWithMemory {
    ring: ManuallyDrop<Uring>,
    memory: ManuallyDrop<Arc<GuestRam>>,
    slots: ManuallyDrop<Vec<Slot>>,
    /// Slots whose entries are in the submission queue, in order; the kernel has not seen them.
    pushed: VecDeque<usize>,
    /// Entries that the kernel has and has not completed.
    in_kernel: usize,
    /// Slots that were never submitted, and why.
    failed: VecDeque<(usize, i32)>,
    /// The error with which submission failed for good.
    dead: Option<i32>,
}

impl RingWithMemory {
    /// Begins to move `data` at `offset`.
    pub(super) fn transfer(
        &mut self,
        slot: usize,
        direction: Direction,
        data: &Spans,
        offset: u64,
    ) -> io::Result<()> {
        let mut pieces = std::mem::take(&mut self.idle_slot(slot)?.pieces);
        pieces.clear();
        for span in data.iter() {
            let len = span.len as usize;
            let slices = GuestMemory::get_slices(
                &**self.memory,
                span.addr,
                len,
                match direction {
                    Direction::Read => Permissions::Write,
                    Direction::Write => Permissions::Read,
                },
            );
            for slice in slices.map_err(io::Error::other)? {
                let slice = slice.map_err(io::Error::other)?;
                pieces.push_back(Piece(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                }));
            }
        }
        pieces.make_contiguous();
        let place = self.idle_slot(slot)?;
        place.pieces = pieces;
        place.offset = offset;
        place.direction = Some(direction);
        self.push(slot);
        Ok(())
    }

    /// Begins a data sync of the file.
    pub(super) fn sync(&mut self, slot: usize) {
        if let Ok(place) = self.idle_slot(slot) {
            place.pieces.clear();
            place.direction = None;
            self.push(slot);
        }
    }

    /// The kernel moved `moved` bytes of the slot's entry. Returns whether the rest was begun.
    ///
    /// # Errors
    /// When the file ended before the request did.
    pub(super) fn advance(&mut self, slot: usize, mut moved: usize) -> io::Result<bool> {
        let place = self.idle_slot(slot)?;
        if place.direction.is_none() {
            return Ok(false);
        }
        if moved == 0 {
            return Err(match place.direction {
                Some(Direction::Write) => io::ErrorKind::WriteZero.into(),
                _ => io::ErrorKind::UnexpectedEof.into(),
            });
        }
        place.offset = place.offset.saturating_add(moved as u64);
        while let Some(Piece(first)) = place.pieces.front_mut() {
            if moved < first.iov_len {
                // Still inside the piece, whose first `moved` bytes are done.
                first.iov_base = first.iov_base.wrapping_byte_add(moved);
                first.iov_len -= moved;
                break;
            }
            moved -= first.iov_len;
            place.pieces.pop_front();
        }
        if place.pieces.is_empty() {
            return Ok(false);
        }
        self.push(slot);
        Ok(true)
    }

    /// The kernel did nothing with the slot's entry: begins it again.
    pub(super) fn advance_nothing(&mut self, slot: usize) -> io::Result<bool> {
        self.idle_slot(slot)?;
        self.push(slot);
        Ok(true)
    }

    /// The slot's operation has ended.
    pub(super) fn release(&mut self, slot: usize) {
        if let Ok(place) = self.idle_slot(slot) {
            place.pieces.clear();
        }
    }

    /// Hands to the kernel what was begun. Returns whether it wants to be called again soon.
    pub(super) fn submit(&mut self) -> bool {
        while !self.pushed.is_empty() && self.dead.is_none() {
            match self.ring.0.submit() {
                Ok(taken) => {
                    self.note_taken(taken);
                    if taken == 0 {
                        return true;
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Passing lack of memory or of room for completions.
                    Some(libc::EAGAIN | libc::EBUSY) => return true,
                    code => {
                        tracing::error!(%error, "io_uring does not take entries any more");
                        self.give_up(code.unwrap_or(libc::EIO));
                    }
                },
            }
        }
        false
    }

    /// The next completed slot and what the kernel said of it: bytes moved, or `-errno`.
    pub(super) fn next_result(&mut self) -> Option<(usize, i32)> {
        if let Some(failed) = self.failed.pop_front() {
            return Some(failed);
        }
        if self.in_kernel == 0 {
            return None;
        }
        let entry = self.ring.0.completion().next()?;
        self.in_kernel = self.in_kernel.saturating_sub(1);
        let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
        if let Some(place) = self.slots.get_mut(slot) {
            place.in_kernel = false;
        }
        Some((slot, entry.result()))
    }

    /// Readable when there are results.
    pub(super) fn wait_fd(&self) -> RawFd {
        self.ring.0.as_raw_fd()
    }

    fn idle_slot(&mut self, slot: usize) -> io::Result<&mut Slot> {
        self.slots
            .get_mut(slot)
            .filter(|place| !place.in_kernel)
            .ok_or_else(|| io::Error::other("an io_uring slot is in use"))
    }

    /// Makes the slot's entry and puts it into the submission queue.
    fn push(&mut self, slot: usize) {
        if let Some(code) = self.dead {
            self.failed.push_back((slot, -code));
            return;
        }
        let Some(entry) = self.entry(slot) else {
            self.failed.push_back((slot, -libc::EIO));
            return;
        };
        // SAFETY: by rule 1 the entry names the registered file, an array in its slot and guest
        // memory that was checked; by rules 2 and 3 both live until it is completed.
        while unsafe { self.ring.0.submission().push(&entry) }.is_err() {
            // The queue is as long as there are slots, so that this is for later changes only.
            self.submit();
            if let Some(code) = self.dead {
                self.failed.push_back((slot, -code));
                return;
            }
        }
        if let Some(place) = self.slots.get_mut(slot) {
            place.in_kernel = true;
        }
        self.pushed.push_back(slot);
    }

    fn entry(&mut self, slot: usize) -> Option<squeue::Entry> {
        let place = self.slots.get_mut(slot)?;
        let offset = place.offset;
        let pieces = place.pieces.make_contiguous();
        let count = u32::try_from(pieces.len().min(MAX_PIECES)).ok()?;
        // `Piece` is a transparent `iovec`.
        let array = pieces.as_ptr().cast::<libc::iovec>();
        let entry = match place.direction {
            Some(Direction::Read) => opcode::Readv::new(FILE, array, count)
                .offset(offset)
                .build(),
            Some(Direction::Write) => opcode::Writev::new(FILE, array, count)
                .offset(offset)
                .build(),
            None => opcode::Fsync::new(FILE)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        Some(entry.user_data(slot as u64))
    }

    fn note_taken(&mut self, taken: usize) {
        let taken = taken.min(self.pushed.len());
        self.pushed.drain(..taken);
        self.in_kernel += taken;
    }

    /// Never enters the ring to submit again; what the kernel has not seen fails with `code`.
    pub(super) fn give_up(&mut self, code: i32) {
        self.dead = Some(code);
        for slot in self.pushed.drain(..) {
            if let Some(place) = self.slots.get_mut(slot) {
                place.in_kernel = false;
            }
            self.failed.push_back((slot, -code));
        }
    }

    /// Waits until the kernel has completed all that it has. Returns whether it did.
    fn drain(&mut self) -> bool {
        while self.in_kernel > 0 {
            if self.next_result().is_some() {
                continue;
            }
            /// `IORING_ENTER_GETEVENTS`.
            const GET_EVENTS: u32 = 1;
            // SAFETY: submits nothing and passes no argument: it only waits for a completion.
            let waited = unsafe { self.ring.0.submitter().enter::<()>(0, 1, GET_EVENTS, None) };
            match waited {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for io_uring: leaking guest memory");
                    return false;
                }
            }
        }
        true
    }
}

impl Drop for RingWithMemory {
    fn drop(&mut self) {
        // What the kernel has not seen it never will.
        self.give_up(libc::ECANCELED);
        self.failed.clear();
        if self.drain() {
            // SAFETY: dropped once, here, and not used afterwards. Nothing is in the kernel any
            // more, which pays rules 2 and 3. The ring goes first.
            unsafe {
                ManuallyDrop::drop(&mut self.ring);
                ManuallyDrop::drop(&mut self.slots);
                ManuallyDrop::drop(&mut self.memory);
            }
        }
    }
}
