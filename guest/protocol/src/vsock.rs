//! The host side of a vsock: a Unix socket that takes `CONNECT <port>` and answers `OK <port>`.

use std::format;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use std::vec::Vec;

/// Connects to a port of a guest, trying again while nobody accepts. The stream's time-outs are
/// what was left until the deadline.
///
/// # Errors
/// The last failure when the deadline passes.
pub fn connect_vsock(path: &Path, port: u32, deadline: Instant) -> io::Result<UnixStream> {
    const PAUSE: Duration = Duration::from_micros(500);
    loop {
        let error = match try_connect(path, port, deadline) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if deadline.saturating_duration_since(Instant::now()) <= PAUSE {
            return Err(error);
        }
        thread::sleep(PAUSE);
    }
}

fn try_connect(path: &Path, port: u32, deadline: Instant) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    greet_vsock(&mut stream, port, deadline)?;
    Ok(stream)
}

/// Has the host side of a vsock connect this stream to a port of its guest. The stream's time-outs
/// are then what was left until the deadline.
///
/// # Errors
/// `ConnectionRefused`, or whatever the stream fails with: a time-out, or its end when nobody
/// listens in the guest.
pub fn greet_vsock(stream: &mut UnixStream, port: u32, deadline: Instant) -> io::Result<()> {
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        Some(left.max(Duration::from_millis(1)))
    };
    stream.set_write_timeout(left())?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // "OK " and a number, byte by byte: what follows is the guest's.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < 32 {
        stream.set_read_timeout(left())?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    match line.starts_with(b"OK ") {
        true => Ok(()),
        false => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}
