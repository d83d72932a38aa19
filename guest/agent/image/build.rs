//! Builds the agent as it goes into guests: small, and linked with everything that it needs.

#[path = "../../inner_build.rs"]
mod inner_build;

use std::env;
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for input in [
        "../src",
        "../Cargo.toml",
        "../../protocol/src",
        "../../protocol/Cargo.toml",
        "../../inner_build.rs",
        "../../../Cargo.toml",
        "../../../Cargo.lock",
        "build.rs",
    ] {
        println!("cargo:rerun-if-changed={input}");
    }
    let agent = here.join("..").canonicalize()?;
    let flags = ["-C", "target-feature=+crt-static"];
    let built = inner_build::cargo(&agent, &out.join("agent"), "agent", &flags)?;
    let program = built.join("offshoot-agent");
    println!("cargo:rustc-env=OFFSHOOT_AGENT_IMAGE={}", program.display());
    Ok(())
}
