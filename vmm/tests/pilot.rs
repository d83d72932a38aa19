//! The pilot under this machine: every device in use, snapshots of it, and copies.

mod support;

use std::os::unix::net::UnixStream;

use offshoot_pilot::PilotClient;
use offshoot_pilot::protocol::{BlkOp, Outcome, Request, State};
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_vmm::{Machine, SaveOptions, Template};

use support::{Console, Place, client, config, host};

fn blk(op: BlkOp, seed: u64) -> Request {
    Request::Blk {
        device: 0,
        op,
        offset: 0,
        len: 1 << 20,
        seed,
        chunk: 65536,
        depth: 8,
    }
}

fn fill(seed: u64) -> Request {
    Request::Fill {
        offset: 0,
        len: 4 << 20,
        seed,
    }
}

fn verify(seed: u64) -> Request {
    Request::Verify {
        offset: 0,
        len: 4 << 20,
        seed,
    }
}

fn good(client: &mut PilotClient<UnixStream>, request: &Request) -> Outcome {
    let outcome = client.work(request).unwrap();
    assert_eq!(outcome.bad, 0, "{request:?}: {outcome:?}");
    outcome
}

fn story(vcpus: u8) {
    let Some(host) = host() else { return };
    let place = Place::new();
    let console = Console::default();
    let socket = place.socket("source");
    let bindings = place
        .bindings("source", place.drive("disk", None))
        .with_serial(console.clone());
    let config = config(64, vcpus);
    let mut running = Machine::boot(&host, &config, bindings)
        .unwrap()
        .start()
        .unwrap();
    let mut pilot = client(&running, &socket, &console);
    good(&mut pilot, &blk(BlkOp::Write, 1));
    good(&mut pilot, &fill(1));
    let before: State = pilot.state().unwrap();
    assert_eq!(before.devices.as_slice().len(), 5);

    let snapshots = place.dir.path().join("snapshots");
    std::fs::create_dir(&snapshots).unwrap();
    let paused = running.pause().unwrap();
    let saved = paused
        .save(&snapshots, SaveOptions::new().unwrap())
        .unwrap();
    paused.resume().unwrap();
    // The source goes on over the same connection.
    good(&mut pilot, &fill(2));
    good(&mut pilot, &blk(BlkOp::Write, 2));
    let after = pilot.state().unwrap();
    assert_eq!(after.boot_id, before.boot_id);
    assert_eq!(after.generation, before.generation);

    let raw = RawSnapshot::open(&saved.path).unwrap();
    let template = Template::load(&host, &raw, Verify::Eager).unwrap();
    let layer = template.origin().unwrap().disks[0].layer.clone();
    let mut copies = Vec::new();
    for number in 0..3_u64 {
        let socket = place.socket(&format!("copy{number}"));
        let name = format!("copy{number}");
        let bindings = place
            .bindings(&name, place.drive(&name, Some(&layer)))
            .with_serial(console.clone());
        let running = template.fork(bindings).unwrap().start().unwrap();
        let mut pilot = client(&running, &socket, &console);
        let state = pilot.state().unwrap();
        assert_eq!(state.boot_id, before.boot_id, "the same past");
        assert!(state.counter >= before.counter);
        assert_ne!(
            state.generation, before.generation,
            "a copy knows that it is one"
        );
        good(&mut pilot, &verify(1));
        good(&mut pilot, &blk(BlkOp::Verify, 1));
        good(&mut pilot, &fill(10 + number));
        good(&mut pilot, &blk(BlkOp::Write, 10 + number));
        copies.push((number, running, pilot));
    }
    for (number, _, pilot) in &mut copies {
        good(pilot, &verify(10 + *number));
        good(pilot, &blk(BlkOp::Verify, 10 + *number));
    }
    good(&mut pilot, &verify(2));
    good(&mut pilot, &blk(BlkOp::Verify, 2));
    drop(copies);
    running.stop().wait();
}

#[test]
fn copies_of_a_pilot_continue_and_are_apart() {
    story(1);
}

#[test]
fn copies_of_a_pilot_with_two_processors() {
    story(2);
}
