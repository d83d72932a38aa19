//! From a configuration or a captured state to a machine.
//!
//! # Restoring, in order
//! | step | why here |
//! |---|---|
//! | state and bindings are checked | before anything is made |
//! | the generation id is written | before the guest's first instruction |
//! | VM, memory slots, irqchip | see `kvm/vm.rs` |
//! | vCPUs and their state | see `arch/x86_64/vcpu_state.rs`; before the I/O APIC, which looks for LAPICs |
//! | chips, clock | the clock as late as can be: it runs from here on |
//! | devices, then their transports | quiesced; queues are checked against the memory |
//! | irqfds, ioeventfds | need the irqchip; nothing after them changes a memory slot |
//! | threads | parked, they cost nothing |
//! | the generation's interrupt | raised when the irqchip is restored, so that it is not overwritten |

use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use offshoot_devices::vmgenid::{GenerationId, VmGenId};

use crate::acpi;
use crate::arch::{cpuid, msr, regs};
use crate::bindings::Bindings;
use crate::boot::{self, layout};
use crate::bus::Bus;
use crate::config::{MachineConfig, platform_info, windows};
use crate::device_loop::{DeviceLoop, eventfd};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::exits::{Exits, FirstExit};
use crate::kvm::{Host, IrqLine, Vm};
use crate::legacy::{Legacy, SerialOutput};
use crate::machine::{Core, Generation, Machine};
use crate::memory::Memory;
use crate::models::Model;
use crate::slots::Slot;
use crate::state::{MachineState, PlatformState};
use crate::vcpu::{Board, Vcpu};

impl Machine {
    /// Makes a machine that is about to execute its kernel's first instruction.
    ///
    /// # Errors
    /// When the configuration is impossible, its kernel cannot be booted, the bindings do not
    /// fit, or KVM or the host refuses. Nothing is left behind.
    pub fn boot(host: &Arc<Host>, config: &MachineConfig, mut bindings: Bindings) -> Result<Self> {
        config.check(host)?;
        let demands = config.devices.iter();
        bindings.check(demands.map(|d| (d.id.as_str(), d.model.demand())))?;

        let memory = Arc::new(Memory::anonymous(config.ram)?);
        let info = platform_info(config.vcpus, config.devices.len(), config.serial);
        let entry = boot::load(memory.ram(), &config.boot, &info)
            .map_err(|e| Error::because(ErrorKind::Boot, "cannot boot the kernel", e))?;
        let generation = VmGenId::new(memory.ram(), layout::VMGENID_PAGE)
            .map_err(|e| Error::because(ErrorKind::Config, "the guest's RAM is too small", e))?;
        write_generation(&memory, &generation, &bindings)?;

        let vm = Vm::new(host, memory)?;
        let entries = config.cpu.apply(host.supported_cpuid().as_slice());
        let mut vcpus = Vec::new();
        let mut cpuids = Vec::new();
        let mut msr_indices = Vec::new();
        for id in 0..config.vcpus {
            let vcpu = vm.create_vcpu(id)?;
            let own = cpuid::for_vcpu(&entries, id, config.vcpus);
            let own = CpuId::from_entries(&own)
                .map_err(|_| Error::new(ErrorKind::Config, "there are too many CPUID entries"))?;
            vcpu.set_cpuid2(&own)
                .context("KVM refuses the guest's CPUID")?;
            if id == 0 {
                msr_indices = msr::restorable(&vcpu, host.msr_indices())?;
            }
            msr::set_for_boot(&vcpu)?;
            regs::set_local_interrupts(&vcpu)?;
            if id == 0 {
                regs::enter(&vcpu, vm.memory().ram(), entry)?;
            } else {
                regs::wait_for_sipi(&vcpu)?;
            }
            vcpus.push(vcpu);
            cpuids.push(own);
        }
        let mut slots = Vec::new();
        for (place, device) in windows(config.devices.len()).zip(&config.devices) {
            let model = Model::new(&device.id, &device.model, &mut bindings, vm.memory())?;
            slots.push(Slot::new(&device.id, place, model, vm.memory())?);
        }
        let exits = Exits::new()?;
        let out = bindings.serial.take().unwrap_or_else(SerialOutput::sink);
        let legacy = Legacy::new(config.serial.then_some(out), &exits)?;
        legacy.quiesce();
        // A machine begins paused: every stage after this is the same as after a build.
        slots.iter().try_for_each(Slot::quiesce)?;
        let platform = PlatformState {
            vcpus: config.vcpus,
            ram: config.ram.bytes(),
            cpu_baseline: config.cpu.baseline.to_string(),
            serial: config.serial,
            devices: config.devices.iter().map(|d| d.id.clone()).collect(),
        };
        assemble(Parts {
            host: Arc::clone(host),
            platform,
            vm,
            vcpus,
            cpuids,
            msr_indices,
            slots,
            legacy,
            generation,
            exits,
            bindings,
            is_copy: false,
        })
    }

    /// Makes a machine that continues where `state` was captured, over `memory`, which holds what
    /// the captured machine's memory held.
    ///
    /// # Errors
    /// When no machine can be in this state, this host cannot run it, the bindings do not fit, or
    /// KVM or the host refuses. Nothing is left behind.
    pub fn build(
        host: &Arc<Host>,
        state: &MachineState,
        memory: Memory,
        bindings: Bindings,
    ) -> Result<Self> {
        state.check(host)?;
        Self::build_checked(host, state, memory, bindings)
    }

    /// As [`build`](Self::build), for a state that was checked before.
    pub(crate) fn build_checked(
        host: &Arc<Host>,
        state: &MachineState,
        memory: Memory,
        mut bindings: Bindings,
    ) -> Result<Self> {
        if state.ram()? != memory.size() {
            return Err(Error::new(
                ErrorKind::BadState,
                "the memory is not of the size that the machine has",
            ));
        }
        let devices = || state.platform.devices.iter().zip(&state.devices);
        bindings.check(devices().map(|(id, d)| (id.as_str(), d.model.demand())))?;
        let memory = Arc::new(memory);
        let generation = VmGenId::restore(&state.generation, memory.ram())
            .map_err(|e| Error::because(ErrorKind::BadState, "the saved machine cannot be", e))?;
        write_generation(&memory, &generation, &bindings)?;
        let vm = Vm::new(host, memory)?;
        let mut vcpus = Vec::new();
        let mut cpuids = Vec::new();
        for (id, saved) in (0..).zip(&state.vcpus) {
            let vcpu = vm.create_vcpu(id)?;
            saved.restore(host, &vcpu)?;
            cpuids.push(saved.cpuid()?);
            vcpus.push(vcpu);
        }
        state.chips.restore(vm.fd())?;
        let mut slots = Vec::new();
        for (place, (id, device)) in windows(state.devices.len()).zip(devices()) {
            let model = Model::restore(id, &device.model, &mut bindings, vm.memory())?;
            slots.push(Slot::restore(id, place, model, device, vm.memory())?);
        }
        let exits = Exits::new()?;
        let out = bindings.serial.take().unwrap_or_else(SerialOutput::sink);
        let legacy = Legacy::restore(&state.legacy, out, &exits)?;
        assemble(Parts {
            host: Arc::clone(host),
            platform: state.platform.clone(),
            vm,
            vcpus,
            cpuids,
            msr_indices: state
                .vcpus
                .first()
                .map_or_else(Vec::new, |v| v.msr_indices()),
            slots,
            legacy,
            generation,
            exits,
            bindings,
            is_copy: true,
        })
    }
}

fn write_generation(memory: &Memory, id: &VmGenId, bindings: &Bindings) -> Result<()> {
    let generation = match bindings.generation {
        Some(generation) => generation,
        None => GenerationId::random().map_err(|e| {
            Error::because(ErrorKind::System, "the host has no random bytes to give", e)
        })?,
    };
    id.write(memory.ram(), &generation)
        .map_err(|e| Error::because(ErrorKind::Config, "the guest's RAM is too small", e))
}

struct Parts {
    host: Arc<Host>,
    platform: PlatformState,
    vm: Vm,
    vcpus: Vec<VcpuFd>,
    cpuids: Vec<CpuId>,
    msr_indices: Vec<u32>,
    slots: Vec<Slot>,
    legacy: Legacy,
    generation: VmGenId,
    exits: Arc<Exits>,
    bindings: Bindings,
    is_copy: bool,
}

/// Connects what was made and starts the threads, parked.
fn assemble(parts: Parts) -> Result<Machine> {
    let exits = parts.exits;
    let first_exit = Arc::new(FirstExit::new());
    let mut mmio = Bus::default();
    let mut pio = Bus::default();
    parts.legacy.connect(&parts.vm, &mut pio, &exits)?;
    for slot in &parts.slots {
        slot.connect(&parts.vm, &mut mmio)?;
    }
    let changed = eventfd("cannot make the generation id's interrupt")?;
    parts.vm.connect_irq(&IrqLine {
        event: &changed,
        gsi: acpi::VMGENID_GSI,
    })?;
    let power_button = eventfd("cannot make the power button's interrupt")?;
    parts.vm.connect_irq(&IrqLine {
        event: &power_button,
        gsi: acpi::POWER_BUTTON_GSI,
    })?;
    let board = Arc::new(Board {
        pio,
        mmio,
        exits: Arc::clone(&exits),
        first_exit: Arc::clone(&first_exit),
    });
    let subscribers = parts.slots.iter().map(Slot::subscriber).collect();
    let device_loop = DeviceLoop::new(subscribers, Arc::clone(&exits))?;
    let mut vcpus = Vec::new();
    for (id, vcpu) in (0..).zip(parts.vcpus) {
        vcpus.push(Vcpu::new(id, vcpu, Arc::clone(&board))?);
    }
    if parts.is_copy {
        changed
            .write(1)
            .context("cannot raise the generation id's interrupt")?;
    }
    Ok(Machine {
        core: Box::new(Core {
            host: parts.host,
            platform: parts.platform,
            cpuids: parts.cpuids,
            msr_indices: parts.msr_indices,
            vcpus,
            device_loop,
            slots: parts.slots,
            bindings: parts.bindings,
            legacy: parts.legacy,
            generation: Generation {
                id: parts.generation,
                _changed: changed,
            },
            power_button,
            vm: Arc::new(parts.vm),
            exits,
            first_exit,
            broken: false,
            last: None,
        }),
    })
}
