//! Builds the pilot's image from `kernel/`: for the same target as everything else, but linked
//! freestanding.

#[path = "../inner_build.rs"]
mod inner_build;

use std::env;
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for input in [
        "kernel/src",
        "kernel/Cargo.toml",
        "kernel/Cargo.lock",
        "kernel/build.rs",
        "kernel/link.ld",
        "../protocol/src",
        "../protocol/Cargo.toml",
        "../inner_build.rs",
        "build.rs",
    ] {
        println!("cargo:rerun-if-changed={input}");
    }
    let kernel = here.join("kernel");
    let built = inner_build::cargo(&kernel, &out.join("kernel"), "release", &[])?;
    let image = built.join("pilot");
    println!("cargo:rustc-env=OFFSHOOT_PILOT_IMAGE={}", image.display());
    Ok(())
}
