//! Runs in the inner guest and says on its console what it sees.
#![allow(clippy::print_stdout, reason = "its console is how it is heard")]

mod load;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Read, Seek, Write};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How often the counter counts.
const TICK: Duration = Duration::from_millis(100);

fn main() -> io::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("count") => count_boots(),
        Some("serve") => serve(),
        Some("spin") => load::spin(),
        Some("tally") => load::tally("/run/tally"),
        Some("loopback") => load::loopback("/run/loopback"),
        Some("nap") => {
            sleep();
            Ok(())
        }
        other => Err(io::Error::other(format!("no task {other:?}"))),
    }
}

/// Counts the boots in a file that is made durable; then crashes, so that nothing else is.
fn count_boots() -> io::Result<()> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open("/boots")?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let boots = text.trim().parse().unwrap_or(0) + 1;
    file.rewind()?;
    writeln!(file, "{boots}")?;
    file.sync_all()?;
    println!("lab: boot {boots} of this disk");
    std::fs::write("/proc/sysrq-trigger", "c")?;
    Ok(())
}

/// Counts on the console, and does what it is told there, a word a line.
fn serve() -> io::Result<()> {
    let start = Instant::now();
    let counter = thread::spawn(move || {
        for tick in 0_u64.. {
            println!("lab: tick {tick} at {} ms", start.elapsed().as_millis());
            thread::sleep(TICK);
        }
    });
    for line in io::stdin().lock().lines() {
        match line?.trim() {
            "sleep" => sleep(),
            "processors" => processors()?,
            "write" => write()?,
            "off" => return Ok(()),
            "" => {}
            word => println!("lab: no word {word}"),
        }
    }
    counter.join().map_err(|_| io::Error::other("the counter"))
}

fn sleep() {
    println!("lab: sleeping");
    let start = Instant::now();
    thread::sleep(Duration::from_secs(1));
    println!("lab: slept {} ms", start.elapsed().as_millis());
}

/// Whether every processor runs programs, and whether their clocks agree: time must not go
/// backwards from one to another.
fn processors() -> io::Result<()> {
    let count = thread::available_parallelism()?.get();
    for processor in 0..count {
        let status = Command::new("taskset")
            .args(["-c", &processor.to_string(), "true"])
            .status()?;
        if !status.success() {
            println!("lab: processor {processor} runs nothing: {status}");
        }
    }
    let last = Arc::new(Mutex::new((Instant::now(), 0_u32)));
    let threads: Vec<_> = (0..count)
        .map(|_| {
            let last = Arc::clone(&last);
            thread::spawn(move || {
                let end = Instant::now() + Duration::from_millis(300);
                while Instant::now() < end {
                    if let Ok(mut last) = last.lock() {
                        let now = Instant::now();
                        last.1 += u32::from(now < last.0);
                        last.0 = now;
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a thread"))?;
    }
    let backwards = last.lock().map_or(u32::MAX, |last| last.1);
    println!("lab: {count} processors run, time went back {backwards} times");
    Ok(())
}

/// Appends to a file on the disk, durably.
fn write() -> io::Result<()> {
    let path = "/mnt/lines";
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(file, "one more")?;
    file.sync_all()?;
    let lines = io::BufReader::new(File::open(path)?).lines().count();
    println!("lab: {lines} lines on the disk");
    Ok(())
}
