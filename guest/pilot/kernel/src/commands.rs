//! Requests: what is done for each, whichever line it came by.

use offshoot_protocol::{
    ANSWER, Crash, ErrorCode, Id, List, MAX_LINE, Mode, Outcome, REFUSED, Refusal, Reply, Request,
    State, VERSION,
};

use crate::Pilot;
use crate::info::peek;
use crate::serial::{Line, say};
use crate::virtio::blk::Work;
use crate::virtio::net::Frames;
use crate::{cpu, smp};

impl Pilot {
    /// Answers the lines that came in.
    pub(crate) fn serve_serial(&mut self) {
        while let Some(line) = self.lines.poll() {
            let request = match &line {
                Line::TooLong => Err(Refusal::new(ErrorCode::Malformed, MAX_LINE as u64)),
                Line::Whole(bytes, len) => core::str::from_utf8(&bytes[..*len])
                    .map_err(|error| Refusal::new(ErrorCode::Malformed, error.valid_up_to() as u64))
                    .and_then(|text| {
                        let malformed = |at| Refusal::new(ErrorCode::Malformed, at as u64);
                        Request::parse(text).map_err(|error| malformed(error.at))
                    }),
            };
            match request.and_then(|request| self.execute(&request)) {
                Ok(reply) => say!("{ANSWER} {reply}"),
                Err(refusal) => {
                    self.last_refusal = Some(refusal);
                    say!("{REFUSED} {} detail={}", refusal.code, refusal.detail);
                }
            }
        }
    }

    /// Does what is asked for.
    pub(crate) fn execute(&mut self, request: &Request) -> Result<Reply, Refusal> {
        self.requests += 1;
        let halt = self.mode == Mode::Halt;
        let outcome = |outcome| Reply::Outcome { outcome };
        match *request {
            Request::Hello { oldest, newest } => {
                let version = newest.min(VERSION);
                match version >= oldest.max(offshoot_protocol::OLDEST_VERSION) {
                    true => Ok(Reply::Hello { version }),
                    false => Err(Refusal::new(ErrorCode::Version, u64::from(VERSION))),
                }
            }
            Request::State {} => Ok(Reply::State {
                state: self.state(),
            }),
            Request::Fill { offset, len, seed } => self.owned.fill(offset, len, seed).map(outcome),
            Request::Verify { offset, len, seed } => {
                self.owned.verify(offset, len, seed).map(outcome)
            }
            Request::Touch { offset, len } => self.owned.touch(offset, len).map(outcome),
            Request::Dirty { offset, len, rate } => {
                if self.tsc_khz == 0 && rate > 0 {
                    let unknown = Refusal::new(ErrorCode::NoAnswer, 0);
                    self.tsc_khz = cpu::measure_tsc_khz().ok_or(unknown)?;
                }
                self.dirty
                    .set(&self.owned, (offset, len), rate, self.tsc_khz)?;
                Ok(Reply::Done {})
            }
            Request::Blk {
                device,
                op,
                offset,
                len,
                seed,
                chunk,
                depth,
            } => {
                let work = Work {
                    op,
                    offset,
                    len,
                    seed,
                    chunk,
                    depth,
                };
                let disk = pick(&mut self.devices.blk, device)?;
                disk.run(work, halt, &mut self.interrupts).map(outcome)
            }
            Request::NetAddress { device, ip } => {
                pick(&mut self.devices.net, device)?.set_ip(ip.0);
                Ok(Reply::Done {})
            }
            Request::NetPing {
                device,
                frames,
                len,
                peer,
            } => {
                let frames = Frames {
                    count: frames,
                    len,
                    peer: peer.0,
                };
                let card = pick(&mut self.devices.net, device)?;
                card.ping(frames, halt, &mut self.interrupts).map(outcome)
            }
            Request::NetSend {
                device,
                frames,
                len,
                peer,
            } => {
                let frames = Frames {
                    count: frames,
                    len,
                    peer: peer.0,
                };
                let card = pick(&mut self.devices.net, device)?;
                card.flood(frames, halt, &mut self.interrupts).map(outcome)
            }
            Request::Random { len } => {
                let rng = self.devices.rng.as_mut();
                let rng = rng.ok_or(Refusal::new(ErrorCode::NoDevice, 0))?;
                let bytes = rng.read(usize::from(len), halt, &mut self.interrupts)?;
                Ok(Reply::Random { bytes })
            }
            Request::VsockConnect { port, len, seed } => {
                let vsock = self.devices.vsock.as_mut();
                let vsock = vsock.ok_or(Refusal::new(ErrorCode::NoDevice, 0))?;
                vsock
                    .exchange(port, (len, seed), halt, &mut self.interrupts)
                    .map(outcome)
            }
            Request::Balloon {} => {
                let balloon = self.devices.balloon.as_mut();
                let balloon = balloon.ok_or(Refusal::new(ErrorCode::NoDevice, 0))?;
                balloon
                    .follow(&mut self.owned, halt, &mut self.interrupts)
                    .map(outcome)
            }
            Request::Report { offset, len } => {
                let balloon = self.devices.balloon.as_mut();
                let balloon = balloon.ok_or(Refusal::new(ErrorCode::NoDevice, 0))?;
                let area = (offset, len);
                balloon
                    .report(&self.owned, area, halt, &mut self.interrupts)
                    .map(outcome)
            }
            Request::SetMode { mode } => {
                self.mode = mode;
                smp::set_mode(mode);
                if mode != Mode::Halt {
                    self.devices.disarm();
                }
                Ok(Reply::Done {})
            }
            Request::Spin { turns } => {
                let begin = cpu::tsc();
                for turn in 0..turns {
                    core::hint::black_box(turn);
                }
                let ticks = cpu::tsc().saturating_sub(begin);
                let first_bad = u64::MAX;
                Ok(outcome(Outcome {
                    units: turns,
                    first_bad,
                    ticks,
                    ..Outcome::default()
                }))
            }
            Request::Crash { how } => crash(how),
            Request::Reboot {} => self.reboot(),
            // A message of a later version: this one can't read it, and so never gets here.
            _ => Err(Refusal::new(ErrorCode::Malformed, 0)),
        }
    }

    /// By the i8042, and a second later, on a machine that has none, by a triple fault.
    fn reboot(&mut self) -> ! {
        for _ in 0..10 {
            cpu::out8(0x64, 0xfe);
            self.interrupts.arm_timer();
            while !self.interrupts.timer_fired() {
                cpu::idle();
            }
        }
        cpu::triple_fault()
    }

    fn state(&self) -> State {
        let refusal = self
            .last_refusal
            .unwrap_or(Refusal::new(ErrorCode::Malformed, 0));
        let cards = || self.devices.net.iter().flatten();
        let vsock = self.devices.vsock.as_ref();
        let mut vcpus = List::default();
        let others = smp::counters(self.vcpus - 1);
        let fits = core::iter::once(self.counter)
            .chain(others)
            .all(|n| vcpus.push(n));
        debug_assert!(fits, "MAX_OTHERS is one less than the list holds");
        State {
            counter: self.counter,
            boot_id: self.boot_id,
            // SAFETY: the page is told by ACPI or the command line, and is RAM.
            generation: self
                .generation
                .map_or(Id::default(), |at| Id(unsafe { peek(at) })),
            tsc: cpu::tsc(),
            tsc_khz: self.tsc_khz,
            ram: self.ram,
            owned: self.owned.len(),
            mode: self.mode,
            interrupts: self.wakes,
            requests: self.requests,
            connections: vsock.map_or(0, |vsock| vsock.open_connections() as u16),
            resets: vsock.map_or(0, |vsock| vsock.resets),
            frames_in: cards().map(|card| card.frames_in).sum(),
            frames_out: cards().map(|card| card.frames_out).sum(),
            dirtied: self.dirty.pages,
            last_error: refusal.code,
            last_detail: refusal.detail,
            vcpus,
            devices: self.devices.report(),
        }
    }
}

/// A device by its number among its kind.
fn pick<T>(devices: &mut [Option<T>], number: u8) -> Result<&mut T, Refusal> {
    let count = devices.iter().flatten().count() as u64;
    let missing = Refusal::new(ErrorCode::NoDevice, count);
    devices
        .get_mut(usize::from(number))
        .and_then(Option::as_mut)
        .ok_or(missing)
}

fn crash(how: Crash) -> ! {
    match how {
        Crash::TripleFault => cpu::triple_fault(),
        Crash::PageFault => {
            // Canonical, and behind all that the tables map.
            let nowhere = 0x7f00_dead_0000 as *const u8;
            // SAFETY: meant to fault; the handler ends the run.
            unsafe { nowhere.read_volatile() };
        }
        Crash::InvalidOpcode => {
            // SAFETY: meant to fault; 0 is the number of no gate.
            unsafe { core::arch::asm!("ud2", in("eax") 0) }
        }
        Crash::Panic => panic!("asked to panic"),
        _ => {}
    }
    cpu::stop()
}
