//! A pilot in a QEMU process, its serial line, its disk and the other end of its network.

use std::error::Error;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use offshoot_pilot::PILOT_ELF;
use offshoot_pilot::protocol::{Reply, WireError};
use tempfile::TempDir;

pub(crate) const DISK_BYTES: u64 = 32 << 20;
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
/// Software emulation on a busy machine: far more than it ever took.
const PATIENCE: Duration = Duration::from_secs(60);

/// Any error, fit to cross threads.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// Where QEMU is, if anywhere.
pub(crate) fn qemu() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join("qemu-system-x86_64"))
        .find(|file| file.exists())
}

pub(crate) struct GuestOptions {
    /// More properties of the machine.
    pub(crate) machine: &'static str,
    pub(crate) cpus: u32,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            machine: "acpi=on",
            cpus: 1,
        }
    }
}

pub(crate) struct Guest {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    dir: TempDir,
    /// The line that it printed when it was ready.
    pub(crate) ready: String,
}

impl Guest {
    pub(crate) fn boot(qemu: &Path, options: GuestOptions) -> Result<Self, Failure> {
        let dir = tempfile::tempdir()?;
        let file = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(file("pilot"), PILOT_ELF)?;
        File::create(file("disk"))?.set_len(DISK_BYTES)?;
        let mut child = Command::new(qemu)
            .arg("-M")
            .arg(format!("microvm,accel=tcg,{}", options.machine))
            .args(["-smp", &options.cpus.to_string()])
            .args(
                "-m 128 -nodefaults -no-user-config -display none -no-reboot -serial stdio"
                    .split(' '),
            )
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .arg("-append")
            .arg("pilot.test=1")
            .arg("-drive")
            .arg(format!(
                "if=none,id=disk,format=raw,discard=unmap,file={}",
                file("disk")
            ))
            .args(["-device", "virtio-blk-device,drive=disk"])
            .arg("-netdev")
            .arg(format!(
                "stream,id=net,server=on,addr.type=unix,addr.path={}",
                file("net")
            ))
            .args([
                "-device",
                "virtio-net-device,netdev=net,mac=52:54:00:01:02:03",
            ])
            .args(["-device", "virtio-rng-device", "-device", "i8042"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", file("qmp")))
            .args(["-kernel", &file("pilot")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let (input, output) = child
            .stdin
            .take()
            .zip(child.stdout.take())
            .ok_or("no pipes")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut guest = Self {
            child,
            input,
            lines,
            dir,
            ready: String::new(),
        };
        guest.ready = guest.line()?;
        Ok(guest)
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// The next line of the console.
    pub(crate) fn line(&mut self) -> Result<String, Failure> {
        Ok(self
            .lines
            .recv_timeout(PATIENCE)
            .map_err(|error| format!("no line from the pilot: {error}"))?)
    }

    /// The next line, behind an empty one.
    pub(crate) fn line_after_blank(&mut self) -> Result<String, Failure> {
        match self.line()?.as_str() {
            "" => self.line(),
            line => Err(format!("not empty: {line}").into()),
        }
    }

    pub(crate) fn tell(&mut self, line: &str) -> io::Result<()> {
        // No faster than a 16-byte FIFO is emptied.
        for piece in line.as_bytes().chunks(256) {
            self.input.write_all(piece)?;
        }
        self.input.write_all(b"\n")
    }

    /// Sends a line and reads the answer back from its text form.
    pub(crate) fn ask(&mut self, line: &str) -> Result<Reply, Failure> {
        self.tell(line)?;
        let answer = self.line()?;
        let read = |text: &str| -> Result<Reply, WireError> { Reply::parse(text) };
        match answer.split_once(' ') {
            Some(("ok", rest)) => Ok(read(rest)?),
            Some(("error", rest)) => Ok(read(&format!("refused code={rest}"))?),
            _ => Err(format!("not an answer: {answer}").into()),
        }
    }

    /// Whether the machine ends by itself.
    pub(crate) fn ends(&mut self) -> io::Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            // Drained, so that the guest never waits for us.
            let disconnected = Err(RecvTimeoutError::Disconnected);
            if self.lines.recv_timeout(Duration::from_millis(50)) == disconnected {
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(false)
    }

    /// Gives QEMU a command and waits until it is done.
    pub(crate) fn command(&self, command: &str) -> Result<(), Failure> {
        let stream = UnixStream::connect(self.dir.path().join("qmp"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        lines.next().ok_or("no greeting")??;
        for command in [r#"{"execute":"qmp_capabilities"}"#, command] {
            (&stream).write_all(format!("{command}\n").as_bytes())?;
            loop {
                let line = lines.next().ok_or("no answer")??;
                if line.contains("\"error\"") {
                    return Err(line.into());
                }
                if line.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The other end of the network card.
    pub(crate) fn wire(&self) -> io::Result<Wire> {
        let stream = UnixStream::connect(self.dir.path().join("net"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Wire(stream))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Frames over QEMU's stream framing: a length of 4 bytes, big-endian, before each.
pub(crate) struct Wire(UnixStream);

impl Wire {
    pub(crate) fn send(&mut self, frame: &[u8]) -> Result<(), Failure> {
        let len = u32::try_from(frame.len())?;
        Ok(self
            .0
            .write_all(&[&len.to_be_bytes()[..], frame].concat())?)
    }

    pub(crate) fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        let mut len = [0; 4];
        self.0.read_exact(&mut len)?;
        let mut frame = vec![0; usize::try_from(u32::from_be_bytes(len))?];
        self.0.read_exact(&mut frame)?;
        Ok(frame)
    }

    /// Sends the next `count` frames back with the addresses swapped.
    pub(crate) fn echo_in_background(
        mut self,
        count: usize,
    ) -> io::Result<JoinHandle<Result<Self, Failure>>> {
        thread::Builder::new().spawn(move || {
            for _ in 0..count {
                let mut frame = self.receive()?;
                let (to, from) = frame.split_at_mut(6);
                to.swap_with_slice(&mut from[..6]);
                self.send(&frame)?;
            }
            Ok(self)
        })
    }
}

/// The start of an Ethernet frame.
pub(crate) fn frame(to: [u8; 6], from: [u8; 6], ethertype: u16) -> Vec<u8> {
    [&to[..], &from, &ethertype.to_be_bytes()].concat()
}

/// A frame with an IPv4 packet for the pilot.
pub(crate) fn ipv4(
    from: [u8; 6],
    protocol: u8,
    source: [u8; 4],
    target: [u8; 4],
    body: &[u8],
) -> Vec<u8> {
    let [high, low] = u16::try_from(20 + body.len())
        .unwrap_or(u16::MAX)
        .to_be_bytes();
    let mut header = vec![0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0];
    header.extend([source, target].concat());
    let sum = internet_checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&frame(MAC, from, 0x0800)[..], &header, body].concat()
}

/// RFC 1071; 0 over bytes that hold a right checksum.
pub(crate) fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
