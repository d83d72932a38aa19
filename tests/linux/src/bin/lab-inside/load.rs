//! Work that a guest is busy with, and whether it goes on in a copy.

use std::ops::RangeInclusive;
use std::thread;
use std::time::{Duration, Instant};

use offshoot::agent::{Command, JobId};

use crate::Failure;
use crate::sandbox::{PATIENCE, Sandbox, soon, unix_ns};

/// Writes to the disk: new files, and later the same ones again. Nothing is deleted, so that a
/// replayed journal leaves nothing to tidy up.
const WRITER: &str = "mkdir -p /mnt/load; i=0; while dd if=/dev/urandom \
                      of=/mnt/load/$((i % 200)) bs=4k count=2 conv=fsync,notrunc 2>/run/dd.log; \
                      do i=$((i+1)); echo $i >/run/written.new; mv /run/written.new /run/written; done";
/// A second's sleep in milliseconds by the guest's clock: a busy machine starves emulation.
const SECOND: RangeInclusive<u64> = 950..=5000;
/// The farthest that the monotonic clock may seem to jump between two counts, in milliseconds:
/// less than a snapshot lies at rest, more than a busy machine takes for one round.
const JUMP: u64 = 5000;
/// What clocks may differ by when nothing is wrong.
const SLACK: Duration = Duration::from_millis(20);

/// The job that computes on every processor.
pub(crate) struct Spinning(JobId);

/// How far the work is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    counted: u64,
    sent: u64,
    written: u64,
}

/// Starts all work: it counts, sends over TCP, writes to the disk and computes on every processor.
pub(crate) fn start(sandbox: &Sandbox) -> Result<Spinning, Failure> {
    for command in [
        Command::new(["lab-guest", "tally"]),
        Command::new(["lab-guest", "loopback"]),
        Command::shell(WRITER),
    ] {
        sandbox.agent.start(&command.detached(), soon())?;
    }
    let spinning = spin(sandbox)?;
    let deadline = Instant::now() + PATIENCE;
    while sandbox
        .sh("cat /run/tally /run/loopback /run/written")
        .is_err()
    {
        if Instant::now() > deadline {
            return Err("the work did not begin".into());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(spinning)
}

/// Computes on every processor, behind all others.
pub(crate) fn spin(sandbox: &Sandbox) -> Result<Spinning, Failure> {
    let command = Command::shell("renice -n 19 -p $$ && exec lab-guest spin").detached();
    Ok(Spinning(sandbox.agent.start(&command, soon())?.job()))
}

impl Spinning {
    /// Ends it in a guest; its copies compute on.
    pub(crate) fn end(&self, sandbox: &Sandbox) -> Result<(), Failure> {
        Ok(sandbox.agent.kill(self.0, soon())?)
    }
}

/// How far the work in a guest is; an error when some of it has failed.
pub(crate) fn progress(sandbox: &Sandbox) -> Result<Progress, Failure> {
    let text = sandbox.sh(
        "for file in tally loopback written; do echo $(cat /run/$file); done; cat /run/dd.log",
    )?;
    let bad = || format!("{}: the work says {text:?}", sandbox.name);
    let mut lines = text.lines();
    let mut numbers = || -> Result<Vec<u64>, Failure> {
        let line = lines.next().ok_or_else(bad)?;
        let words = line.split_whitespace();
        Ok(words
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map_err(|_| bad())?)
    };
    let (tally, sent, written) = (numbers()?, numbers()?, numbers()?);
    let ([counted, jump, back], [sent], [written]) = (&tally[..], &sent[..], &written[..]) else {
        return Err(bad().into());
    };
    if *jump > JUMP || *back != 0 {
        let name = &sandbox.name;
        let what = format!("{name}: CLOCK_MONOTONIC jumped by {jump} ms, went back {back} times");
        return Err(what.into());
    }
    Ok(Progress {
        counted: *counted,
        sent: *sent,
        written: *written,
    })
}

/// Fails unless all work goes on from where it was, or later, in a guest.
pub(crate) fn goes_on(sandbox: &Sandbox, before: Progress) -> Result<(), Failure> {
    let now = progress(sandbox)?;
    if now.counted < before.counted || now.sent < before.sent || now.written < before.written {
        let name = &sandbox.name;
        return Err(format!("{name} goes on with {now:?} behind {before:?}").into());
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let later = progress(sandbox)?;
        if later.counted > now.counted && later.sent > now.sent && later.written > now.written {
            println!("{}: {before:?}, {now:?}, {later:?}", sandbox.name);
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{}: {later:?} behind {now:?}: work stands", sandbox.name).into());
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Fails unless the guest's wall clock is the host's, its clocks run at the right speed, and its
/// timers come in time. All is bounded by what the host's clock said before and after, so that a
/// busy machine makes the test weaker, not wrong.
pub(crate) fn time_is_right(sandbox: &Sandbox) -> Result<(), Failure> {
    let name = &sandbox.name;
    let first = look(sandbox)?;
    // It was set to when the identity was sent.
    let oldest = first.before.saturating_sub(sandbox.identified_in);
    if first.wall < oldest || first.wall > first.after + SLACK {
        return Err(format!("{name}: the wall clock is wrong: {first:?}").into());
    }
    let said = sandbox.sh("lab-guest nap")?;
    let slept = said.split_whitespace().find_map(|word| word.parse().ok());
    let slept: u64 = slept.ok_or("no sleep")?;
    let second = look(sandbox)?;
    let shortest = second.before - first.after;
    let longest = second.after - first.before;
    let possible = shortest.saturating_sub(SLACK)..=longest + SLACK;
    let (wall, uptime) = (second.wall - first.wall, second.uptime - first.uptime);
    println!("{name}: slept {slept} ms; {shortest:?} to {longest:?} here are {wall:?} there");
    if !possible.contains(&wall) || !possible.contains(&uptime) {
        let what = format!("{wall:?} and {uptime:?} passed in {name}, here {possible:?}");
        return Err(what.into());
    }
    if SECOND.contains(&slept) {
        Ok(())
    } else {
        Err(format!("{name}: a second's sleep took {slept} ms").into())
    }
}

/// The guest's clocks, and the host's wall clock before and after they were asked.
#[derive(Debug)]
struct Clocks {
    before: Duration,
    wall: Duration,
    uptime: Duration,
    after: Duration,
}

fn look(sandbox: &Sandbox) -> Result<Clocks, Failure> {
    let before = Duration::from_nanos(unix_ns()?);
    let figures = sandbox.agent.metrics(&[], soon())?;
    Ok(Clocks {
        before,
        wall: Duration::from_nanos(figures.unix_ns),
        uptime: Duration::from_millis(figures.uptime_ms),
        after: Duration::from_nanos(unix_ns()?),
    })
}
