//! A guest's serial console, line by line.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use crate::Failure;

/// Longer than anything that is waited for takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the Linux kernel says when it finds that something went wrong with time or interrupts.
const ALARMS: [&str; 9] = [
    "soft lockup",
    "hard LOCKUP",
    "clocksource: timekeeping watchdog",
    "as unstable because",
    "rcu: INFO",
    "BUG:",
    "WARNING: CPU",
    "nobody cared",
    "blocked for more than",
];

/// Whether the kernel complains of time or interrupts in this line.
pub(crate) fn is_alarm(line: &str) -> bool {
    ALARMS.iter().any(|alarm| line.contains(alarm))
}

/// The end that a guest writes to; it shows every line.
pub(crate) struct Sink {
    name: String,
    line: Vec<u8>,
    lines: Sender<(Instant, String)>,
}

/// The lines that were written, with the time at which each was complete.
pub(crate) struct Console {
    lines: Receiver<(Instant, String)>,
    alarms: VecDeque<String>,
}

/// A console with its two ends. `name` stands before its lines where they are shown.
pub(crate) fn console(name: &str) -> (Sink, Console) {
    let (sender, lines) = mpsc::channel();
    let sink = Sink {
        name: name.into(),
        line: Vec::new(),
        lines: sender,
    };
    let console = Console {
        lines,
        alarms: VecDeque::new(),
    };
    (sink, console)
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.line).into_owned();
                    println!("  {}: {line}", self.name);
                    self.line.clear();
                    // Nobody listens any more at the end of a scenario.
                    let _ = self.lines.send((Instant::now(), line));
                }
                b'\r' => {}
                byte => self.line.push(*byte),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// The next line that holds `text`, and when it came.
    pub(crate) fn wait(&mut self, text: &str) -> Result<(Instant, String), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (at, line) = self
                .lines
                .recv_timeout(left)
                .map_err(|_| format!("the guest did not print {text:?}"))?;
            self.look(&line);
            if line.contains(text) {
                return Ok((at, line));
            }
        }
    }

    /// Fails when the kernel has complained in any line up to now.
    pub(crate) fn no_alarm(&mut self) -> Result<(), Failure> {
        while let Ok((_, line)) = self.lines.try_recv() {
            self.look(&line);
        }
        match self.alarms.pop_front() {
            None => Ok(()),
            Some(line) => Err(format!("the guest's kernel complains: {line}").into()),
        }
    }

    fn look(&mut self, line: &str) {
        if is_alarm(line) {
            self.alarms.push_back(line.into());
        }
    }
}
