//! The emulated machine that the outer guest runs on.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, io_error};

const QEMU: &str = "qemu-system-x86_64";
/// A processor with AMD's virtualisation and nested paging: TCG emulates both. One processor: with
/// two, about one boot of an inner guest in twenty hung or ended in a triple fault. Where it could
/// be looked at, its only vCPU waited for a spinlock of its own, taken by code that an interrupt
/// had come into although it had switched interrupts off.
const MACHINE: &str = "-M q35 -accel tcg,thread=multi -cpu EPYC,+svm,+npt -smp 1 -m 3072 \
                       -nodefaults -no-user-config -nographic -no-reboot -serial stdio";
/// It ends in a triple fault when it panics, and QEMU with it. Its clock is the TSC, as on a host
/// of iron, where it is invariant: KVM then gives the inner guest a stable clock.
const COMMAND_LINE: &str = "console=ttyS0 reboot=t panic=-1 quiet tsc=reliable";

pub(crate) fn find() -> Result<PathBuf, Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(QEMU))
        .find(|file| file.exists())
        .ok_or_else(|| {
            Error::Missing(format!(
                "{QEMU} is not installed (Debian package qemu-system-x86)"
            ))
        })
}

/// Boots the outer guest and lets it run `scenarios`; returns what it printed, which `log` gets as
/// it comes. After `patience` it is stopped.
pub(crate) fn run(
    qemu: &Path,
    kernel: &Path,
    initrd: &Path,
    scenarios: &[&str],
    patience: Duration,
    log: &mut File,
) -> Result<String, Error> {
    let mut child = Command::new(qemu)
        .args(MACHINE.split_whitespace())
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        .arg(format!("{COMMAND_LINE} lab={}", scenarios.join(",")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(io_error("cannot start QEMU"))?;
    let output = child.stdout.take();
    let (sender, console) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut bytes = [0; 4096];
        let mut output = output?;
        while let Ok(length @ 1..) = output.read(&mut bytes) {
            sender.send(bytes[..length].to_vec()).ok()?;
        }
        Some(())
    });
    let deadline = Instant::now() + patience;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut text = Vec::new();
    let mut kept = Ok(());
    // Ends with QEMU's end of the pipe, or at the deadline.
    while let Ok(bytes) = console.recv_timeout(left()) {
        kept = kept.and_then(|()| log.write_all(&bytes));
        text.extend(bytes);
    }
    // It has ended already, or is to.
    let _ = child.kill();
    child.wait().map_err(io_error("cannot wait for QEMU"))?;
    let _ = reader.join();
    kept.map_err(io_error("cannot keep the console"))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
