//! The `offshoot` command: parsing and printing. What it does is in the libraries.
//!
//! Exit status: 0 done, 1 failed, 2 the command line is wrong; `offshoot run --help` lists its own.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is what a command does; the libraries print nothing"
)]

mod bench;
mod demo;
mod failure;
mod guest;
mod inspect;
mod leftovers;
mod place;
mod run;
mod verify;

use std::io::Write;
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

/// One variant a subcommand: its arguments, with a `run`, in a module of its name.
#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Demo),
    Bench(bench::Bench),
    Inspect(inspect::Inspect),
    Run(run::Run),
    Verify(verify::Verify),
    /// Print the version of the command and of the snapshot format that it writes.
    Version,
}

fn main() -> ExitCode {
    // Workers are this very program, started by whoever drives machines through `worker::Program`.
    if let Some(status) = offshoot_vmm::worker::run_if_worker(offshoot_storage::open_backend) {
        return status;
    }
    let out = &mut std::io::stdout().lock();
    let done = match Cli::parse().command {
        Command::Demo(demo) => demo.run(out),
        Command::Bench(bench) => bench.run(out),
        Command::Inspect(inspect) => inspect.run(out),
        Command::Run(run) => run.run(),
        Command::Verify(verify) => verify.run(out),
        Command::Version => version(out),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_reader_gone() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("offshoot: {failure}");
            ExitCode::from(failure.status())
        }
    }
}

fn version(out: &mut impl Write) -> Result<(), Failure> {
    writeln!(
        out,
        "offshoot {} (snapshot format {})",
        env!("CARGO_PKG_VERSION"),
        offshoot_snapshot_format::FORMAT_VERSION
    )
    .map_err(Failure::output)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
