#![allow(clippy::indexing_slicing, reason = "a test that panics has failed")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::{Driver, Segment, TestRam};

fn rate(bytes: u32) -> BytesPerSecond {
    BytesPerSecond(NonZeroU32::new(bytes).unwrap())
}

fn start(rate: BytesPerSecond) -> (TestRam, Driver) {
    let ram = TestRam::new(4 << 20);
    let device = Arc::new(Mutex::new(Rng::new(rate).unwrap()));
    let driver = Driver::start(&ram, device, u64::MAX);
    (ram, driver)
}

/// 5.4.6.2: the device MUST place one or more random bytes into the buffer.
#[test]
fn buffers_are_filled_with_random_bytes() {
    let (ram, mut driver) = start(DEFAULT_RATE);
    let (a, b) = (ram.writable(64), ram.writable(64));
    driver.queues[0].push(&[a, b]);
    driver.kick(0);
    assert_eq!(driver.queues[0].pop_used().unwrap().len, 128);
    assert_ne!(ram.read(&a), ram.read(&b));
    assert_ne!(ram.read(&a), [0; 64]);
    assert_eq!(driver.take_interrupt(), 1);
}

/// 5.4.6.1: readable buffers do not belong there; they are neither written nor counted.
#[test]
fn readable_buffers_are_passed_over() {
    let (ram, mut driver) = start(DEFAULT_RATE);
    let text = ram.readable(b"untouched");
    driver.queues[0].push(&[text, ram.writable(8)]);
    driver.queues[0].push(&[text]);
    driver.kick(0);
    assert_eq!(driver.queues[0].pop_used().unwrap().len, 8);
    assert_eq!(driver.queues[0].pop_used().unwrap().len, 0);
    assert_eq!(ram.read(&text), b"untouched");
}

#[test]
fn a_request_is_bounded() {
    let (ram, mut driver) = start(DEFAULT_RATE);
    let big = ram.writable(1 << 20);
    driver.queues[0].push(&[big]);
    driver.kick(0);
    assert_eq!(driver.queues[0].pop_used().unwrap().len, MAX_REQUEST);
    assert!(
        ram.read(&big)[MAX_REQUEST as usize..]
            .iter()
            .all(|b| *b == 0)
    );
}

#[test]
fn the_rate_is_bounded_and_what_waited_is_served() {
    let (ram, mut driver) = start(rate(MAX_REQUEST * 20));
    let begin = Instant::now();
    let mut bytes = 0;
    for _ in 0..25 {
        driver.queues[0].push(&[ram.writable(MAX_REQUEST)]);
    }
    driver.kick(0);
    driver.run_until(|d| {
        while let Some(used) = d.queues[0].pop_used() {
            assert!(used.len > 0, "5.4.6.2: one or more bytes");
            bytes += used.len;
        }
        d.queues[0].free() == 64
    });
    // One second's worth at once, what is above it at the rate.
    let above = f64::from(bytes.saturating_sub(20 * MAX_REQUEST));
    let least = above / f64::from(20 * MAX_REQUEST);
    assert!(begin.elapsed().as_secs_f64() >= least * 0.99);
    assert!(bytes > 20 * MAX_REQUEST);
}

#[test]
fn the_budget_is_never_above_its_capacity() {
    let now = Instant::now();
    let mut budget = Budget::full(rate(10_000), now);
    budget.refill(rate(10_000), now + Duration::from_secs(1 << 40));
    assert_eq!(budget.bytes, 10_000);
    budget.bytes = 0;
    for step in 1..=1000_u64 {
        // Ten calls for each byte's time.
        let later = now + Duration::from_secs(1 << 40) + Duration::from_micros(10 * step);
        budget.refill(rate(10_000), later);
    }
    assert_eq!(budget.bytes, 100);
}

/// Hostile descriptors lead to DEVICE_NEEDS_RESET (2.1.2), and a reset heals it.
#[test]
fn buffers_outside_memory_need_a_reset() {
    let (ram, mut driver) = start(DEFAULT_RATE);
    driver.queues[0].push(&[Segment::writable(GuestAddress(u64::MAX - 4), 64)]);
    driver.kick(0);
    assert_eq!(driver.get(0x70), 64 | 15);
    assert_eq!(driver.take_interrupt(), 2);
    driver.queues.clear();
    driver.negotiate(0);
    driver.set_up_queues(&ram, false);
    driver.set(0x70, 15);
    driver.queues[0].push(&[ram.writable(8)]);
    driver.kick(0);
    assert_eq!(driver.queues[0].pop_used().unwrap().len, 8);
}

#[test]
fn a_chain_that_is_a_loop_ends() {
    let (ram, mut driver) = start(DEFAULT_RATE);
    let buffer = ram.writable(1);
    let loops = crate::virtio::testing::NEXT | crate::virtio::testing::WRITE;
    driver.queues[0].set_descriptor(0, buffer.addr, 1, loops, 0);
    driver.queues[0].publish(0);
    driver.kick(0);
    assert_eq!(driver.queues[0].used_index(), 1);
}

#[test]
fn saved_and_restored_while_requests_wait() {
    let (ram, mut driver) = start(DEFAULT_RATE);
    driver.transport.quiesce().unwrap();
    driver.queues[0].push(&[ram.writable(32)]);
    driver.kick(0);
    assert_eq!(driver.queues[0].used_index(), 0);
    let state = driver.transport.save().unwrap();
    let device = Rng::restore(&RngState { rate: rate(7) }).unwrap();
    assert_eq!(device.save(), RngState { rate: rate(7) });
    let queues = std::mem::take(&mut driver.queues);
    let mut copy = Driver::restore(&ram, &state, Arc::new(Mutex::new(device)), queues).unwrap();
    assert_eq!(copy.transport.save().unwrap(), state);
    copy.transport.resume().unwrap();
    assert_eq!(copy.queues[0].pop_used().unwrap().len, 32);
}

#[test]
fn no_rate_decodes_to_no_state() {
    assert!(RngState::decode(1, &[0]).is_err());
    let state = RngState { rate: DEFAULT_RATE };
    assert_eq!(
        RngState::decode(1, &state.encode().unwrap()).unwrap(),
        state
    );
}
