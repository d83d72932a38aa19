//! Connections from the host, over generations of forks.

use offshoot::ErrorKind;
use offshoot::agent::{Command, Event, Process};

use crate::Failure;
use crate::sandbox::{PATIENCE, Place, soon};

const GENERATIONS: u32 = 10;

/// A command that lives through every fork is reached by a connection of each generation's own.
/// The source keeps its connection at the fork, and it is reset when the source ends.
pub(crate) fn over_generations() -> Result<(), Failure> {
    let (place, mut current) = Place::boot("generations", 1)?;
    let mut connection = current
        .agent
        .start(&Command::new(["cat"]).input(), soon())?;
    let job = connection.job();
    echo(&connection, "boot")?;
    let mut last = "source".to_owned();
    for generation in 1..=GENERATIONS {
        let name = format!("generation-{generation}");
        let mut children = place.fork(&current.worker, &[&name])?;
        let mut child = children.pop().ok_or("no child")?;
        child.identify()?;
        let (next, info) = child.agent.attach(job, u64::MAX, soon())?;
        if info.exit.is_some() {
            return Err(format!("{name}: the command has ended: {info:?}").into());
        }
        echo(&next, &name)?;
        // Nothing of that has reached the source, whose connection lives.
        echo(&connection, "the source")?;
        current.no_alarm()?;
        current.worker.stop(PATIENCE)?;
        match connection.next(soon()) {
            Err(error) if error.kind() == ErrorKind::Disconnected => {}
            other => return Err(format!("{name}: the old connection says {other:?}").into()),
        }
        echo(&next, "still there")?;
        last = name;
        current = child;
        connection = next;
    }
    current.no_alarm()?;
    current.power_off()?;
    place.check_disk(&last, false)?;
    place.end()
}

/// Sends a line through the command and expects it back, and nothing else.
fn echo(process: &Process, text: &str) -> Result<(), Failure> {
    let line = format!("{text}\n");
    process.input().write(line.as_bytes(), soon())?;
    let mut back = Vec::new();
    while back.len() < line.len() {
        match process.next(soon())? {
            Event::Stdout(bytes) => back.extend(bytes),
            other => return Err(format!("{other:?} instead of {text:?}").into()),
        }
    }
    if back == line.as_bytes() {
        Ok(())
    } else {
        Err(format!("{:?} instead of {text:?}", String::from_utf8_lossy(&back)).into())
    }
}
