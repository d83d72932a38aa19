//! Builds the pilot's image from `kernel/`, with a toolchain and flags of its own.
//!
//! The image is compiled for the same target as everything else but linked freestanding, so no
//! flag that the surrounding build was given (sanitizers, coverage, denied warnings, wrappers)
//! may reach it. The inner build needs nothing from a registry.

use std::env;
use std::error::Error;
use std::path::PathBuf;
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

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let kernel = here.join("kernel");
    for input in [
        "kernel/src",
        "kernel/Cargo.toml",
        "kernel/Cargo.lock",
        "kernel/build.rs",
        "kernel/link.ld",
    ] {
        println!("cargo:rerun-if-changed={input}");
    }
    println!("cargo:rerun-if-changed=../protocol/src");
    println!("cargo:rerun-if-changed=build.rs");

    let target_dir = out.join("kernel");
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .args([
            "build",
            "--release",
            "--offline",
            "--quiet",
            "--target",
            TARGET,
        ])
        .arg("--manifest-path")
        .arg(kernel.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        // Configuration files are looked for from here upwards: not from the caller's directory.
        .current_dir(&kernel);
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
    // Set, and empty: neither a variable nor a configuration file adds flags then.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "");
    cargo.env("RUSTC", env::var("RUSTC")?);

    let status = cargo.status()?;
    if !status.success() {
        return Err(format!(
            "building the pilot's image in {} failed: {status}",
            kernel.display()
        )
        .into());
    }
    let image = target_dir.join(TARGET).join("release").join("pilot");
    println!("cargo:rustc-env=OFFSHOOT_PILOT_IMAGE={}", image.display());
    Ok(())
}
