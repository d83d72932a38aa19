//! Programs that keep a guest busy, and say in files how far they are. Each file is replaced as a
//! whole, so that a reader finds one state of it.

use std::fs;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// Computes on every processor, for ever.
pub(crate) fn spin() -> io::Result<()> {
    let processors = thread::available_parallelism()?.get();
    thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(|| {
                let mut number = 1_u64;
                loop {
                    number = black_box(number.wrapping_mul(6_364_136_223_846_793_005));
                }
            });
        }
    });
    Ok(())
}

/// Counts, and looks at the monotonic clock each time: how far it has ever jumped between two
/// counts in milliseconds, and how often it went back.
pub(crate) fn tally(path: &str) -> io::Result<()> {
    let mut last = Instant::now();
    let (mut longest, mut backwards) = (0, 0);
    for number in 0_u64.. {
        let now = Instant::now();
        match now.checked_duration_since(last) {
            Some(passed) => longest = longest.max(passed.as_millis()),
            None => backwards += 1,
        }
        last = now;
        say(path, &format!("{number} {longest} {backwards}"))?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Sends numbers over a TCP connection to itself, and expects each back.
pub(crate) fn loopback(path: &str) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    thread::spawn(move || -> io::Result<()> {
        let mut bytes = [0; 8];
        loop {
            far.read_exact(&mut bytes)?;
            far.write_all(&bytes)?;
        }
    });
    for number in 0_u64.. {
        let mut back = [0; 8];
        let exchanged = near
            .write_all(&number.to_le_bytes())
            .and_then(|()| near.read_exact(&mut back));
        if let Err(error) = exchanged {
            return say(path, &format!("the connection broke at {number}: {error}"));
        }
        let back = u64::from_le_bytes(back);
        if back != number {
            return say(path, &format!("sent {number}, got {back}"));
        }
        say(path, &number.to_string())?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn say(path: &str, what: &str) -> io::Result<()> {
    let new = format!("{path}.new");
    fs::write(&new, what)?;
    fs::rename(new, path)
}
