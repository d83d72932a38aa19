//! A virtio device in its place: register window, interrupt line, notifications.

use std::sync::{Arc, Mutex};

use offshoot_devices::virtio::MmioTransport;
use offshoot_devices::virtio::mmio::{QUEUE_NOTIFY_OFFSET, WINDOW_SIZE};

use crate::boot::MmioWindow;
use crate::bus::{Bus, BusDevice};
use crate::device_loop::{Subscriber, eventfd};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::{IrqLine, Vm};
use crate::memory::Memory;
use crate::models::Model;
use crate::state::DeviceState;
use crate::sync::lock;

/// A virtio device with its transport.
#[derive(Debug)]
pub(crate) struct Slot {
    id: String,
    place: MmioWindow,
    model: Model,
    transport: Arc<Registers>,
}

/// The transport as vCPUs reach it.
#[derive(Debug)]
struct Registers(Mutex<MmioTransport>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }
}

impl Slot {
    /// A new device.
    pub(crate) fn new(id: &str, place: MmioWindow, model: Model, memory: &Memory) -> Result<Self> {
        let line = Arc::new(eventfd("cannot make a device's interrupt")?);
        let ram = Arc::clone(memory.ram());
        let transport = MmioTransport::new(model.device(), ram, line).map_err(failed(id))?;
        Ok(Self::with(id, place, model, transport))
    }

    /// A device from saved state, quiesced.
    pub(crate) fn restore(
        id: &str,
        place: MmioWindow,
        model: Model,
        state: &DeviceState,
        memory: &Memory,
    ) -> Result<Self> {
        let line = Arc::new(eventfd("cannot make a device's interrupt")?);
        let ram = Arc::clone(memory.ram());
        let transport = MmioTransport::restore(&state.transport, model.device(), ram, line)
            .map_err(failed(id))?;
        Ok(Self::with(id, place, model, transport))
    }

    fn with(id: &str, place: MmioWindow, model: Model, transport: MmioTransport) -> Self {
        Self {
            id: id.into(),
            place,
            model,
            transport: Arc::new(Registers(Mutex::new(transport))),
        }
    }

    pub(crate) fn subscriber(&self) -> Subscriber {
        self.model.subscriber()
    }

    /// Puts the registers onto the bus, and lets KVM carry notifications and interrupts.
    pub(crate) fn connect(&self, vm: &Vm, mmio: &mut Bus) -> Result<()> {
        let base = u64::from(self.place.base);
        mmio.add(base, WINDOW_SIZE, Arc::clone(&self.transport) as _)?;
        let transport = lock(&self.transport.0);
        vm.connect_irq(&IrqLine {
            event: transport.interrupt_line(),
            gsi: self.place.gsi,
        })?;
        for (queue, event) in (0..).zip(transport.queue_events()) {
            vm.connect_notify(event, base + QUEUE_NOTIFY_OFFSET, queue)?;
        }
        Ok(())
    }

    /// Stops the device; its requests in flight are done. The vCPUs are out.
    pub(crate) fn quiesce(&self) -> Result<()> {
        lock(&self.transport.0).quiesce().map_err(failed(&self.id))
    }

    /// Ends a quiesce.
    pub(crate) fn resume(&self) -> Result<()> {
        lock(&self.transport.0).resume().map_err(failed(&self.id))
    }

    /// The state of a quiesced device.
    pub(crate) fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState {
            transport: lock(&self.transport.0).save().map_err(failed(&self.id))?,
            model: self.model.save(),
        })
    }
}

fn failed(id: &str) -> impl Fn(offshoot_devices::Error) -> Error + '_ {
    move |error| {
        let kind = match error.kind() {
            offshoot_devices::ErrorKind::InvalidState => ErrorKind::BadState,
            offshoot_devices::ErrorKind::InvalidConfig => ErrorKind::Config,
            _ => ErrorKind::Device,
        };
        Error::because(kind, format!("device {id} failed"), error)
    }
}
