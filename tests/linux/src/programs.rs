//! Our own programs that go into the guests, built as they are shipped.

use std::path::PathBuf;
use std::process::Command;

use crate::{Error, io_error};

/// Where they were built.
#[derive(Debug, Default)]
pub(crate) struct Programs {
    /// The `offshoot` command.
    pub(crate) offshoot: PathBuf,
    /// Runs scenarios in the outer guest.
    pub(crate) inside: PathBuf,
    /// Runs in the inner guest.
    pub(crate) guest: PathBuf,
}

/// Builds them optimised, for they run emulated; where nothing has changed this takes a moment.
pub(crate) fn build() -> Result<Programs, Error> {
    let output = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "--bins"])
        .args(["--message-format", "json-render-diagnostics"])
        .args(["-p", "offshoot-cli", "-p", "offshoot-lab"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .map_err(io_error("cannot run cargo"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::Program(format!("cargo build failed:\n{said}")));
    }
    let mut programs = Programs::default();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let Some(path) = message["executable"].as_str() else {
            continue;
        };
        match message["target"]["name"].as_str() {
            Some("offshoot") => programs.offshoot = path.into(),
            Some("lab-inside") => programs.inside = path.into(),
            Some("lab-guest") => programs.guest = path.into(),
            _ => {}
        }
    }
    Ok(programs)
}
