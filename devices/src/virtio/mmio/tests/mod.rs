mod echo;
mod property;
mod saved;

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::*;
use vm_memory::GuestAddress;

use self::echo::{Echo, FEATURE, MAX_SIZES};
use super::{CONFIG_CHANGE, USED_BUFFER};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Driver, DriverQueue, Segment, TestRam};

const ALL: u64 = u64::MAX;

fn device(echo: &Arc<Mutex<Echo>>) -> Arc<Mutex<dyn VirtioDevice>> {
    Arc::clone(echo) as _
}

fn new_driver() -> (TestRam, Arc<Mutex<Echo>>, Driver) {
    let ram = TestRam::new(1 << 20);
    let echo = Echo::new();
    let driver = Driver::new(&ram, device(&echo));
    (ram, echo, driver)
}

fn started() -> (TestRam, Arc<Mutex<Echo>>, Driver) {
    let ram = TestRam::new(1 << 20);
    let echo = Echo::new();
    let driver = Driver::start(&ram, device(&echo), ALL);
    (ram, echo, driver)
}

/// Sends `text` through queue 0 and returns what comes back.
fn echo(ram: &TestRam, driver: &mut Driver, text: &[u8]) -> Vec<u8> {
    let back = ram.writable(64);
    let head = driver.queues[0].push(&[ram.readable(text), back]);
    driver.kick(0);
    let used = driver.queues[0].pop_used().expect("a used chain");
    assert_eq!(used.head, head);
    let mut bytes = ram.read(&back);
    bytes.truncate(used.len as usize);
    bytes
}

/// 4.2.2: magic, version 2, ids.
#[test]
fn identity_registers() {
    let (_ram, _echo, driver) = new_driver();
    let id = [
        VIRTIO_MMIO_MAGIC_VALUE,
        VIRTIO_MMIO_VERSION,
        VIRTIO_MMIO_DEVICE_ID,
    ]
    .map(|r| driver.get(r));
    assert_eq!(id, [0x7472_6976, 2, 42]);
    // No shared memory region: its length is -1.
    assert_eq!(driver.get(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.get(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn requests_go_through_direct_and_indirect() {
    let (ram, _echo, mut driver) = started();
    // More often than the queue is long, so that the rings wrap.
    for turn in 0..50_u8 {
        assert_eq!(echo(&ram, &mut driver, &[turn; 9]), [turn; 9]);
        assert_eq!(driver.take_interrupt(), USED_BUFFER, "turn {turn}");
        assert_eq!(driver.raised(), 1);
    }
    let back = ram.writable(16);
    driver.queues[1].push_indirect(&ram, &[ram.readable(b"in"), ram.readable(b"direct"), back]);
    driver.kick(1);
    assert_eq!(driver.queues[1].pop_used().unwrap().len, 8);
    assert_eq!(&ram.read(&back)[..8], b"indirect");
}

/// 2.7.7.2: with EVENT_IDX no interrupt before the used event that the driver asked for.
#[test]
fn event_idx_holds_interrupts_back() {
    let (ram, _echo, mut driver) = started();
    driver.queues[0].set_used_event(2);
    for raised in [0, 0, 1] {
        driver.queues[0].push(&[ram.readable(b"x"), ram.writable(1)]);
        driver.kick(0);
        assert_eq!(driver.raised(), raised);
    }
    // And the device asks to be notified of the next chain (2.7.10).
    let old = driver.queues[0].avail_index();
    driver.queues[0].push(&[ram.writable(1)]);
    assert!(driver.queues[0].should_notify(old));
}

/// 3.1.1: the steps come in their order; what comes too early is not set.
#[test]
fn status_bits_out_of_order_are_not_set() {
    let (_ram, _echo, mut driver) = new_driver();
    for early in [2, 4, 8, 12, 14] {
        driver.set(VIRTIO_MMIO_STATUS, early);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0, "{early} at first");
    }
    driver.set(VIRTIO_MMIO_STATUS, 1);
    driver.set(VIRTIO_MMIO_STATUS, 5);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 1);
    driver.set(VIRTIO_MMIO_STATUS, 3);
    driver.set(VIRTIO_MMIO_STATUS, 7);
    assert_eq!(
        driver.get(VIRTIO_MMIO_STATUS),
        3,
        "DRIVER_OK without FEATURES_OK"
    );
}

/// 2.1.1: the driver MUST NOT clear a status bit.
#[test]
fn status_bits_cannot_be_cleared() {
    let (_ram, echo, mut driver) = started();
    for less in [1, 3, 11] {
        driver.set(VIRTIO_MMIO_STATUS, less);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    }
    assert!(echo.lock().unwrap().active.is_some());
}

/// 2.1.1: after FAILED only a reset helps.
#[test]
fn failed_is_final_until_reset() {
    let (_ram, _echo, mut driver) = new_driver();
    driver.negotiate(ALL);
    driver.set(VIRTIO_MMIO_STATUS, 128 | 11);
    driver.set(VIRTIO_MMIO_STATUS, 15);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 128 | 11);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
    driver.negotiate(ALL);
}

/// 2.2.1 and 6.1: a driver without VIRTIO_F_VERSION_1 is refused.
#[test]
fn legacy_drivers_are_refused() {
    let (_ram, _echo, mut driver) = new_driver();
    driver.set(VIRTIO_MMIO_STATUS, 3);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, FEATURE as u32);
    driver.set(VIRTIO_MMIO_STATUS, 11);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 3);
}

/// 2.2.1: a driver MUST NOT accept a feature that was not offered.
#[test]
fn features_that_were_not_offered_are_refused() {
    let (_ram, _echo, mut driver) = new_driver();
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    let high = driver.get(VIRTIO_MMIO_DEVICE_FEATURES);
    assert_eq!(high, 1, "VERSION_1 and no packed ring");
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    for extra in [2_u32, 4] {
        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.set(VIRTIO_MMIO_STATUS, 3);
        driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.set(VIRTIO_MMIO_DRIVER_FEATURES, high | extra);
        driver.set(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 3);
    }
}

/// 3.1.1: features MUST NOT change after FEATURES_OK.
#[test]
fn features_are_frozen_by_features_ok() {
    let (ram, echo, mut driver) = new_driver();
    let accepted = driver.negotiate(ALL);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, 0);
    driver.set_up_queues(&ram, true);
    driver.set(VIRTIO_MMIO_STATUS, 15);
    let echo = echo.lock().unwrap();
    assert_eq!(echo.active.as_ref().unwrap().features, accepted);
}

/// 4.2.2.2: queue registers are not touched once the queue is ready, nor before FEATURES_OK.
#[test]
fn queue_registers_only_in_their_time() {
    let (ram, echo, mut driver) = new_driver();
    let queue = DriverQueue::new(&ram, 16, true);
    driver.tell_queue(0, &queue);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "before FEATURES_OK");
    driver.negotiate(ALL);
    driver.tell_queue(0, &queue);
    driver.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x10);
    driver.set(VIRTIO_MMIO_QUEUE_NUM, 2);
    driver.set(VIRTIO_MMIO_STATUS, 15);
    driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(
        driver.get(VIRTIO_MMIO_QUEUE_READY),
        1,
        "not while the device runs"
    );
    let echo = echo.lock().unwrap();
    let state = echo.active.as_ref().unwrap().queues[0].state();
    assert_eq!((state.desc_table, state.size), (queue.addresses()[0].0, 16));
}

/// 4.2.2: QueueNumMax is 0 for a queue that is not there.
#[test]
fn queues_that_are_not_there() {
    let (_ram, _echo, mut driver) = new_driver();
    driver.negotiate(ALL);
    for select in [2, 3, 0x1_0000, u32::MAX] {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, select);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, select);
    }
    for (index, max) in MAX_SIZES.into_iter().enumerate() {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, index as u32);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(max));
    }
}

/// 2.7 and 4.2.3.2: sizes are powers of two up to the maximum, rings aligned and in memory. Anything
/// else shows as DEVICE_NEEDS_RESET with a configuration interrupt (2.1.2), and a reset heals it.
#[test]
fn impossible_queues_need_a_reset() {
    let wrongs: [(u32, u32); 9] = [
        (VIRTIO_MMIO_QUEUE_NUM, 0),
        (VIRTIO_MMIO_QUEUE_NUM, 3),
        (VIRTIO_MMIO_QUEUE_NUM, 32),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0010),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1001),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x1002),
        (VIRTIO_MMIO_QUEUE_USED_HIGH, u32::MAX),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, (1 << 20) - 16),
    ];
    for (register, value) in wrongs {
        let (ram, echo, mut driver) = new_driver();
        driver.negotiate(ALL);
        let queue = DriverQueue::new(&ram, 16, true);
        driver.tell_queue(0, &queue);
        driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
        driver.set(register, value);
        driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
        driver.set(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(
            driver.get(VIRTIO_MMIO_STATUS),
            64 | 15,
            "{register:#x} = {value:#x}"
        );
        assert_eq!(driver.take_interrupt(), CONFIG_CHANGE);
        assert_eq!(driver.raised(), 1);
        assert!(echo.lock().unwrap().active.is_none());
        let mut again = driver;
        again.negotiate(ALL);
        again.set_up_queues(&ram, true);
        again.set(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(super::tests::echo(&ram, &mut again, b"healed"), b"healed");
    }
}

#[test]
fn a_device_that_refuses_needs_a_reset() {
    let (ram, echo, mut driver) = new_driver();
    echo.lock().unwrap().refuse = true;
    driver.negotiate(ALL);
    driver.set_up_queues(&ram, true);
    driver.set(VIRTIO_MMIO_STATUS, 15);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 64 | 15);
    assert_eq!(driver.take_interrupt(), CONFIG_CHANGE);
}

/// 2.7.13.3: an available index further ahead than the queue is long breaks the ring.
#[test]
fn a_broken_ring_needs_a_reset() {
    let (_ram, _echo, mut driver) = started();
    driver.queues[0].set_avail_index(17);
    driver.kick(0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 64 | 15);
    assert_eq!(driver.take_interrupt(), CONFIG_CHANGE);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
}

/// 2.1.2: before DRIVER_OK the device consumes no buffer.
#[test]
fn nothing_is_consumed_before_driver_ok() {
    let (ram, _echo, mut driver) = new_driver();
    driver.negotiate(ALL);
    driver.set_up_queues(&ram, true);
    driver.queues[0].push(&[ram.readable(b"x"), ram.writable(1)]);
    driver.kick(0);
    driver.transport.queue_events()[0].write(1).unwrap();
    driver.run();
    assert_eq!(driver.queues[0].used_index(), 0);
    assert_eq!(driver.raised(), 0);
}

/// 4.2.2.1: a reset clears InterruptStatus and QueueReady; 2.1: and the device starts over.
#[test]
fn reset_clears_everything() {
    let (ram, echo_device, mut driver) = started();
    echo(&ram, &mut driver, b"one");
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), USED_BUFFER);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert!(echo_device.lock().unwrap().active.is_none());
    for queue in [0, 1] {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    driver.queues.clear();
    driver.negotiate(ALL);
    driver.set_up_queues(&ram, true);
    driver.set(VIRTIO_MMIO_STATUS, 15);
    assert_eq!(echo(&ram, &mut driver, b"again"), b"again");
}

/// 4.2.2.2: control registers are accessed in aligned words, the configuration in the width of its
/// fields.
#[test]
fn widths() {
    let (_ram, _echo, mut driver) = new_driver();
    for len in [1, 2, 3, 8, 16] {
        let mut data = vec![0xff; len];
        driver.transport.read(0, &mut data);
        assert_eq!(data, vec![0; len], "{len} bytes of a control register");
        driver
            .transport
            .write(VIRTIO_MMIO_STATUS.into(), &vec![1; len]);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
    }
    let mut word = [0xff; 4];
    driver.transport.read(2, &mut word);
    assert_eq!(word, [0; 4], "misaligned");

    let config = u64::from(VIRTIO_MMIO_CONFIG);
    let mut eight = [0; 8];
    driver.transport.read(config, &mut eight);
    assert_eq!(&eight, b"config!!");
    let mut two = [0; 2];
    driver.transport.read(config + 2, &mut two);
    assert_eq!(&two, b"nf");
    driver.transport.read(config + 1, &mut two);
    assert_eq!(two, [0; 2], "misaligned");
    driver.transport.read(config + 6, &mut word);
    assert_eq!(word, [0; 4], "misaligned");
    driver.transport.read(0xffe, &mut two);
    assert_eq!(two, [0; 2], "behind the configuration");
    for far in [0x1000, u64::MAX, u64::MAX - 7] {
        driver.transport.read(far, &mut word);
        driver.transport.write(far, &word);
        assert_eq!(word, [0; 4]);
    }
}

/// 3.1.1: the configuration is the driver's to write only once it is one.
#[test]
fn configuration_writes_need_a_driver() {
    let (_ram, _echo, mut driver) = new_driver();
    let config = u64::from(VIRTIO_MMIO_CONFIG);
    driver.transport.write(config, b"X");
    assert_eq!(driver.config(0, 1), b"c");
    driver.set(VIRTIO_MMIO_STATUS, 3);
    driver.transport.write(config, b"X");
    assert_eq!(driver.config(0, 1), b"X");
    driver.set(VIRTIO_MMIO_STATUS, 128);
    driver.transport.write(config, b"Y");
    assert_eq!(driver.config(0, 1), b"X");
}

/// 2.5.1 and 4.2.2.1: a change of the configuration changes ConfigGeneration and interrupts.
#[test]
fn configuration_changes_are_told() {
    let (_ram, echo, mut driver) = started();
    let before = driver.get(VIRTIO_MMIO_CONFIG_GENERATION);
    echo.lock().unwrap().change_config(*b"changed!");
    assert_ne!(driver.get(VIRTIO_MMIO_CONFIG_GENERATION), before);
    assert_eq!(driver.take_interrupt(), CONFIG_CHANGE);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(driver.config(0, 8), b"changed!");
}

/// A chain that points outside guest memory ends in DEVICE_NEEDS_RESET or in nothing written,
/// never outside.
#[test]
fn segments_outside_memory() {
    let (_ram, _echo, mut driver) = started();
    driver.queues[0].push(&[
        Segment::readable(GuestAddress(u64::MAX - 3), 64),
        Segment::writable(GuestAddress(1 << 40), u32::MAX),
    ]);
    driver.kick(0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 64 | 15);
}
