//! The devices at I/O ports: serial port, keyboard controller, power switch, panic port.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use offshoot_devices::legacy::{I8042, I8042State, Serial, SerialState, i8042, serial};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi;
use crate::bus::{Bus, BusDevice};
use crate::device_loop::eventfd;
use crate::error::{Error, ErrorKind, Result};
use crate::exits::{ExitReason, Exits};
use crate::kvm::{IrqLine, Vm};
use crate::sync::lock;

/// COM1 (the address that every PC guest looks at first).
const SERIAL_PORT: u16 = 0x3f8;

/// Where a serial port's output goes.
pub struct SerialOutput(pub Box<dyn Write + Send>);

impl fmt::Debug for SerialOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SerialOutput")
    }
}

impl SerialOutput {
    /// To nowhere.
    #[must_use]
    pub fn sink() -> Self {
        Self(Box::new(io::sink()))
    }
}

/// The state of the devices at I/O ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyState {
    /// The serial port, where there is one.
    pub serial: Option<SerialState>,
    /// The keyboard controller.
    pub i8042: I8042State,
}

/// The devices at I/O ports.
#[derive(Debug)]
pub(crate) struct Legacy {
    serial: Option<SerialPort>,
    i8042: Arc<Keyboard>,
}

#[derive(Debug)]
struct SerialPort {
    uart: Arc<Uart>,
    line: Arc<EventFd>,
}

#[derive(Debug)]
struct Uart(Mutex<Serial>);

impl BusDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match u16::try_from(offset) {
            Ok(offset) => lock(&self.0).read(offset, data),
            Err(_) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(offset) = u16::try_from(offset) {
            lock(&self.0).write(offset, data);
        }
    }
}

/// The controller; it is at two ports, and the ports between them belong to others.
#[derive(Debug)]
struct Keyboard {
    controller: Mutex<I8042>,
    reset: Arc<EventFd>,
    exits: Arc<Exits>,
}

/// One of the controller's ports.
#[derive(Debug)]
struct KeyboardPort {
    keyboard: Arc<Keyboard>,
    port: u16,
}

impl BusDevice for KeyboardPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        lock(&self.keyboard.controller).read(self.port, data);
    }

    fn write(&self, _: u64, data: &[u8]) {
        lock(&self.keyboard.controller).write(self.port, data);
        if self.keyboard.reset.read().is_ok() {
            self.keyboard.exits.post(ExitReason::Reset);
        }
    }
}

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

/// Where the guest's kernel tells that it has panicked.
#[derive(Debug)]
struct PanicPort {
    exits: Arc<Exits>,
}

impl BusDevice for PanicPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(acpi::PANICKED);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.first().is_some_and(|v| v & acpi::PANICKED != 0) {
            self.exits.post(ExitReason::Panicked);
        }
    }
}

impl Legacy {
    /// The devices as after power-on.
    pub(crate) fn new(serial: Option<SerialOutput>, exits: &Arc<Exits>) -> Result<Self> {
        let serial = serial.map(|out| {
            let line = Arc::new(eventfd("cannot make the serial port's interrupt")?);
            let uart = Serial::new(Arc::clone(&line), out.0);
            Ok::<_, Error>(SerialPort::new(uart, line))
        });
        let reset = Arc::new(eventfd("cannot make the reset line")?);
        Ok(Self {
            serial: serial.transpose()?,
            i8042: Keyboard::new(I8042::new(Arc::clone(&reset)), reset, exits),
        })
    }

    /// The devices from saved state, quiesced.
    pub(crate) fn restore(
        state: &LegacyState,
        out: SerialOutput,
        exits: &Arc<Exits>,
    ) -> Result<Self> {
        let serial = state.serial.as_ref().map(|state| {
            let line = Arc::new(eventfd("cannot make the serial port's interrupt")?);
            let uart = Serial::restore(state, Arc::clone(&line), out.0).map_err(bad)?;
            Ok::<_, Error>(SerialPort::new(uart, line))
        });
        let reset = Arc::new(eventfd("cannot make the reset line")?);
        let controller = I8042::restore(state.i8042, Arc::clone(&reset)).map_err(bad)?;
        Ok(Self {
            serial: serial.transpose()?,
            i8042: Keyboard::new(controller, reset, exits),
        })
    }

    /// Puts the devices onto their bus and lets KVM carry the interrupt.
    pub(crate) fn connect(&self, vm: &Vm, pio: &mut Bus, exits: &Arc<Exits>) -> Result<()> {
        if let Some(serial) = &self.serial {
            let uart = Arc::clone(&serial.uart) as _;
            pio.add(SERIAL_PORT.into(), serial::PORTS.into(), uart)?;
            vm.connect_irq(&IrqLine {
                event: &serial.line,
                gsi: acpi::SERIAL_GSI,
            })?;
        }
        for port in [i8042::DATA_PORT, i8042::COMMAND_PORT] {
            let keyboard = Arc::clone(&self.i8042);
            pio.add(port.into(), 1, Arc::new(KeyboardPort { keyboard, port }))?;
        }
        let panic = Arc::new(PanicPort {
            exits: Arc::clone(exits),
        });
        pio.add(acpi::PANIC_PORT.into(), 1, panic)?;
        let exits = Arc::clone(exits);
        let sleep = Arc::new(SleepRegisters { exits });
        pio.add(acpi::SLEEP_CONTROL_PORT.into(), SleepRegisters::LEN, sleep)
    }

    /// Holds interrupts and output back.
    pub(crate) fn quiesce(&self) {
        if let Some(serial) = &self.serial {
            lock(&serial.uart.0).quiesce();
        }
    }

    /// Ends a quiesce.
    pub(crate) fn resume(&self) -> Result<()> {
        match &self.serial {
            Some(serial) => lock(&serial.uart.0)
                .resume()
                .map_err(|e| Error::because(ErrorKind::Device, "the serial port cannot go on", e)),
            None => Ok(()),
        }
    }

    /// The state of the quiesced devices.
    pub(crate) fn save(&self) -> LegacyState {
        LegacyState {
            serial: self.serial.as_ref().map(|s| lock(&s.uart.0).save()),
            i8042: lock(&self.i8042.controller).save(),
        }
    }

    /// Sends bytes to the guest's serial port; returns how many it has taken.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        match &self.serial {
            Some(serial) => lock(&serial.uart.0).enqueue(bytes),
            None => 0,
        }
    }
}

impl SerialPort {
    fn new(uart: Serial, line: Arc<EventFd>) -> Self {
        Self {
            uart: Arc::new(Uart(Mutex::new(uart))),
            line,
        }
    }
}

impl Keyboard {
    fn new(controller: I8042, reset: Arc<EventFd>, exits: &Arc<Exits>) -> Arc<Self> {
        Arc::new(Self {
            controller: Mutex::new(controller),
            reset,
            exits: Arc::clone(exits),
        })
    }
}

fn bad(error: offshoot_devices::Error) -> Error {
    Error::because(
        ErrorKind::BadState,
        "a saved device at an I/O port cannot be",
        error,
    )
}
