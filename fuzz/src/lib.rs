//! What the device targets share: a driver that does anything at all.

use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use offshoot_devices::virtio::VirtioDevice;
use offshoot_devices::virtio::testing::{Driver, TestRam};
use vm_memory::{Bytes, GuestAddress};

/// Guest RAM: rings, buffers and room for addresses that miss.
pub const RAM: usize = 1 << 20;
/// Buffers of [`Op::Chain`] lie here, behind the rings.
const SCRATCH: u64 = 0x8_0000;
/// More steps than this teach nothing new and only make a run slow.
const MAX_OPS: usize = 128;

/// What a driver does to a device.
#[derive(Debug, Arbitrary)]
pub struct Script {
    /// Features that it accepts, where they are offered.
    features: u64,
    /// What it does once the device is up.
    ops: Vec<Op>,
}

/// One step.
#[derive(Debug, Arbitrary)]
enum Op {
    /// Writes a register or the configuration space, of any width.
    WriteRegister { offset: u16, width: u8, value: u64 },
    /// Reads one.
    ReadRegister { offset: u16, width: u8 },
    /// Writes guest memory anywhere: the rings among it.
    Poke { at: u32, bytes: [u8; 8] },
    /// Makes a chain available whose first bytes are `head`.
    Chain {
        queue: u8,
        head: [u8; 48],
        descriptors: Vec<Descriptor>,
    },
    /// Sets the available index to anything.
    AvailIndex { queue: u8, index: u16 },
    /// Notifies a queue and lets the device run.
    Kick { queue: u8 },
    /// Stops the device for a capture and lets it go on.
    Pause,
}

/// One descriptor of a chain: mostly sane, so that requests get past the first check.
#[derive(Debug, Arbitrary)]
struct Descriptor {
    /// Where in the scratch area, or anywhere in the address space.
    at: u16,
    anywhere: Option<u64>,
    len: u16,
    huge: bool,
    flags: u8,
}

/// Brings `device` up as a driver does and then plays the script against it.
pub fn drive(device: Arc<Mutex<dyn VirtioDevice>>, script: &Script) {
    let ram = TestRam::new(RAM);
    let mut driver = Driver::start(&ram, device, script.features);
    for op in script.ops.iter().take(MAX_OPS) {
        step(&ram, &mut driver, op);
    }
    // Whatever happened, the device can be stopped and reset.
    let _stopped = driver.transport.quiesce();
    driver.transport.write(0x70, &0_u32.to_le_bytes());
}

fn step(ram: &TestRam, driver: &mut Driver, op: &Op) {
    match op {
        Op::WriteRegister {
            offset,
            width,
            value,
        } => {
            let bytes = value.to_le_bytes();
            driver
                .transport
                .write(u64::from(*offset % 0x1100), &bytes[..width_of(*width)]);
        }
        Op::ReadRegister { offset, width } => {
            let mut bytes = [0; 8];
            driver
                .transport
                .read(u64::from(*offset % 0x1100), &mut bytes[..width_of(*width)]);
        }
        Op::Poke { at, bytes } => {
            let _outside = ram
                .memory()
                .write_slice(bytes, GuestAddress(u64::from(*at % RAM as u32)));
        }
        Op::Chain {
            queue,
            head,
            descriptors,
        } => chain(ram, driver, *queue, head, descriptors),
        Op::AvailIndex { queue, index } => {
            let count = driver.queues.len();
            if let Some(queue) = driver.queues.get_mut(usize::from(*queue) % count.max(1)) {
                queue.set_avail_index(*index);
            }
        }
        Op::Kick { queue } => {
            let count = driver.queues.len().max(1);
            driver.kick((usize::from(*queue) % count) as u32);
        }
        Op::Pause => {
            if driver.transport.quiesce().is_ok() {
                let _saved = driver.transport.save();
                let _resumed = driver.transport.resume();
            }
        }
    }
}

fn chain(ram: &TestRam, driver: &mut Driver, queue: u8, head: &[u8], descriptors: &[Descriptor]) {
    let count = driver.queues.len();
    let Some(queue) = driver.queues.get_mut(usize::from(queue) % count.max(1)) else {
        return;
    };
    ram.memory()
        .write_slice(head, GuestAddress(SCRATCH))
        .expect("scratch memory");
    let last = descriptors.len().min(usize::from(queue.size())).min(16);
    for (index, descriptor) in descriptors.iter().take(last).enumerate() {
        // The first descriptor is where `head` was written.
        let offset = if index == 0 {
            0
        } else {
            u64::from(descriptor.at)
        };
        let addr = descriptor.anywhere.unwrap_or(SCRATCH + offset);
        let len = u32::from(descriptor.len) << if descriptor.huge { 16 } else { 0 };
        let more = u16::from(index + 1 < last);
        // Bit 0 chains on unless the script says otherwise; bits 1 and 2 are WRITE and INDIRECT.
        let flags = u16::from(descriptor.flags & 0b110) | more;
        queue.set_descriptor(
            index as u16,
            GuestAddress(addr),
            len,
            flags,
            index as u16 + 1,
        );
    }
    if last > 0 {
        queue.publish(0);
    }
}

fn width_of(width: u8) -> usize {
    [1, 2, 4, 8, 4, 4, 3, 0][usize::from(width % 8)]
}
