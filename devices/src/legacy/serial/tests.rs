use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const DATA: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const MCR: u16 = 4;
const LSR: u16 = 5;

/// A writer that shows what it got.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn wait_for(&self, what: &[u8]) {
        wait(|| *self.0.lock().unwrap() == what);
    }
}

/// A writer that blocks until it is told to go on.
struct Stuck(SyncSender<()>, Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(());
        let _ = self.1.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait(done: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < limit, "not within ten seconds");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn line() -> Arc<EventFd> {
    Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
}

fn raised(line: &EventFd) -> u64 {
    line.read().unwrap_or(0)
}

fn get(serial: &mut Serial, port: u16) -> u8 {
    let mut byte = [0];
    serial.read(port, &mut byte);
    byte[0]
}

fn print(serial: &mut Serial, text: &[u8]) {
    for byte in text {
        assert_eq!(get(serial, LSR) & 0x60, 0x60, "always ready to send");
        serial.write(DATA, &[*byte]);
    }
}

#[test]
fn output_comes_out_in_order() {
    let screen = Screen::default();
    let mut serial = Serial::new(line(), Box::new(screen.clone()));
    print(&mut serial, b"hello, ");
    screen.wait_for(b"hello, ");
    // Longer than the thread lingers: another one takes over.
    std::thread::sleep(Duration::from_millis(300));
    print(&mut serial, b"world");
    screen.wait_for(b"hello, world");
    assert_eq!(serial.lost_output(), 0);
}

#[test]
fn output_is_written_out_when_the_port_goes() {
    let screen = Screen::default();
    let mut serial = Serial::new(line(), Box::new(screen.clone()));
    print(&mut serial, &[b'x'; 10_000]);
    drop(serial);
    assert_eq!(screen.0.lock().unwrap().len(), 10_000);
}

/// A blocked writer holds up neither the guest, nor a pause, nor the end of the port.
#[test]
fn a_blocked_writer_blocks_nobody() {
    let (entered, inside) = sync_channel(1);
    let (go, wait_for_go) = sync_channel(1);
    let mut serial = Serial::new(line(), Box::new(Stuck(entered, wait_for_go)));
    serial.write(DATA, b"a");
    inside.recv().unwrap();
    let begin = Instant::now();
    for _ in 0..OUTPUT_LIMIT + 100 {
        serial.write(DATA, b"b");
    }
    assert_eq!(serial.lost_output(), 100);
    serial.quiesce();
    let _ = serial.save();
    serial.resume().unwrap();
    drop(serial);
    assert!(begin.elapsed() < Duration::from_secs(5));
    drop(go);
}

#[test]
fn a_broken_writer_is_counted() {
    let mut serial = Serial::new(line(), Box::new(Broken));
    print(&mut serial, b"nobody reads this");
    wait(|| serial.lost_output() == 17);
}

#[test]
fn input_arrives_at_the_guests_pace() {
    let line = line();
    let mut serial = Serial::new(Arc::clone(&line), Box::new(io::sink()));
    serial.write(IER, &[1]);
    let text: Vec<u8> = (0..1000).map(|i: u32| (i % 251).to_le_bytes()[0]).collect();
    assert_eq!(serial.enqueue(&text), 1000);
    assert_eq!(raised(&line), 1);
    assert_eq!(get(&mut serial, IIR) & 0xf, 4, "received data available");
    let mut got = Vec::new();
    while get(&mut serial, LSR) & 1 != 0 {
        got.push(get(&mut serial, DATA));
    }
    assert_eq!(got, text);
    assert_eq!(serial.enqueue(&vec![0; INPUT_LIMIT + 500]), INPUT_LIMIT);
}

/// A driver's probe switches to loopback; input that comes then is not mixed in.
#[test]
fn loopback_keeps_input_waiting() {
    let mut serial = Serial::new(line(), Box::new(io::sink()));
    serial.write(MCR, &[0x10]);
    serial.enqueue(b"later");
    serial.write(DATA, b"p");
    assert_eq!(get(&mut serial, DATA), b'p');
    assert_eq!(get(&mut serial, LSR) & 1, 0);
    serial.write(MCR, &[8]);
    assert_eq!(get(&mut serial, DATA), b'l');
}

#[test]
fn only_bytes_and_only_eight_ports() {
    let screen = Screen::default();
    let mut serial = Serial::new(line(), Box::new(screen.clone()));
    let mut wide = [0; 4];
    serial.read(LSR, &mut wide);
    assert_eq!(wide, [0xff; 4]);
    for port in [8, 255, 256, u16::MAX] {
        serial.write(port, b"x");
        assert_eq!(get(&mut serial, port), 0xff);
    }
    serial.write(DATA, b"wide");
    serial.write(DATA, b"");
    serial.write(DATA, b".");
    screen.wait_for(b".");
}

#[test]
fn saved_and_restored() {
    let first = line();
    let mut serial = Serial::new(Arc::clone(&first), Box::new(io::sink()));
    serial.write(IER, &[1]);
    serial.write(7, &[0x5a]);
    serial.enqueue(b"typed");
    serial.quiesce();
    let state = serial.save();
    assert_eq!(
        SerialState::decode(1, &state.encode().unwrap()).unwrap(),
        state
    );

    let (line, screen) = (line(), Screen::default());
    let mut copy = Serial::restore(&state, Arc::clone(&line), Box::new(screen.clone())).unwrap();
    assert_eq!(copy.save(), state);
    // The interrupt that the guest has not answered comes again, but not before resume.
    assert_eq!(raised(&line), 0);
    copy.resume().unwrap();
    assert_eq!(raised(&line), 1);
    let got: Vec<u8> = (0..5).map(|_| get(&mut copy, DATA)).collect();
    assert_eq!(got, b"typed");
    assert_eq!(get(&mut copy, 7), 0x5a);
    print(&mut copy, b"mine");
    screen.wait_for(b"mine");
}

#[test]
fn input_during_a_pause_interrupts_after_it() {
    let line = line();
    let mut serial = Serial::new(Arc::clone(&line), Box::new(io::sink()));
    serial.write(IER, &[1]);
    serial.quiesce();
    serial.enqueue(b"x");
    assert_eq!(raised(&line), 0);
    serial.resume().unwrap();
    assert_eq!(raised(&line), 1);
    serial.quiesce();
    serial.resume().unwrap();
    assert_eq!(raised(&line), 0);
}

#[test]
fn a_pause_holds_output_back() {
    let screen = Screen::default();
    let mut serial = Serial::new(line(), Box::new(screen.clone()));
    serial.quiesce();
    serial.write(DATA, b"x");
    std::thread::sleep(Duration::from_millis(20));
    assert!(screen.0.lock().unwrap().is_empty());
    serial.resume().unwrap();
    screen.wait_for(b"x");
}

#[test]
fn a_fifo_that_is_too_full_is_refused() {
    let mut state = Serial::new(line(), Box::new(io::sink())).save();
    state.receive_fifo = vec![0; 65];
    let error = Serial::restore(&state, line(), Box::new(io::sink())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState);
}

proptest! {
    /// Any registers, however odd, and any accesses to them.
    #[test]
    fn arbitrary_state_and_accesses(
        registers in any::<[u8; 9]>(),
        fifo in prop::collection::vec(any::<u8>(), 0..=64),
        accesses in prop::collection::vec((0_u16..10, any::<Option<u8>>()), 0..100),
        input in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let state = SerialState {
            divisor_low: registers[0],
            divisor_high: registers[1],
            interrupt_enable: registers[2],
            interrupt_identification: registers[3],
            line_control: registers[4],
            line_status: registers[5],
            modem_control: registers[6],
            modem_status: registers[7],
            scratch: registers[8],
            receive_fifo: fifo,
        };
        let mut serial = Serial::restore(&state, line(), Box::new(io::sink())).unwrap();
        prop_assert_eq!(serial.save(), state);
        serial.resume().unwrap();
        serial.enqueue(&input);
        for (port, write) in accesses {
            match write {
                Some(byte) => serial.write(port, &[byte]),
                None => drop(get(&mut serial, port)),
            }
        }
        let state = serial.save();
        let again = Serial::restore(&state, line(), Box::new(io::sink())).unwrap();
        prop_assert_eq!(again.save(), state);
    }
}
