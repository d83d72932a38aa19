//! What this process and the kernel hold in memory.

use std::fs;

use crate::failure::{Context, Failure};

/// Memory in use at one moment, in KiB.
#[derive(Debug, Clone, Copy)]
pub(super) struct Footprint {
    /// Of this process: proportional set size (`smaps_rollup`).
    pub(super) pss_kib: f64,
    /// Of the kernel, for all processes (`meminfo`): page tables, those of guests, stacks, slab that
    /// cannot be reclaimed, vmalloc.
    pub(super) kernel_kib: f64,
}

/// The lines of `/proc/meminfo` that grow with a guest and are not of any process.
const KERNEL: [&str; 5] = [
    "PageTables",
    "SecPageTables",
    "KernelStack",
    "SUnreclaim",
    "VmallocUsed",
];

impl Footprint {
    pub(super) fn now() -> Result<Self, Failure> {
        let all = read("/proc/meminfo")?;
        Ok(Self {
            pss_kib: pss("/proc/self/smaps_rollup")?,
            kernel_kib: KERNEL.iter().filter_map(|name| field(&all, name)).sum(),
        })
    }

    /// The proportional set size of another process.
    pub(super) fn of_process(pid: i32) -> Result<f64, Failure> {
        pss(&format!("/proc/{pid}/smaps_rollup"))
    }

    /// What was added since an earlier moment.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            pss_kib: self.pss_kib - before.pss_kib,
            kernel_kib: self.kernel_kib - before.kernel_kib,
        }
    }
}

fn pss(path: &str) -> Result<f64, Failure> {
    field(&read(path)?, "Pss").ok_or_else(|| Failure::new(format!("{path} does not tell the PSS")))
}

fn read(path: &str) -> Result<String, Failure> {
    fs::read_to_string(path).context(|| format!("cannot read {path}"))
}

/// The value of the line `name: VALUE kB`.
fn field(text: &str, name: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "PssDirty:  7 kB\nPss:      123 kB\n";
        assert_eq!(field(text, "Pss"), Some(123.0));
        assert_eq!(field(text, "Ps"), None);
    }

    #[test]
    fn memory_in_use_is_seen() {
        let before = Footprint::now().unwrap();
        let block = vec![1_u8; 32 << 20];
        let grown = Footprint::now().unwrap().since(before);
        assert!(
            grown.pss_kib > 30_000.0,
            "{grown:?} for {} bytes",
            block.len()
        );
    }
}
