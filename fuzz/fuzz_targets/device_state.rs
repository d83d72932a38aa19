//! Saved state of the transport and the small devices, from bytes to a device that runs.
#![no_main]

use std::io;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use offshoot_devices::legacy::{I8042, I8042State, Serial, SerialState, i8042};
use offshoot_devices::virtio::balloon::{Balloon, BalloonState, GuestRange, PageReclaim};
use offshoot_devices::virtio::rng::{Rng, RngState};
use offshoot_devices::virtio::testing::{Driver, TestRam, event};
use offshoot_devices::virtio::{TransportState, VirtioDevice};
use offshoot_devices::vmgenid::{GenerationId, VmGenId, VmGenIdState};
use offshoot_fuzz::RAM;
use offshoot_snapshot_format::Payload;

#[derive(Debug)]
struct Nowhere;

impl PageReclaim for Nowhere {
    fn reclaim(&self, _: GuestRange) -> io::Result<()> {
        Ok(())
    }
}

/// Decodes, and what decodes must encode to the same bytes' worth of state.
fn decode<P: Payload + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<P> {
    let state = P::decode(P::VERSION, bytes).ok()?;
    let again =
        P::decode(P::VERSION, &state.encode().expect("it was decoded")).expect("it was encoded");
    assert_eq!(again, state);
    Some(state)
}

fn run(transport: &[u8], device: Arc<Mutex<dyn VirtioDevice>>) {
    let ram = TestRam::new(RAM);
    let Some(state) = decode::<TransportState>(transport) else {
        return;
    };
    let Ok(mut driver) = Driver::restore(&ram, &state, device, Vec::new()) else {
        return;
    };
    assert_eq!(driver.transport.save().expect("it is quiesced"), state);
    driver.transport.resume().expect("it runs");
    for queue in 0..8 {
        driver.kick(queue);
    }
    driver.transport.quiesce().expect("it stops");
}

// One byte says which device, the next how long its state is; what follows is its state, then the
// transport's state or the bytes of accesses.
fuzz_target!(|data: &[u8]| {
    let &[what, len, ref rest @ ..] = data else {
        return;
    };
    let (bytes, transport) = rest.split_at(usize::from(len).min(rest.len()));
    match what % 5 {
        0 => {
            if let Some(state) = decode::<RngState>(bytes) {
                let device = Rng::restore(&state).expect("any rate will do");
                run(transport, Arc::new(Mutex::new(device)));
            }
        }
        1 => {
            if let Some(state) = decode::<BalloonState>(bytes) {
                let device =
                    Balloon::restore(&state, Box::new(Nowhere)).expect("any state will do");
                run(transport, Arc::new(Mutex::new(device)));
            }
        }
        2 => {
            if let Some(state) = decode::<SerialState>(bytes)
                && let Ok(mut serial) = Serial::restore(&state, event(), Box::new(io::sink()))
            {
                assert_eq!(serial.save(), state);
                serial.resume().expect("it runs");
                for (port, byte) in (0..8).cycle().zip(transport) {
                    serial.enqueue(&[*byte]);
                    serial.read(port, &mut [0]);
                    // Not the data port: each byte sent there costs a thread its time.
                    serial.write(port.max(1), &[*byte]);
                }
            }
        }
        3 => {
            if let Some(state) = decode::<I8042State>(bytes)
                && let Ok(mut controller) = I8042::restore(state, event())
            {
                assert_eq!(controller.save(), state);
                for (turn, byte) in transport.iter().enumerate() {
                    let port = [i8042::DATA_PORT, i8042::COMMAND_PORT][turn % 2];
                    controller.write(port, &[*byte]);
                    controller.read(port, &mut [0]);
                }
            }
        }
        _ => {
            let ram = TestRam::new(RAM);
            if let Some(state) = decode::<VmGenIdState>(bytes)
                && let Ok(device) = VmGenId::restore(&state, ram.memory())
            {
                let id = GenerationId::from_bytes([7; 16]);
                device
                    .write(ram.memory(), &id)
                    .expect("it was proven to be there");
            }
        }
    }
});
