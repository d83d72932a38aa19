//! Finding devices and holding on to them.

use offshoot_protocol::{Device, DeviceKind, List, MAX_DEVICES};

use crate::acpi::Acpi;
use crate::info::{BootInfo, device_word};
use crate::interrupts::Interrupts;
use crate::memory::Allocator;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::mmio::{self, Found, Transport};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

const MAX_BLK: usize = 8;
const MAX_NET: usize = 4;

/// Where Offshoot puts virtio-mmio windows: looked at when nothing else tells.
const WINDOWS: (u64, u64, u32, u32) = (0xd000_0000, 0x1000, 5, 19);

/// The devices, by kind in the order found.
#[derive(Default)]
pub(crate) struct Devices {
    pub(crate) blk: [Option<Blk>; MAX_BLK],
    pub(crate) net: [Option<Net>; MAX_NET],
    pub(crate) balloon: Option<Balloon>,
    pub(crate) rng: Option<Rng>,
    pub(crate) vsock: Option<Vsock>,
    list: List<Device, MAX_DEVICES>,
}

impl Devices {
    /// Finds devices by the command line, or else by ACPI, or else where Offshoot has them.
    pub(crate) fn find(
        &mut self,
        info: &BootInfo,
        acpi: &Acpi,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) {
        let ram = info.ram_bytes();
        let mut told = false;
        for (window, gsi) in info.values("virtio_mmio.device").filter_map(device_word) {
            told = true;
            self.add((window, gsi), ram, allocator, interrupts);
        }
        if !told {
            for (window, gsi) in &acpi.devices[..acpi.device_count] {
                told = true;
                self.add((*window, *gsi), ram, allocator, interrupts);
            }
        }
        if !told {
            let (first, step, gsi, count) = WINDOWS;
            for i in 0..count {
                self.add(
                    (first + step * u64::from(i), gsi + i),
                    ram,
                    allocator,
                    interrupts,
                );
            }
        }
    }

    fn add(
        &mut self,
        (window, gsi): (u64, u32),
        ram: u64,
        allocator: &mut Allocator,
        interrupts: &mut Interrupts,
    ) {
        let Some(found) = mmio::probe(window, gsi) else {
            return;
        };
        let (kind, set_up) = match found.id {
            1 => (
                DeviceKind::Net,
                place(
                    &mut self.net,
                    || Net::start(&found, allocator, interrupts),
                    |d| {
                        let [a, b, c, d2, e, f] = d.mac;
                        (&d.transport, u64::from_le_bytes([a, b, c, d2, e, f, 0, 0]))
                    },
                ),
            ),
            2 => (
                DeviceKind::Blk,
                place(
                    &mut self.blk,
                    || Blk::start(&found, allocator, interrupts),
                    |d| (&d.transport, d.capacity()),
                ),
            ),
            4 => (
                DeviceKind::Rng,
                place(
                    core::slice::from_mut(&mut self.rng),
                    || Rng::start(&found, allocator, interrupts),
                    |d| (&d.transport, 0),
                ),
            ),
            5 => (
                DeviceKind::Balloon,
                place(
                    core::slice::from_mut(&mut self.balloon),
                    || Balloon::start(&found, ram, allocator, interrupts),
                    |d| (&d.transport, 0),
                ),
            ),
            19 => (
                DeviceKind::Vsock,
                place(
                    core::slice::from_mut(&mut self.vsock),
                    || Vsock::start(&found, allocator, interrupts),
                    |d| (&d.transport, d.cid),
                ),
            ),
            _ => (DeviceKind::Other, None),
        };
        let (features, value) = set_up.unwrap_or((0, 0));
        self.note(&found, kind, features, value);
    }

    fn note(&mut self, found: &Found, kind: DeviceKind, features: u64, value: u64) {
        let gsi = u8::try_from(found.gsi).unwrap_or(u8::MAX);
        // More devices than a report holds are used all the same.
        let _ = self.list.push(Device {
            kind,
            window: found.window,
            gsi,
            features,
            value,
        });
    }

    /// What was found, with what the devices say now.
    pub(crate) fn report(&self) -> List<Device, MAX_DEVICES> {
        let mut list = List::default();
        for mut device in self.list.as_slice().iter().copied() {
            let disk = self
                .blk
                .iter()
                .flatten()
                .find(|d| d.transport.window() == device.window);
            if let Some(disk) = disk {
                device.value = disk.capacity();
            }
            if let (DeviceKind::Vsock, Some(vsock)) = (device.kind, &self.vsock) {
                device.value = vsock.cid;
            }
            let _ = list.push(device);
        }
        list
    }

    /// How many disks, cards, vsocks and entropy devices there are.
    pub(crate) fn counts(&self) -> [usize; 4] {
        [
            self.blk.iter().flatten().count(),
            self.net.iter().flatten().count(),
            usize::from(self.vsock.is_some()),
            usize::from(self.rng.is_some()),
        ]
    }

    /// Serves what needs no request; whether there was anything.
    pub(crate) fn poll(&mut self) -> bool {
        self.blk.iter_mut().flatten().for_each(Blk::poll);
        if let Some(rng) = &mut self.rng {
            rng.poll();
        }
        let cards = self.net.iter_mut().flatten();
        let any = cards.fold(false, |any, net| net.poll() | any);
        let any = self.balloon.as_mut().is_some_and(Balloon::poll) | any;
        self.vsock.as_mut().is_some_and(Vsock::poll) | any
    }

    /// Asks for interrupts; whether there is something to do already.
    pub(crate) fn arm(&mut self) -> bool {
        let cards = self.net.iter_mut().flatten();
        let any = cards.fold(false, |any, net| net.arm() | any);
        let any = self.balloon.as_mut().is_some_and(Balloon::arm) | any;
        self.vsock.as_mut().is_some_and(Vsock::arm) | any
    }

    /// Asks for none.
    pub(crate) fn disarm(&mut self) {
        self.net.iter_mut().flatten().for_each(Net::disarm);
        if let Some(vsock) = &mut self.vsock {
            vsock.disarm();
        }
        if let Some(balloon) = &mut self.balloon {
            balloon.disarm();
        }
    }
}

/// Sets a device up in the first free place; what it agreed on and its value.
fn place<T>(
    places: &mut [Option<T>],
    start: impl FnOnce() -> Option<T>,
    tell: impl FnOnce(&T) -> (&Transport, u64),
) -> Option<(u64, u64)> {
    let free = places.iter_mut().find(|place| place.is_none())?;
    let device = free.insert(start()?);
    let (transport, value) = tell(device);
    Some((transport.features, value))
}
