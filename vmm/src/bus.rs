//! Where the guest's port and memory-mapped I/O goes.

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// A device that the guest reaches by port or memory-mapped I/O. vCPU threads call it, several
/// at once.
pub trait BusDevice: Debug + Send + Sync {
    /// Reads at `offset` from the start of the device's range, at most 8 bytes. What is not a
    /// register reads as the device likes.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at `offset` from the start of the device's range, at most 8 bytes.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One address space of devices: fixed when the machine is made, so that a look-up takes no lock.
#[derive(Debug, Default)]
pub(crate) struct Bus {
    /// Sorted by base; ranges do not overlap.
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// Adds a device at `base..base + len`.
    pub(crate) fn add(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<()> {
        let at = self.ranges.partition_point(|range| range.base < base);
        let after_previous = at == 0 || {
            let previous = &self.ranges[at - 1];
            previous.base + previous.len <= base
        };
        let end = base.checked_add(len);
        let before_next = self
            .ranges
            .get(at)
            .is_none_or(|next| end.is_some_and(|end| end <= next.base));
        if len == 0 || end.is_none() || !after_previous || !before_next {
            return Err(Error::new(
                ErrorKind::Config,
                format!("two devices at guest address {base:#x}"),
            ));
        }
        self.ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    /// Reads; where there is no device, all bits are set.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is no device, nothing happens.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device that has all of the access in its range.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.base <= address);
        let range = &self.ranges[at.checked_sub(1)?];
        let offset = address - range.base;
        let end = offset.checked_add(len as u64)?;
        (end <= range.len).then_some((&*range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Echo;

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn accesses_reach_the_device_that_holds_all_of_them() {
        let mut bus = Bus::default();
        bus.add(0x100, 8, Arc::new(Echo)).unwrap();
        bus.add(0x108, 8, Arc::new(Echo)).unwrap();
        bus.add(0x10, 1, Arc::new(Echo)).unwrap();
        for (base, len) in [(0xff, 2), (0x104, 1), (0x10f, 4), (0x200, 0), (u64::MAX, 2)] {
            assert!(bus.add(base, len, Arc::new(Echo)).is_err(), "{base:#x}");
        }
        let read = |address, len| {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x103, 2), [3, 3]);
        assert_eq!(read(0x10a, 1), [2]);
        assert_eq!(read(0x106, 4), [0xff; 4], "across two devices");
        assert_eq!(read(0x11, 1), [0xff]);
        assert_eq!(read(0, 1), [0xff]);
        assert_eq!(read(u64::MAX, 8), [0xff; 8]);
    }
}
