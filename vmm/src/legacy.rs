//! The devices at I/O ports.

use std::sync::Arc;

use crate::acpi;
use crate::bus::{Bus, BusDevice};
use crate::error::Result;
use crate::exits::{ExitReason, Exits};

/// ACPI's sleep control and status registers (ACPI 6.5, 4.8.3.7): the guest's power switch.
#[derive(Debug)]
struct SleepRegisters {
    exits: Arc<Exits>,
}

impl SleepRegisters {
    const CONTROL: u64 = 0;
    const LEN: u64 = (acpi::SLEEP_STATUS_PORT - acpi::SLEEP_CONTROL_PORT + 1) as u64;
}

impl BusDevice for SleepRegisters {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == Self::CONTROL && data.first().is_some_and(|value| acpi::is_power_off(*value)) {
            self.exits.post(ExitReason::PowerOff);
        }
    }
}

/// Puts the devices at I/O ports onto their bus.
pub(crate) fn connect(pio: &mut Bus, exits: &Arc<Exits>) -> Result<()> {
    pio.add(
        u64::from(acpi::SLEEP_CONTROL_PORT),
        SleepRegisters::LEN,
        Arc::new(SleepRegisters {
            exits: Arc::clone(exits),
        }),
    )
}
