//! Save, restore, and hostile saved state.

use std::sync::{Arc, Mutex};

use offshoot_snapshot_format::Payload;
use virtio_bindings::virtio_mmio::*;

use super::{ALL, device, echo, started};
use crate::virtio::TransportState;
use crate::virtio::mmio::tests::echo::Echo;
use crate::virtio::testing::{Driver, TestRam};
use crate::{Error, ErrorKind};

fn save(driver: &mut Driver) -> TransportState {
    driver.transport.quiesce().unwrap();
    driver.transport.save().unwrap()
}

fn restore(ram: &TestRam, state: &TransportState) -> Result<(Arc<Mutex<Echo>>, Driver), Error> {
    let echo = Echo::new();
    let driver = Driver::restore(ram, state, device(&echo), Vec::new())?;
    Ok((echo, driver))
}

#[test]
fn only_a_quiesced_transport_can_be_saved() {
    let (_ram, _echo, mut driver) = started();
    let error = driver.transport.save().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongMoment);
    save(&mut driver);
    driver.transport.resume().unwrap();
    assert!(driver.transport.save().is_err());
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    let (ram, _echo, mut driver) = started();
    for turn in 0..21_u8 {
        echo(&ram, &mut driver, &[turn]);
    }
    // Quiesced, the device takes nothing, and a notification is not lost.
    driver.transport.quiesce().unwrap();
    let back = ram.writable(8);
    driver.queues[0].push(&[ram.readable(b"later"), back]);
    driver.kick(0);
    assert_eq!(driver.queues[0].used_index(), 21);

    let state = save(&mut driver);
    let decoded = TransportState::decode(TransportState::VERSION, &state.encode().unwrap());
    assert_eq!(decoded.unwrap(), state);

    let queues = std::mem::take(&mut driver.queues);
    let copy = Echo::new();
    let mut copied = Driver::restore(&ram, &state, device(&copy), queues).unwrap();
    assert_eq!(
        copied.transport.save().unwrap(),
        state,
        "save, restore, save"
    );
    copied.run();
    assert_eq!(copied.queues[0].used_index(), 21, "quiesced until resume");
    assert_eq!(copied.raised(), 0);
    copied.transport.resume().unwrap();
    assert_eq!(copied.queues[0].pop_used().unwrap().len, 5);
    assert_eq!(&ram.read(&back)[..5], b"later");
    assert_eq!(echo(&ram, &mut copied, b"and on"), b"and on");
}

/// What was on its way to the guest arrives: a pending interrupt is raised again by `resume`.
#[test]
fn pending_interrupts_are_raised_again() {
    let (ram, _echo, mut driver) = started();
    echo(&ram, &mut driver, b"x");
    let state = save(&mut driver);
    assert_eq!(state.interrupt_status, 1);
    let (_, mut copied) = restore(&ram, &state).unwrap();
    assert_eq!(copied.raised(), 0);
    copied.transport.resume().unwrap();
    assert_eq!(copied.raised(), 1);
    assert_eq!(copied.take_interrupt(), 1);
}

/// A device in need of a reset is still so in the copy, is not given the broken queues, and heals.
#[test]
fn a_broken_device_is_restored_broken() {
    let (ram, _echo, mut driver) = started();
    driver.queues[0].set_avail_index(999);
    driver.kick(0);
    let state = save(&mut driver);
    assert_eq!(state.status, 64 | 15);
    let (copy, mut copied) = restore(&ram, &state).unwrap();
    assert_eq!(copied.transport.save().unwrap(), state);
    copied.transport.resume().unwrap();
    assert!(copy.lock().unwrap().active.is_none());
    assert_eq!(copied.get(VIRTIO_MMIO_STATUS), 64 | 15);
    copied.negotiate(ALL);
    copied.set_up_queues(&ram, true);
    copied.set(VIRTIO_MMIO_STATUS, 15);
    assert_eq!(echo(&ram, &mut copied, b"healed"), b"healed");
}

/// Each field in turn is turned into something that no transport can have saved.
#[test]
fn hostile_state_is_refused() {
    type Mutation = (&'static str, fn(&mut TransportState));
    let (ram, _echo, mut driver) = started();
    let state = save(&mut driver);
    let mutations: [Mutation; 25] = [
        ("device type", |s| s.device_type = 1),
        ("status bit", |s| s.status |= 16),
        ("DRIVER_OK without FEATURES_OK", |s| s.status = 7),
        ("NEEDS_RESET without DRIVER_OK", |s| s.status = 64 | 11),
        ("DRIVER without ACKNOWLEDGE", |s| s.status = 14),
        ("no VERSION_1", |s| s.driver_features &= !(1 << 32)),
        ("not offered", |s| s.driver_features |= 1 << 6),
        ("packed", |s| s.driver_features |= 1 << 34),
        ("interrupt bit", |s| s.interrupt_status = 4),
        ("interrupt before DRIVER_OK", |s| {
            s.status = 3;
            s.interrupt_status = 1;
        }),
        ("queue missing", |s| s.queues.truncate(1)),
        ("no queue", |s| s.queues.clear()),
        ("queue too many", |s| s.queues.push(s.queues[0])),
        ("max size", |s| s.queues[0].max_size = 32),
        ("size 0", |s| s.queues[0].size = 0),
        ("size 3", |s| s.queues[0].size = 3),
        ("size above the maximum", |s| s.queues[0].size = 32),
        ("ready too early", |s| s.status = 3),
        ("event_idx", |s| s.queues[0].event_idx = false),
        ("misaligned table", |s| s.queues[0].descriptor_table += 8),
        ("misaligned available ring", |s| {
            s.queues[0].available_ring += 1
        }),
        ("misaligned used ring", |s| s.queues[0].used_ring += 2),
        ("table outside", |s| s.queues[0].descriptor_table = 1 << 40),
        ("ring at the end", |s| s.queues[1].used_ring = u64::MAX - 3),
        ("index of an unused queue", |s| {
            s.queues[1].ready = false;
            s.queues[1].next_avail = 1;
        }),
    ];
    for (what, mutate) in mutations {
        let mut hostile = state.clone();
        mutate(&mut hostile);
        let error = restore(&ram, &hostile).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::InvalidState, "{what}");
    }
}

/// Fields that may have any value do no harm.
#[test]
fn odd_but_possible_state_does_no_harm() {
    let (ram, _echo, mut driver) = started();
    let mut state = save(&mut driver);
    state.queue_select = u32::MAX;
    state.device_features_select = 77;
    state.driver_features_select = u32::MAX;
    state.config_generation = u32::MAX;
    state.queues[0].next_avail = 12345;
    state.queues[0].next_used = 54321;
    let (_, mut copied) = restore(&ram, &state).unwrap();
    assert_eq!(copied.transport.save().unwrap(), state);
    copied.transport.resume().unwrap();
    // Such an index is a broken ring.
    assert_eq!(copied.get(VIRTIO_MMIO_STATUS), 64 | 15);
}

#[test]
fn a_device_that_cannot_take_its_queues_is_the_devices_error() {
    let (ram, _echo, mut driver) = started();
    let state = save(&mut driver);
    let echo = Echo::new();
    echo.lock().unwrap().refuse = true;
    assert!(Driver::restore(&ram, &state, device(&echo), Vec::new()).is_err());
}
