//! vCPUs on KVM without anything around them but buses.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use offshoot_snapshot_format::Payload;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::cpuid::for_vcpu;
use crate::arch::{VcpuState, VmState, msr, regs};
use crate::bus::{Bus, BusDevice};
use crate::exits::{ExitReason, Exits, FirstExit};
use crate::kvm::{Host, IrqLine, Vm};
use crate::memory::{Memory, RamSize};
use crate::tests::guest::host;
use crate::vcpu::{Board, Vcpu};

/// Records what the guest writes, and tells `end` from the rest.
#[derive(Debug, Default)]
struct Recorder {
    bytes: Mutex<Vec<u8>>,
}

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0x40 + u8::try_from(offset).unwrap());
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.bytes.lock().unwrap().extend_from_slice(data);
    }
}

impl Recorder {
    fn wait_for(&self, count: usize) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let bytes = self.bytes.lock().unwrap().clone();
            if bytes.len() >= count {
                return bytes;
            }
            assert!(Instant::now() < deadline, "the guest wrote only {bytes:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    fn len(&self) -> usize {
        self.bytes.lock().unwrap().len()
    }
}

struct Bare {
    vm: Vm,
    vcpus: Vec<Vcpu>,
    msrs: Vec<u32>,
    recorder: Arc<Recorder>,
    exits: Arc<Exits>,
    first_exit: Arc<FirstExit>,
}

fn cpuid(host: &Host, id: u8) -> CpuId {
    CpuId::from_entries(&for_vcpu(host.supported_cpuid().as_slice(), id, 1)).unwrap()
}

const CODE: u64 = 0x10_0000;
const PORT: u64 = 0x80;

fn board(recorder: &Arc<Recorder>, exits: &Arc<Exits>, first_exit: &Arc<FirstExit>) -> Arc<Board> {
    let mut pio = Bus::default();
    pio.add(PORT, 4, recorder.clone()).unwrap();
    let mut mmio = Bus::default();
    mmio.add(0xd000_0000, 0x1000, recorder.clone()).unwrap();
    Arc::new(Board {
        pio,
        mmio,
        exits: exits.clone(),
        first_exit: first_exit.clone(),
    })
}

impl Bare {
    /// A machine whose first vCPU enters `code` by PVH.
    fn boot(host: &Host, code: &[u8], vcpus: u8) -> Self {
        let memory = Arc::new(Memory::anonymous(RamSize::from_mib(4).unwrap()).unwrap());
        memory.ram().write_slice(code, GuestAddress(CODE)).unwrap();
        let vm = Vm::new(host, memory).unwrap();
        let recorder = Arc::new(Recorder::default());
        let exits = Exits::new().unwrap();
        let first_exit = Arc::new(FirstExit::new());
        let board = board(&recorder, &exits, &first_exit);
        let mut msrs = Vec::new();
        let vcpus = (0..vcpus)
            .map(|id| {
                let fd = vm.create_vcpu(id).unwrap();
                fd.set_cpuid2(&cpuid(host, id)).unwrap();
                msrs = msr::restorable(&fd, host.msr_indices()).unwrap();
                msr::set_for_boot(&fd).unwrap();
                regs::set_local_interrupts(&fd).unwrap();
                if id == 0 {
                    regs::enter_pvh(&fd, GuestAddress(CODE), GuestAddress(0x6000)).unwrap();
                } else {
                    regs::wait_for_sipi(&fd).unwrap();
                }
                Vcpu::new(id, fd, board.clone()).unwrap()
            })
            .collect();
        Self {
            vm,
            vcpus,
            msrs,
            recorder,
            exits,
            first_exit,
        }
    }

    fn resume(&self) {
        self.first_exit.arm();
        self.vcpus.iter().for_each(Vcpu::resume);
    }

    fn pause(&self) {
        self.vcpus.iter().for_each(Vcpu::ask_to_park);
        for vcpu in &self.vcpus {
            vcpu.wait_parked().unwrap();
        }
    }

    fn save(&self, host: &Host) -> (Vec<VcpuState>, VmState) {
        let vcpus = (0..).zip(&self.vcpus).map(|(id, vcpu)| {
            let cpuid = cpuid(host, id);
            vcpu.with(|fd| VcpuState::save(host, fd, &cpuid, &self.msrs).unwrap())
        });
        (vcpus.collect(), VmState::save(self.vm.fd()).unwrap())
    }

    /// A copy over a copy of the memory.
    fn copy(&self, host: &Host, state: &(Vec<VcpuState>, VmState)) -> Self {
        let size = self.vm.memory().size();
        let memory = Arc::new(Memory::anonymous(size).unwrap());
        let mut bytes = vec![0; usize::try_from(size.bytes()).unwrap()];
        let ram = self.vm.memory().ram();
        ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        memory.ram().write_slice(&bytes, GuestAddress(0)).unwrap();
        let vm = Vm::new(host, memory).unwrap();
        let recorder = Arc::new(Recorder::default());
        let exits = Exits::new().unwrap();
        let first_exit = Arc::new(FirstExit::new());
        let board = board(&recorder, &exits, &first_exit);
        let fds: Vec<_> = (0..)
            .zip(&state.0)
            .map(|(id, saved)| {
                let fd = vm.create_vcpu(id).unwrap();
                assert_eq!(saved.check(host).unwrap(), Vec::<String>::new());
                saved.restore(host, &fd).unwrap();
                (id, fd)
            })
            .collect();
        state.1.restore(vm.fd()).unwrap();
        let vcpus = fds
            .into_iter()
            .map(|(id, fd)| Vcpu::new(id, fd, board.clone()).unwrap())
            .collect();
        Self {
            vm,
            vcpus,
            msrs: state.0[0].msr_indices(),
            recorder,
            exits,
            first_exit,
        }
    }
}

/// `inc eax; out 0x80, al; jmp` for ever.
const COUNTER: &[u8] = &[
    0x40, // inc eax
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xfb, // jmp -5
];

#[test]
fn a_counter_counts_stops_and_goes_on() {
    let Some(host) = host() else { return };
    let machine = Bare::boot(&host, COUNTER, 1);
    assert_eq!(machine.first_exit.at(), None);
    machine.resume();
    machine.recorder.wait_for(100);
    machine.pause();
    assert!(machine.first_exit.at().is_some());
    let stopped = machine.recorder.len();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.recorder.len(), stopped);
    machine.resume();
    machine.recorder.wait_for(stopped + 100);
    machine.pause();
    let bytes = machine.recorder.wait_for(0);
    for (index, byte) in bytes.iter().enumerate() {
        assert_eq!(usize::from(*byte), (index + 1) % 256, "at {index}");
    }
}

#[test]
fn a_pause_leaves_no_exit_half_done() {
    let Some(host) = host() else { return };
    // in al, 0x81; out 0x80, al; inc ebx; mov [0xd0000000], bl; jmp
    let code = &[
        0xe4, 0x81, // in al, 0x81
        0xe6, 0x80, // out 0x80, al
        0x43, // inc ebx
        0x88, 0x1d, 0x00, 0x00, 0x00, 0xd0, // mov [0xd0000000], bl
        0xeb, 0xf3, // jmp -13
    ];
    let machine = Bare::boot(&host, code, 1);
    let rips = [0, 2, 4, 5, 11].map(|offset| CODE + offset);
    for _ in 0..300 {
        machine.resume();
        let now = machine.recorder.len();
        machine.recorder.wait_for(now + 1);
        machine.pause();
        let regs = machine.vcpus[0].with(|fd| fd.get_regs().unwrap());
        assert!(rips.contains(&regs.rip), "{:#x}", regs.rip);
        let bytes = machine.recorder.wait_for(0);
        // What was written is exactly what the registers say.
        let done = bytes.len() / 2;
        let complete = if regs.rip == CODE + 11 || regs.rip <= CODE + 2 {
            assert_eq!(bytes.len() % 2, 0);
            regs.rbx - 0x6000
        } else if regs.rip == CODE + 4 {
            assert_eq!(bytes.len() % 2, 1);
            regs.rbx - 0x6000
        } else {
            assert_eq!(bytes.len() % 2, 1);
            regs.rbx - 0x6000 - 1
        };
        assert_eq!(done as u64, complete);
        if regs.rip == CODE + 2 {
            assert_eq!(regs.rax & 0xff, 0x41, "a completed read is in its register");
        }
    }
}

#[test]
fn a_copy_continues_exactly() {
    let Some(host) = host() else { return };
    let machine = Bare::boot(&host, COUNTER, 1);
    machine.resume();
    machine.recorder.wait_for(50);
    machine.pause();
    let last = *machine.recorder.wait_for(1).last().unwrap();
    let state = machine.save(&host);
    let copies = [(); 2].map(|()| machine.copy(&host, &state));
    for copy in &copies {
        let again = copy.save(&host);
        let plain = |s: &(Vec<VcpuState>, VmState)| {
            let mut vcpu = s.0[0].clone();
            // Time passes, also for a vCPU that does not run.
            vcpu.msrs.retain(|m| m.index != msr::IA32_TSC);
            (
                vcpu.encode().unwrap(),
                postcard::to_stdvec(&s.1.chips).unwrap(),
            )
        };
        assert!(plain(&state) == plain(&again), "saved, restored, saved");
        copy.resume();
        assert_eq!(copy.recorder.wait_for(1)[0], last.wrapping_add(1));
        copy.pause();
    }
}

#[test]
fn a_halted_guest_wakes_by_an_irqfd() {
    let Some(host) = host() else { return };
    // sti; hlt; jmp to the hlt. The handler behind it: mov al, 7; out 0x80, al; hlt.
    let code = &[0xfb, 0xf4, 0xeb, 0xfd, 0x90, 0xb0, 0x07, 0xe6, 0x80, 0xf4];
    let handler = CODE + 5;
    let machine = Bare::boot(&host, code, 1);
    let ram = machine.vm.memory().ram();
    // The PIC starts with vector 0 for its line 0, so its line 4 is vector 4.
    let gate = (handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
    ram.write_obj(gate, GuestAddress(0x2000 + 4 * 8)).unwrap();
    let flat = 0x00cf_9b00_0000_ffff_u64;
    ram.write_obj(flat, GuestAddress(0x1010)).unwrap();
    machine.vcpus[0].with(|fd| {
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.gdt.base, sregs.gdt.limit) = (0x1000, 0x1f);
        (sregs.idt.base, sregs.idt.limit) = (0x2000, 0x7ff);
        fd.set_sregs(&sregs).unwrap();
        let mut regs = fd.get_regs().unwrap();
        regs.rsp = 0x8000;
        fd.set_regs(&regs).unwrap();
    });
    let event = EventFd::new(0).unwrap();
    let line = IrqLine {
        event: &event,
        gsi: 4,
    };
    machine.vm.connect_irq(&line).unwrap();
    machine.resume();
    std::thread::sleep(Duration::from_millis(20));
    machine.pause();
    let state = machine.vcpus[0].with(|fd| fd.get_mp_state().unwrap());
    assert_eq!(state.mp_state, kvm_bindings::KVM_MP_STATE_HALTED);
    // A copy that is made while the vCPU is halted is woken like the original.
    let saved = machine.save(&host);
    let copy = machine.copy(&host, &saved);
    let copy_event = EventFd::new(0).unwrap();
    let copy_line = IrqLine {
        event: &copy_event,
        gsi: 4,
    };
    copy.vm.connect_irq(&copy_line).unwrap();
    for (machine, event) in [(&machine, &event), (&copy, &copy_event)] {
        machine.resume();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.recorder.len(), 0);
        event.write(1).unwrap();
        assert_eq!(machine.recorder.wait_for(1), [7]);
    }
}

#[test]
fn a_triple_fault_ends_the_guest() {
    let Some(host) = host() else { return };
    // lidt with limit 0 is the state at entry; an undefined instruction then cannot be handled.
    let machine = Bare::boot(&host, &[0x0f, 0x0b], 1);
    machine.resume();
    let reason = machine.exits.wait(Duration::from_secs(10));
    assert_eq!(reason, Some(ExitReason::TripleFault));
    machine.pause();
}
