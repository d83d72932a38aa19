//! A running Linux guest is saved and goes on, in itself and in copies.

use std::fs::File;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{LayerName, StorageBackend, VolumeName};
use offshoot_vmm::boot::{BootSource, Image};
use offshoot_vmm::{
    Bindings, DriveBinding, DriveConfig, ExitReason, Host, Machine, MachineConfig, ModelConfig,
    RamSize, Running, SaveOptions, Template,
};

use crate::console::{Console, console};
use crate::disks::store_with_ext4;
use crate::{BZIMAGE, Failure, INITRD};

const DRIVE: &str = "disk";
const MEMORY_MIB: u64 = 192;
/// How long the snapshot lies there before it is restored: a clock that saw this time would show.
const AT_REST: Duration = Duration::from_secs(6);
/// What a guest may see between two ticks that are 100 ms apart. The ticks next to a pause are
/// farther apart on the source, for whom time goes on; a copy must not see [`AT_REST`].
const TICKS: RangeInclusive<u64> = 90..=5000;
/// A second's sleep, by the guest's clock and by ours, in milliseconds: a busy machine starves emulation.
const SECOND: RangeInclusive<u64> = 950..=5000;

pub(crate) fn goes_on(cpus: u8) -> Result<(), Failure> {
    let host = Host::open()?;
    let dir = format!("/run/snapshot{cpus}");
    let dir = Path::new(&dir);
    std::fs::create_dir_all(dir.join("snapshots"))?;
    let volume = VolumeName::new("source")?;
    let store = store_with_ext4("qcow2", &dir.join("disks"), &volume)?;

    let (sink, mut lines) = console("source");
    let disk = store.open(&volume, offshoot_storage::Access::ReadWrite)?;
    let bindings = Bindings::default()
        .with_drive(DRIVE, DriveBinding::volume(Arc::clone(&store), disk))
        .with_serial(sink);
    let mut source = Machine::boot(&host, &config(cpus)?, bindings)?.start()?;
    healthy(&source, &mut lines, cpus)?;
    tell(&source, "write");
    lines.wait("lab: 1 lines on the disk")?;

    let before = tick(&mut lines)?;
    let start = Instant::now();
    let paused = source.pause()?;
    let paused_after = start.elapsed();
    let saved = paused.save(&dir.join("snapshots"), SaveOptions::new()?)?;
    let saved_after = start.elapsed();
    paused.resume()?;
    println!("paused after {paused_after:?}, saved after {saved_after:?}");
    healthy(&source, &mut lines, cpus)?;
    tell(&source, "write");
    lines.wait("lab: 2 lines on the disk")?;
    lines.no_alarm()?;

    thread::sleep(AT_REST);
    let start = Instant::now();
    let raw = RawSnapshot::open(&saved.path)?;
    let template = Template::load(&host, &raw, Verify::Eager)?;
    println!("loaded after {:?}", start.elapsed());
    for name in ["copy-1", "copy-2"] {
        copy(&template, &store, name, before, cpus)?;
    }
    // The source has noticed nothing of all that.
    healthy(&source, &mut lines, cpus)?;
    off(source, &mut lines)?;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

/// A copy goes on from the tick that the snapshot was taken behind, sees the disk of then, and
/// works.
fn copy(
    template: &Template,
    store: &Arc<dyn StorageBackend>,
    name: &'static str,
    before: Tick,
    cpus: u8,
) -> Result<(), Failure> {
    let origin = template.origin().ok_or("a loaded template has an origin")?;
    let layer = LayerName::new(&origin.disks.first().ok_or("no disk")?.layer)?;
    let disk = store.fork(&layer, &VolumeName::new(name)?)?;
    let (sink, mut lines) = console(name);
    let bindings = Bindings::default()
        .with_drive(DRIVE, DriveBinding::volume(Arc::clone(store), disk))
        .with_serial(sink);
    let start = Instant::now();
    let running = template.fork(bindings)?.start()?;
    println!("{name} runs after {:?}", start.elapsed());
    let after = tick(&mut lines)?;
    // One tick may have been on its way to the console during the pause.
    if !(1..=3).contains(&(after.number.saturating_sub(before.number))) {
        return Err(format!("{name} goes on with {after:?} behind {before:?}").into());
    }
    within("the copy's clock", after.at - before.at, &TICKS)?;
    let next = tick(&mut lines)?;
    within("a tick of the copy", next.at - after.at, &TICKS)?;
    healthy(&running, &mut lines, cpus)?;
    tell(&running, "write");
    lines.wait("lab: 2 lines on the disk")?;
    off(running, &mut lines)
}

fn config(cpus: u8) -> Result<MachineConfig, Failure> {
    let mut boot = BootSource::new(Image::File(File::open(BZIMAGE)?));
    boot.initrd = Some(Image::File(File::open(INITRD)?));
    boot.command_line = format!("{} lab=serve", crate::COMMAND_LINE);
    let drive = ModelConfig::Drive(DriveConfig::default());
    let mut config = MachineConfig::new(RamSize::from_mib(MEMORY_MIB)?, boot)
        .with_device(DRIVE, drive)
        .with_device("entropy", ModelConfig::ENTROPY);
    config.vcpus = cpus;
    config.cpu.baseline = crate::CPU;
    Ok(config)
}

/// A line of the guest's counter: which, and when by the guest's `CLOCK_MONOTONIC` in
/// milliseconds.
#[derive(Debug, Clone, Copy)]
struct Tick {
    number: u64,
    at: u64,
}

fn tick(lines: &mut Console) -> Result<Tick, Failure> {
    let (_, line) = lines.wait("lab: tick ")?;
    let mut numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
    let (Some(number), Some(at)) = (numbers.next(), numbers.next()) else {
        return Err(format!("not a tick: {line}").into());
    };
    Ok(Tick { number, at })
}

/// Sends a word to the guest's program.
fn tell(running: &Running, word: &str) {
    let line = format!("{word}\n");
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        let taken = running.serial_input(rest);
        rest = &rest[taken..];
        thread::sleep(Duration::from_millis(5));
    }
}

/// The guest's timers run at the right speed, and its processors run and agree on the time.
fn healthy(running: &Running, lines: &mut Console, cpus: u8) -> Result<(), Failure> {
    tick(lines)?;
    tell(running, "sleep");
    let (start, _) = lines.wait("lab: sleeping")?;
    let (end, line) = lines.wait("lab: slept ")?;
    let ours = u64::try_from((end - start).as_millis())?;
    let theirs = line.split_whitespace().find_map(|word| word.parse().ok());
    within("a second's sleep on the host's clock", ours, &SECOND)?;
    within("a second's sleep", theirs.unwrap_or(0), &SECOND)?;
    tell(running, "processors");
    lines.wait(&format!(
        "lab: {cpus} processors run, time went back 0 times"
    ))?;
    Ok(())
}

fn off(running: Running, lines: &mut Console) -> Result<(), Failure> {
    tell(&running, "off");
    let end = running.wait(Duration::from_secs(30));
    if end != Some(ExitReason::PowerOff) {
        return Err(format!("told to switch itself off, the guest ended with {end:?}").into());
    }
    running.stop().wait();
    lines.no_alarm()
}

fn within(what: &str, millis: u64, range: &RangeInclusive<u64>) -> Result<(), Failure> {
    if range.contains(&millis) {
        Ok(())
    } else {
        Err(format!("{what} took {millis} ms, not {range:?}").into())
    }
}
