//! Shared by the build scripts that build a program for guests: a cargo run of its own, with a
//! target directory of its own.
//!
//! No flag that the surrounding build was given (sanitizers, coverage, denied warnings, wrappers)
//! may reach it, and it needs nothing from a registry.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Variables of the surrounding build that would change the inner one.
const NOT_PASSED_ON: &[&str] = &[
    "RUSTFLAGS",
    "RUSTDOCFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_ENCODED_RUSTDOCFLAGS",
    "CARGO_TARGET_DIR",
    "CARGO_INCREMENTAL",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
    "MFLAGS",
    "CLIPPY_ARGS",
    "LLVM_PROFILE_FILE",
];
/// … and families of them.
const PREFIXES_NOT_PASSED_ON: &[&str] = &[
    "CARGO_BUILD_",
    "CARGO_TARGET_",
    "CARGO_PROFILE_",
    "CARGO_PKG_",
    "CARGO_CFG_",
    "CARGO_FEATURE_",
];

/// The only target there is.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the package in `source` and returns the directory that its program lies in.
pub(crate) fn cargo(
    source: &Path,
    target_dir: &Path,
    profile: &str,
    flags: &[&str],
) -> Result<PathBuf, Box<dyn Error>> {
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .args(["build", "--profile", profile, "--offline", "--quiet"])
        .args(["--target", TARGET])
        .arg("--manifest-path")
        .arg(source.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        // Configuration files are looked for from here upwards: not from the caller's directory.
        .current_dir(source);
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let unwanted = NOT_PASSED_ON.contains(&name.as_str())
            || PREFIXES_NOT_PASSED_ON
                .iter()
                .any(|prefix| name.starts_with(prefix));
        if unwanted {
            cargo.env_remove(name);
        }
    }
    // Set, even if empty: neither a variable nor a configuration file adds flags then.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cargo.env("RUSTC", env::var("RUSTC")?);

    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("building {} failed: {status}", source.display()).into());
    }
    Ok(target_dir.join(TARGET).join(profile))
}
