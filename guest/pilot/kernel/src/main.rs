//! The pilot: a small guest that does what it is told.
//!
//! Ring 0 holds only set-up and interrupt entry (`boot.s`); everything else runs in ring 3, with
//! all RAM and all device windows mapped to themselves and every I/O port open. The boot
//! processor runs one loop: look at the queues, answer requests, sleep.
//!
//! A snapshot may stop it between any two instructions; nothing here counts on time going on
//! evenly, nor on connections outliving the machine that they were made in.

#![no_std]
#![no_main]

mod acpi;
mod commands;
mod cpu;
mod devices;
mod fault;
mod info;
mod interrupts;
mod libc;
mod memory;
mod patience;
mod serial;
mod smp;
mod virtio;

use core::arch::global_asm;

use offshoot_protocol::{Id, Mode, READY, Refusal, Reply, Text, VERSION, pattern};

use crate::devices::Devices;
use crate::info::BootInfo;
use crate::memory::{Allocator, Dirty, Owned};
use crate::serial::{LineReader, say};
use crate::virtio::vsock::Vsock;

global_asm!(
    include_str!("boot.s"),
    pending = sym cpu::PENDING,
    woken = sym cpu::WOKEN,
    gate_idle = const cpu::GATE_IDLE,
    gate_enable = const cpu::GATE_ENABLE,
    gate_triple_fault = const cpu::GATE_TRIPLE_FAULT,
    gate_stop = const cpu::GATE_STOP,
    report = sym fault::report,
    gate_nap = const cpu::GATE_NAP,
    main = sym main,
    others = sym smp::OTHERS,
    max_others = const smp::MAX_OTHERS,
    other_ring0_stacks = sym smp::RING0_STACKS,
    other_stacks = sym smp::STACKS,
    other_main = sym smp::main,
    nap_vector = const smp::NAP_VECTOR,
);

/// Everything that the pilot is, after boot.
struct Pilot {
    counter: u64,
    boot_id: Id,
    /// Where the VM generation id lies.
    generation: Option<u64>,
    tsc_khz: u64,
    ram: u64,
    owned: Owned,
    dirty: Dirty,
    mode: Mode,
    interrupts: interrupts::Interrupts,
    serial_vector: Option<u8>,
    lines: LineReader,
    devices: Devices,
    /// Interrupts that meant work.
    wakes: u64,
    requests: u64,
    last_refusal: Option<Refusal>,
    /// Processors that run.
    vcpus: u32,
}

/// boot.s comes here, in ring 3 on the first processor, interrupts off.
extern "sysv64" fn main(protocol: u64, info: u64) -> ! {
    // SAFETY: these are the loader's values, and this is the first thing that runs.
    let info = unsafe { BootInfo::read(protocol, info) };
    let mut pilot = Pilot::new(&info);
    let [blk, net, vsock, rng] = pilot.devices.counts();
    // boot.s has printed the first letter.
    say!(
        "{} {VERSION} ready ram={} vcpus={} blk={blk} net={net} vsock={vsock} rng={rng}",
        &READY[1..],
        pilot.ram,
        pilot.vcpus,
    );
    pilot.run()
}

impl Pilot {
    fn new(info: &BootInfo) -> Self {
        let mut allocator = Allocator::new(info);
        let acpi = acpi::Acpi::read(info.rsdp);
        let mut interrupts = interrupts::Interrupts::start(&acpi.io_apics[..acpi.io_apic_count]);
        let serial_vector = interrupts.route(serial::GSI);
        serial::listen();
        let mut devices = Devices::default();
        devices.find(info, &acpi, &mut allocator, &mut interrupts);
        let generation = info.number("pilot.vmgenid").or(acpi.generation);
        let owned = Owned::new(info, &allocator, generation);
        let mut this = Self {
            counter: 0,
            boot_id: Id([0; 16]),
            generation,
            tsc_khz: info.number("pilot.tsc_khz").unwrap_or(0),
            ram: info.ram_bytes(),
            owned,
            dirty: Dirty::new(),
            mode: info
                .values("pilot.mode")
                .last()
                .and_then(Mode::parse)
                .unwrap_or_default(),
            interrupts,
            serial_vector,
            lines: LineReader::new(),
            devices,
            wakes: 0,
            requests: 0,
            last_refusal: None,
            vcpus: 1,
        };
        smp::set_mode(this.mode);
        if this.mode != Mode::Halt {
            this.devices.disarm();
        }
        this.vcpus = smp::start(
            info.number("pilot.vcpus")
                .map_or(acpi.processors, |n| n as u32),
        );
        this.boot_id = this.make_boot_id();
        this
    }

    /// A name for this run: from the entropy device where there is one, or else from the clock.
    fn make_boot_id(&mut self) -> Id {
        let mut id = [0; 16];
        let random = self
            .devices
            .rng
            .as_mut()
            .and_then(|rng| rng.read(id.len(), true, &mut self.interrupts).ok());
        match random {
            Some(bytes) => id.copy_from_slice(bytes.0.as_slice()),
            None => pattern::fill(&mut id, cpu::tsc(), 0),
        }
        Id(id)
    }

    fn run(&mut self) -> ! {
        // Turns until the serial port is looked at without having been asked to.
        const SERIAL_TURNS: u64 = 4096;
        loop {
            self.counter += 1;
            let serial = self.serial_vector.is_some_and(cpu::take_pending);
            let halting = self.mode == Mode::Halt && !self.dirty.running();
            if serial || (!halting && self.counter.is_multiple_of(SERIAL_TURNS)) {
                self.serve_serial();
            }
            let busy = self.serve_devices();
            self.dirty.step(&self.owned);
            match self.mode {
                Mode::Beacon => cpu::out8(0x80, self.counter as u8),
                _ if !halting => core::hint::spin_loop(),
                _ if busy || self.devices.arm() => {}
                _ => {
                    cpu::idle();
                    self.wakes += 1;
                }
            }
        }
    }

    /// Serves devices and the requests that came over vsock; whether there was anything.
    fn serve_devices(&mut self) -> bool {
        let mut any = self.devices.poll();
        while let Some((ticket, tag, request)) =
            self.devices.vsock.as_mut().and_then(Vsock::next_request)
        {
            any = true;
            let reply = self.execute(&request).unwrap_or_else(|refusal| {
                self.last_refusal = Some(refusal);
                Reply::Refused {
                    code: refusal.code,
                    detail: refusal.detail,
                }
            });
            if let Some(vsock) = &mut self.devices.vsock {
                vsock.reply(ticket, tag, &reply);
            }
        }
        any
    }
}
