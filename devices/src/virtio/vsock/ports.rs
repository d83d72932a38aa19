//! Host ports for connections that the host opens.

use std::io;

/// Ports are taken from here on, one after the other, out of the way of well-known ones.
const FIRST: u32 = 0x4000_0000;
const COUNT: u32 = 0x4000_0000;

/// After a restore the ports of this many earlier connections are skipped: the guest may still
/// know them.
const RECENT: u32 = 1 << 20;

#[derive(Debug)]
pub(super) struct HostPorts {
    last: u32,
}

impl HostPorts {
    /// Starts at a random port, and well past `last` (the one that a saved device used last, 0
    /// for none).
    pub(super) fn start_after(last: u32) -> io::Result<Self> {
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let random = u32::from_ne_bytes(random);
        let jump = RECENT.wrapping_add(random % (COUNT / 2));
        let offset = last.wrapping_sub(FIRST).wrapping_add(jump) % COUNT;
        Ok(Self {
            last: FIRST.wrapping_add(offset),
        })
    }

    pub(super) fn last(&self) -> u32 {
        self.last
    }

    /// The next port for which `in_use` says no. Gives up after `tries`, which only happens when
    /// more ports are in use than that.
    pub(super) fn next(&mut self, tries: usize, in_use: impl Fn(u32) -> bool) -> Option<u32> {
        for _ in 0..tries {
            let offset = self.last.wrapping_sub(FIRST).wrapping_add(1) % COUNT;
            self.last = FIRST.wrapping_add(offset);
            if !in_use(self.last) {
                return Some(self.last);
            }
        }
        None
    }
}
