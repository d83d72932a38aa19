//! The `offshoot` command, as a user runs it.

use std::process::{Command, Stdio};

use crate::Failure;

/// What `offshoot run` did.
pub(crate) struct Ran {
    /// Its exit status.
    pub(crate) status: i32,
    /// The guest's console.
    pub(crate) console: String,
    /// What it said itself.
    pub(crate) said: String,
}

/// Longer than a boot takes on a busy machine, in seconds.
const PATIENCE: u32 = 40;

/// Runs `offshoot run` and shows what it printed. `task` is what the guest's first program does.
pub(crate) fn run(kernel: &str, task: &str, more: &[&str]) -> Result<Ran, Failure> {
    run_for(PATIENCE, kernel, task, more)
}

/// As [`run`], for so many seconds.
pub(crate) fn run_for(
    seconds: u32,
    kernel: &str,
    task: &str,
    more: &[&str],
) -> Result<Ran, Failure> {
    let command_line = format!("{} lab={task}", crate::COMMAND_LINE);
    let output = Command::new("/bin/offshoot")
        .args(["run", "--timeout", &seconds.to_string()])
        .args(["--kernel", kernel, "--initrd", crate::INITRD])
        .args(["--cmdline", &command_line, "--cpu", &crate::CPU.to_string()])
        .args(more)
        .stdin(Stdio::null())
        .output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\r', "");
    let ran = Ran {
        status: output.status.code().ok_or("offshoot was killed")?,
        console: text(&output.stdout),
        said: text(&output.stderr),
    };
    println!(
        "$ offshoot run --kernel {kernel} … lab={task} {}",
        more.join(" ")
    );
    for line in ran.console.lines().chain(ran.said.lines()) {
        println!("  {line}");
    }
    println!("  exit status {}", ran.status);
    Ok(ran)
}

impl Ran {
    /// Fails unless the exit status is this and the one sentence holds `word`.
    pub(crate) fn ended(self, status: i32, word: &str) -> Result<Self, Failure> {
        if self.status != status {
            return Err(format!("exit status {}, not {status}", self.status).into());
        }
        if !self.said.contains(word) {
            return Err(format!("offshoot does not say {word:?}: {:?}", self.said).into());
        }
        Ok(self)
    }

    /// Fails unless the guest printed `text`.
    pub(crate) fn printed(self, text: &str) -> Result<Self, Failure> {
        if self.console.contains(text) {
            Ok(self)
        } else {
            Err(format!("the guest did not print {text:?}").into())
        }
    }
}
