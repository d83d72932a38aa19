//! The `offshoot` command: parsing and printing. What it does is in the libraries.
//!
//! Exit status: 0 done, 1 failed, 2 the command line is wrong.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is what a command does; the libraries print nothing"
)]

mod failure;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;

/// Virtual machines that fork like processes.
#[derive(Debug, Parser)]
#[command(name = "offshoot", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the version of the command and of the snapshot format that it writes.
    Version,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Version => version(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("offshoot: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn version() -> Result<(), Failure> {
    println!(
        "offshoot {} (snapshot format {})",
        env!("CARGO_PKG_VERSION"),
        offshoot_snapshot_format::FORMAT_VERSION
    );
    Ok(())
}
