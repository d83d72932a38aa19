//! What a drive's I/O costs through the whole path: rings in guest memory, the queue's eventfd, the
//! I/O thread, the engine, the used ring, the interrupt's eventfd. Beside it, the same requests
//! as plain `pread`/`pwrite` calls on the same file.
//!
//! `cargo run --release -p offshoot-devices --features testing --example blk_bench -- [DIR [MIB [MS]]]`
//! (a directory for the disk, its size, and how long each line is measured)
#![allow(clippy::print_stdout, reason = "an example program prints its results")]

use std::error::Error;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offshoot_devices::virtio::VirtioDevice;
use offshoot_devices::virtio::blk::{Blk, BlkConfig, BlkHost, EngineChoice};
use offshoot_devices::virtio::testing::{Driver, Segment, TestRam};
use offshoot_storage::{Volume, VolumeName, copy};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A kind of load.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    write: bool,
    random: bool,
    bytes: u32,
}

const LOADS: [Load; 4] = [
    Load {
        name: "4 KiB random read",
        write: false,
        random: true,
        bytes: 4096,
    },
    Load {
        name: "4 KiB random write",
        write: true,
        random: true,
        bytes: 4096,
    },
    Load {
        name: "128 KiB sequential read",
        write: false,
        random: false,
        bytes: 128 << 10,
    },
    Load {
        name: "128 KiB sequential write",
        write: true,
        random: false,
        bytes: 128 << 10,
    },
];

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mib: u64 = args.next().map_or(Ok(256), |s| s.parse())?;
    let time = Duration::from_millis(args.next().map_or(Ok(1000), |s| s.parse())?);
    let dir = tempfile::tempdir_in(dir)?;
    let store = copy::open(dir.path())?;
    let volume = store.create(&VolumeName::new("bench")?, mib << 20)?;
    fill(&*volume)?;
    println!("{mib} MiB file in the page cache, {time:?} a line");
    println!(
        "{:26} {:12} {:>5} {:>10} {:>9}",
        "load", "path", "depth", "IOPS", "MiB/s"
    );
    for load in LOADS {
        let file = volume.raw_file().ok_or("the volume is not a raw file")?;
        report(load, "syscall", 1, plain(file, volume.size(), load, time)?);
        for (name, engine) in [
            ("io_uring", EngineChoice::IoUring),
            ("threads", EngineChoice::Threads),
        ] {
            for depth in [1, 32] {
                let rate = Bench::new(&volume, engine, depth, load)?.run(time)?;
                report(load, name, depth, rate);
            }
        }
    }
    println!(
        "median of 200, in us: {:>15} {:>9} {:>9} {:>9}",
        "restore", "activate", "quiesce", "drop"
    );
    for (name, engine) in [
        ("io_uring", EngineChoice::IoUring),
        ("threads", EngineChoice::Threads),
    ] {
        let [restore, activate, quiesce, drop] = life(&volume, engine)?;
        println!("{name:26} {restore:>10} {activate:>9} {quiesce:>9} {drop:>9}");
    }
    Ok(())
}

/// What the steps of a drive's life cost that a fork pays for.
fn life(volume: &Arc<dyn Volume>, engine: EngineChoice) -> Result<[u128; 4]> {
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..200 {
        let host = BlkHost {
            engine,
            ..BlkHost::new(Arc::clone(volume))
        };
        let state = Blk::new(BlkConfig::new("bench"), host.clone())?.save();
        let ram = TestRam::new(1 << 20);
        let start = Instant::now();
        let blk = Arc::new(Mutex::new(Blk::restore(state, host)?));
        let restored = Instant::now();
        let driver = Driver::start(&ram, blk.clone(), u64::MAX);
        let active = Instant::now();
        blk.lock().map_err(|_| "poisoned")?.quiesce()?;
        let quiet = Instant::now();
        drop(driver);
        drop(blk);
        let gone = Instant::now();
        for (times, (from, to)) in times.iter_mut().zip([
            (start, restored),
            (restored, active),
            (active, quiet),
            (quiet, gone),
        ]) {
            times.push((to - from).as_micros());
        }
    }
    Ok(times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    }))
}

fn report(load: Load, path: &str, depth: usize, iops: f64) {
    let rate = iops * f64::from(load.bytes) / f64::from(1 << 20);
    println!(
        "{:26} {path:12} {depth:>5} {iops:>10.0} {rate:>9.0}",
        load.name
    );
}

/// Writes everything once, so that every block is allocated and cached.
fn fill(volume: &dyn Volume) -> Result<()> {
    let mut block = vec![0; 1 << 20];
    File::open("/dev/urandom")?.read_exact(&mut block)?;
    for offset in (0..volume.size()).step_by(block.len()) {
        volume.write_vectored_at(&[IoSlice::new(&block)], offset)?;
    }
    Ok(volume.flush()?)
}

/// Where the next request goes.
struct Places {
    load: Load,
    count: u64,
    state: u64,
}

impl Places {
    fn new(load: Load, size: u64) -> Self {
        Self {
            load,
            count: size / u64::from(load.bytes),
            state: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn next(&mut self) -> u64 {
        if self.load.random {
            // xorshift64
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        } else {
            self.state = self.state.wrapping_add(1);
        }
        self.state % self.count * u64::from(self.load.bytes)
    }
}

/// One request after the other, without any virtqueue.
fn plain(file: &File, size: u64, load: Load, time: Duration) -> Result<f64> {
    let mut places = Places::new(load, size);
    let mut buffer = vec![0x5a; usize::try_from(load.bytes)?];
    let start = Instant::now();
    let mut done = 0_u32;
    while start.elapsed() < time {
        for _ in 0..16 {
            if load.write {
                file.write_all_at(&buffer, places.next())?;
            } else {
                file.read_exact_at(&mut buffer, places.next())?;
            }
            done += 1;
        }
    }
    Ok(f64::from(done) / start.elapsed().as_secs_f64())
}

/// A driver that keeps `depth` requests in flight and sleeps for interrupts.
struct Bench {
    ram: TestRam,
    driver: Driver,
    notify: Arc<EventFd>,
    line: Arc<EventFd>,
    chains: Vec<[Segment; 3]>,
    places: Places,
}

impl Bench {
    fn new(
        volume: &Arc<dyn Volume>,
        engine: EngineChoice,
        depth: usize,
        load: Load,
    ) -> Result<Self> {
        let host = BlkHost {
            engine,
            ..BlkHost::new(Arc::clone(volume))
        };
        let blk = Arc::new(Mutex::new(Blk::new(BlkConfig::new("bench"), host)?));
        let ram = TestRam::new(32 << 20);
        let driver = Driver::start(&ram, blk.clone(), u64::MAX);
        let notify = Arc::clone(&blk.lock().map_err(|_| "poisoned")?.queue_events()[0]);
        let line = Arc::clone(driver.transport.interrupt_line());
        let chains = (0..depth)
            .map(|_| {
                let addr = ram.alloc(load.bytes.into(), 4096);
                let data = Segment {
                    addr,
                    len: load.bytes,
                    writable: !load.write,
                };
                let mut header = [0; 16];
                header[0] = u8::from(load.write);
                [ram.readable(&header), data, ram.writable(1)]
            })
            .collect();
        Ok(Self {
            driver,
            notify,
            line,
            chains,
            places: Places::new(load, volume.size()),
            ram,
        })
    }

    fn run(mut self, time: Duration) -> Result<f64> {
        let mut free: Vec<usize> = (0..self.chains.len()).collect();
        let mut owner = vec![0; usize::from(self.driver.queues[0].size())];
        let start = Instant::now();
        let mut done = 0_u32;
        loop {
            let over = start.elapsed() >= time;
            if over && free.len() == self.chains.len() {
                break;
            }
            if !over {
                self.submit(&mut free, &mut owner)?;
            }
            let before = free.len();
            while let Some(used) = self.driver.queues[0].pop_used() {
                let chain = owner[usize::from(used.head)];
                let status: u8 = self.ram.memory().read_obj(self.chains[chain][2].addr)?;
                if status != 0 {
                    return Err("a request failed".into());
                }
                free.push(chain);
                done += 1;
            }
            if free.len() == before {
                self.wait()?;
            }
        }
        Ok(f64::from(done) / start.elapsed().as_secs_f64())
    }

    /// Makes all free chains available, then notifies once if that is wanted.
    fn submit(&mut self, free: &mut Vec<usize>, owner: &mut [usize]) -> Result<()> {
        let old = self.driver.queues[0].avail_index();
        for chain in free.drain(..) {
            let [header, ..] = self.chains[chain];
            let sector = self.places.next() / 512;
            let at = header.addr.0 + 8;
            self.ram
                .memory()
                .write_obj(sector, vm_memory::GuestAddress(at))?;
            let head = self.driver.queues[0].push(&self.chains[chain]);
            owner[usize::from(head)] = chain;
        }
        let queue = &self.driver.queues[0];
        if queue.avail_index() != old && queue.should_notify(old) {
            self.notify.write(1)?;
        }
        Ok(())
    }

    /// Sleeps until the interrupt is raised.
    fn wait(&self) -> Result<()> {
        let mut fd = libc::pollfd {
            fd: self.line.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, for the time of the call.
        if unsafe { libc::poll(&raw mut fd, 1, 5000) } != 1 {
            return Err("no interrupt came".into());
        }
        self.line.read()?;
        Ok(())
    }
}
