//! Whole machines: boot, pause, capture, build.

use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_snapshot_format::Payload;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{CELL, Entry, boot, cell, config, copy, host, wait_for};
use crate::arch::msr;
use crate::boot::layout;
use crate::{
    Bindings, ErrorKind, ExitReason, GenerationId, Machine, MachineState, Memory, ModelConfig,
};

/// Counts in `CELL` for ever.
const COUNTER: &[u8] = &[
    0xff, 0x05, 0x00, 0x00, 0x18, 0x00, // inc dword [0x180000]
    0xeb, 0xf8, // jmp -8
];

#[test]
fn a_machine_pauses_and_goes_on() {
    let Some(host) = host() else { return };
    let mut machine = boot(&host, COUNTER, Entry::Pvh);
    let memory = Arc::clone(machine.paused().memory());
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(cell(&memory, CELL), 0, "it starts paused");
    let mut running = machine.start().unwrap();
    wait_for(&memory, CELL, 100);
    for _ in 0..50 {
        let paused = running.pause().unwrap();
        let stopped = cell(&memory, CELL);
        std::thread::sleep(Duration::from_micros(500));
        assert_eq!(cell(&memory, CELL), stopped);
        drop(paused);
        wait_for(&memory, CELL, stopped + 1);
    }
    let mut machine = running.into_paused().map_err(|(_, e)| e).unwrap();
    let stopped = cell(&memory, CELL);
    assert_eq!(cell(machine.paused().memory(), CELL), stopped);
    let running = machine.start().unwrap();
    wait_for(&memory, CELL, stopped + 1);
    assert_eq!(running.wait(Duration::ZERO), None);
    running.stop().wait();
}

#[test]
fn a_guest_switches_itself_off() {
    let Some(host) = host() else { return };
    // mov dx, 0x600; mov al, 0x34 (SLP_EN, S5); out dx, al; jmp $
    let code = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe];
    let before = Instant::now();
    let mut running = boot(&host, code, Entry::Pvh).start().unwrap();
    let reason = running.wait(Duration::from_secs(10));
    assert_eq!(reason, Some(ExitReason::PowerOff));
    assert!(running.exits().event().read().is_ok());
    assert!(running.first_exit().unwrap() > before);
    // It can still be looked at, and ended.
    running.pause().unwrap().capture().unwrap();
    running.stop().wait();
}

#[test]
fn a_jump_to_the_reset_vector_resets() {
    let Some(host) = host() else { return };
    // mov eax, 0xffff0; jmp eax
    let code = &[0xb8, 0xf0, 0xff, 0x0f, 0x00, 0xff, 0xe0];
    let running = boot(&host, code, Entry::Pvh).start().unwrap();
    let reason = running.wait(Duration::from_secs(10));
    assert_eq!(reason, Some(ExitReason::Reset));
    running.stop().wait();
}

#[test]
fn a_guest_tells_of_its_panic_before_it_resets() {
    let Some(host) = host() else { return };
    // mov dx, 0x505; in al, dx (what can be told: a panic); out dx, al;
    // mov al, 0xfe; out 0x64, al (reset); jmp $
    let code = &[
        0x66, 0xba, 0x05, 0x05, 0xec, 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe,
    ];
    let running = boot(&host, code, Entry::Pvh).start().unwrap();
    let reason = running.wait(Duration::from_secs(10));
    assert_eq!(reason, Some(ExitReason::Panicked));
    running.stop().wait();
}

/// A state as bytes, without what time changes.
fn plain(state: &MachineState) -> Vec<Vec<u8>> {
    let mut parts = vec![state.platform.encode().unwrap()];
    for vcpu in &state.vcpus {
        let mut vcpu = vcpu.clone();
        vcpu.msrs.retain(|m| m.index != msr::IA32_TSC);
        // The LAPIC's current timer count.
        vcpu.lapic.regs[0x390..0x394].fill(0);
        parts.push(vcpu.encode().unwrap());
    }
    // PICs only: the I/O APIC has the generation id's interrupt in it.
    parts.push(postcard::to_stdvec(&state.chips.chips[..2]).unwrap());
    parts
}

#[test]
fn copies_continue_exactly_and_apart() {
    let Some(host) = host() else { return };
    let machine = boot(&host, COUNTER, Entry::Pvh);
    let mut running = machine.start().unwrap();
    let paused = running.pause().unwrap();
    drop(paused);
    let paused = running.pause().unwrap();
    let state = paused.capture().unwrap();
    let at = cell(paused.memory(), CELL);
    let original_id: [u8; 16] = paused
        .memory()
        .ram()
        .read_obj(layout::VMGENID_PAGE)
        .unwrap();
    let mut copies = Vec::new();
    for _ in 0..3 {
        let memory = copy(paused.memory());
        let mut built = Machine::build(&host, &state, memory, Bindings::default()).unwrap();
        let again = built.paused();
        assert_eq!(cell(again.memory(), CELL), at);
        assert_eq!(plain(&again.capture().unwrap()), plain(&state));
        let id: [u8; 16] = again.memory().ram().read_obj(layout::VMGENID_PAGE).unwrap();
        assert_ne!(id, original_id);
        drop(again);
        copies.push(built);
    }
    let memories: Vec<Arc<Memory>> = copies
        .iter_mut()
        .map(|copy| Arc::clone(copy.paused().memory()))
        .collect();
    let mut copies = copies.into_iter();
    let first = copies.next().unwrap().start().unwrap();
    wait_for(&memories[0], CELL, at + 100);
    assert_eq!(cell(paused.memory(), CELL), at);
    assert_eq!(cell(&memories[1], CELL), at);
    // A copy outlives its source.
    drop(paused);
    running.stop().wait();
    let second = copies.next().unwrap().start().unwrap();
    wait_for(&memories[1], CELL, at + 100);
    drop((first, second));
}

#[test]
fn the_generation_id_can_be_chosen() {
    let Some(host) = host() else { return };
    let id = GenerationId::from_bytes([7; 16]);
    let bindings = Bindings {
        generation: Some(id),
        ..Bindings::default()
    };
    let config = config(4, COUNTER, Entry::Pvh);
    let mut machine = Machine::boot(&host, &config, bindings).unwrap();
    let memory = machine.paused();
    let found: [u8; 16] = memory
        .memory()
        .ram()
        .read_obj(layout::VMGENID_PAGE)
        .unwrap();
    assert_eq!(&found, id.as_bytes());
}

#[test]
fn ram_goes_on_above_the_device_space() {
    let Some(host) = host() else { return };
    // mov rbx, 0x1_0000_0000; inc qword [rbx]; inc qword [0x180000]; jmp
    let code = &[
        0x48, 0xbb, 0, 0, 0, 0, 1, 0, 0, 0, // mov rbx, imm64
        0x48, 0xff, 0x03, // inc qword [rbx]
        0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x18, 0x00, // inc qword [0x180000]
        0xeb, 0xf3, // jmp -13
    ];
    let config = config(3584, code, Entry::Long);
    let mut machine = Machine::boot(&host, &config, Bindings::default()).unwrap();
    let memory = Arc::clone(machine.paused().memory());
    // The fifth GiB, by a page directory of our own.
    let directory = 0x30_0000_u64;
    let pdpt_entry = layout::PAGE_TABLES.0 + 0x1000 + 8 * 4;
    let ram = memory.ram();
    ram.write_obj(directory | 3, GuestAddress(pdpt_entry))
        .unwrap();
    ram.write_obj(0x1_0000_0083_u64, GuestAddress(directory))
        .unwrap();
    let high = GuestAddress(0x1_0000_0000);
    let mut running = machine.start().unwrap();
    wait_for(&memory, high, 100);
    let paused = running.pause().unwrap();
    let state = paused.capture().unwrap();
    let at = cell(&memory, high);
    let mut built = Machine::build(&host, &state, copy(&memory), Bindings::default()).unwrap();
    let copied = Arc::clone(built.paused().memory());
    let copy = built.start().unwrap();
    wait_for(&copied, high, at + 100);
    assert_eq!(cell(&memory, high), at);
    drop(copy);
}

#[test]
fn the_second_vcpu_starts_by_sipi() {
    let Some(host) = host() else { return };
    // Real mode, from 0x8000: inc word [0x7000]; jmp.
    let second = &[0xff, 0x06, 0x00, 0x70, 0xeb, 0xfa];
    // INIT, then SIPI with vector 8, to the LAPIC with id 1; then count.
    let first = [
        &[0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x01][..],
        &[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x00, 0x00][..],
        &[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x00, 0x00][..],
        COUNTER,
    ]
    .concat();
    let mut config = config(4, &first, Entry::Pvh);
    config.vcpus = 2;
    let mut machine = Machine::boot(&host, &config, Bindings::default()).unwrap();
    let memory = Arc::clone(machine.paused().memory());
    let ram = memory.ram();
    ram.write_slice(second, GuestAddress(0x8000)).unwrap();
    let theirs = GuestAddress(0x7000);
    ram.write_obj(0_u64, theirs).unwrap();
    // A capture before the second one has started is as good as any.
    let state = machine.paused().capture().unwrap();
    let built = Machine::build(&host, &state, copy(&memory), Bindings::default()).unwrap();
    for mut machine in [machine, built] {
        let memory = Arc::clone(machine.paused().memory());
        let mut running = machine.start().unwrap();
        wait_for(&memory, theirs, 50);
        let paused = running.pause().unwrap();
        let (at, at2) = (cell(&memory, CELL), cell(&memory, theirs));
        let state = paused.capture().unwrap();
        assert_eq!(state.vcpus.len(), 2);
        let mut again = Machine::build(&host, &state, copy(&memory), Bindings::default()).unwrap();
        let copied = Arc::clone(again.paused().memory());
        let again = again.start().unwrap();
        wait_for(&copied, CELL, at + 10);
        wait_for(&copied, theirs, at2 + 10);
        assert_eq!((cell(&memory, CELL), cell(&memory, theirs)), (at, at2));
        drop(again);
    }
}

#[test]
fn what_does_not_fit_is_listed() {
    let Some(host) = host() else { return };
    let drive = || ModelConfig::Drive(Default::default());
    let config = config(4, COUNTER, Entry::Pvh)
        .with_device("root", drive())
        .with_device("data", drive());
    let error = Machine::boot(&host, &config, Bindings::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bindings);
    let all = format!("{error:?}");
    assert!(all.contains("root") && all.contains("data"), "{all}");
    for ids in [["a", "a"], ["", "a"], ["a b", "a"], ["-a", "b"]] {
        let mut config = super::guest::config(4, COUNTER, Entry::Pvh);
        for id in ids {
            config = config.with_device(id, drive());
        }
        let error = Machine::boot(&host, &config, Bindings::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{ids:?}");
    }
    let mut none = super::guest::config(4, COUNTER, Entry::Pvh);
    none.vcpus = 0;
    let error = Machine::boot(&host, &none, Bindings::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
}

#[test]
fn ended_machines_leave_nothing() {
    let Some(host) = host() else { return };
    let count = |dir: &str| std::fs::read_dir(dir).unwrap().count();
    let mut machine = boot(&host, COUNTER, Entry::Pvh);
    let paused = machine.paused();
    let state = paused.capture().unwrap();
    // Other tests run at the same time: look for growth that is ours alone.
    let mut cleanups = Vec::new();
    let before = (count("/proc/self/fd"), count("/proc/self/task"));
    for round in 0..100 {
        let memory = copy(paused.memory());
        let built = Machine::build(&host, &state, memory, Bindings::default()).unwrap();
        if round % 2 == 0 {
            let running = built.start().unwrap();
            cleanups.push(running.stop());
        } else {
            cleanups.push(built.stop());
        }
    }
    for cleanup in cleanups {
        cleanup.wait();
    }
    let after = (count("/proc/self/fd"), count("/proc/self/task"));
    assert!(
        after.0 < before.0 + 80 && after.1 < before.1 + 80,
        "descriptors and threads: {before:?} before, {after:?} after"
    );
}
