//! Figures of the guest, from /proc and statvfs.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use offshoot_protocol::agent::{Disk, Memory, Metrics, Refusal};
use rustix::time::{ClockId, clock_gettime};

use crate::failure::Doing;
use crate::{Agent, clock};

/// Collects everything.
pub(crate) fn collect(agent: &Agent, paths: &[Vec<u8>]) -> Result<Metrics, Refusal> {
    let meminfo = fs::read_to_string("/proc/meminfo").doing("reading /proc/meminfo")?;
    let loadavg = fs::read_to_string("/proc/loadavg").doing("reading /proc/loadavg")?;
    let mut words = loadavg.split_ascii_whitespace();
    let load_milli = words.by_ref().take(3).filter_map(milli).collect();
    let (running, tasks) = words
        .next()
        .and_then(|word| word.split_once('/'))
        .unwrap_or_default();
    let root = [b"/".to_vec()];
    let paths = if paths.is_empty() { &root } else { paths };
    let cpus = std::thread::available_parallelism().map_or(0, |cpus| cpus.get());
    Ok(Metrics {
        uptime_ms: uptime_ms(),
        unix_ns: clock::unix_ns(),
        memory: memory(&meminfo),
        load_milli,
        cpus: u32::try_from(cpus).unwrap_or_default(),
        tasks: tasks.parse().unwrap_or_default(),
        running: running.parse().unwrap_or_default(),
        jobs: u32::try_from(agent.jobs.running()).unwrap_or_default(),
        disks: paths
            .iter()
            .map(|path| disk(path))
            .collect::<Result<_, _>>()?,
    })
}

fn uptime_ms() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanos = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds
        .saturating_mul(1000)
        .saturating_add(nanos / 1_000_000)
}

/// `12.34` as 12340.
fn milli(word: &str) -> Option<u32> {
    let (whole, part) = word.split_once('.')?;
    let part: u32 = format!("{part:0<3}").get(..3)?.parse().ok()?;
    whole
        .parse::<u32>()
        .ok()?
        .checked_mul(1000)?
        .checked_add(part)
}

fn memory(meminfo: &str) -> Memory {
    let bytes = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
        let kib = kib.and_then(|kib| kib.trim().parse::<u64>().ok());
        kib.unwrap_or_default().saturating_mul(1024)
    };
    Memory {
        total: bytes("MemTotal:"),
        available: bytes("MemAvailable:"),
        free: bytes("MemFree:"),
        cached: bytes("Cached:"),
        swap_total: bytes("SwapTotal:"),
        swap_free: bytes("SwapFree:"),
    }
}

fn disk(path: &[u8]) -> Result<Disk, Refusal> {
    let at = Path::new(std::ffi::OsStr::from_bytes(path));
    let figures = rustix::fs::statvfs(at).doing("looking at the file system")?;
    Ok(Disk {
        path: path.to_vec(),
        size: figures.f_blocks.saturating_mul(figures.f_frsize),
        available: figures.f_bavail.saturating_mul(figures.f_frsize),
        files: figures.f_files,
        files_free: figures.f_favail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_thousandths() {
        let loads = ["0.00", "1.5", "12.34", "0.05", "x", "1", "9999999999.0"].map(milli);
        assert_eq!(
            loads,
            [Some(0), Some(1500), Some(12340), Some(50), None, None, None]
        );
    }

    #[test]
    fn memory_is_in_bytes() {
        let memory = memory("MemTotal:  16 kB\nMemFree: 8 kB\nSwapCached: 4 kB\nCached: 2 kB\n");
        assert_eq!(
            (memory.total, memory.free, memory.cached),
            (16384, 8192, 2048)
        );
        assert_eq!(memory.available, 0);
    }
}
