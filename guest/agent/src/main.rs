//! The agent: runs in a Linux guest, as its init or below one, and does what the host asks over
//! vsock: commands, files, figures, and a new identity after each fork. `docs/agent.md` has the
//! whole of it.
//!
//! ```text
//! offshoot-agent [--listen vsock:PORT|unix:PATH] [-- COMMAND [ARGUMENT…]]
//! ```
//! A command gets the signals that the agent gets, and its end is the end: of the guest where the
//! agent is init, else of the agent, with its code.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        reason = "a test fails by panicking"
    )
)]

mod children;
mod clock;
mod connection;
mod environment;
mod failure;
mod files;
mod gate;
mod identity;
mod init;
mod jobs;
mod lock;
mod metrics;
mod net;
mod serve;
mod server;
mod signals;
mod sys;
mod users;

use std::env;
use std::ffi::OsString;
use std::io;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::thread;

use failure::log;
use server::{Address, Server};

/// Stack of a thread: nothing here recurses, and buffers are on the heap.
const STACK: usize = 128 << 10;

/// Everything that the agent's threads share.
#[derive(Debug)]
struct Agent {
    gate: gate::Gate,
    server: Server,
    children: children::Children,
    jobs: jobs::Jobs,
    environment: environment::Environment,
}

/// What the command line says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    listen: Address,
    command: Vec<OsString>,
}

impl Options {
    /// Reads the arguments. As init it gets words of the kernel's command line, which are not
    /// meant for it: those it does not know are passed over.
    fn parse(arguments: impl IntoIterator<Item = OsString>, is_init: bool) -> Result<Self, String> {
        let mut options = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                options.command = arguments.collect();
                break;
            } else if argument == "--listen" {
                let address = arguments.next().unwrap_or_default();
                options.listen = address.to_string_lossy().parse()?;
            } else if !is_init {
                return Err(format!("unknown argument {}", argument.to_string_lossy()));
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    sys::keep_heap_small();
    sys::keep_descriptors();
    let is_init = init::is_init();
    let options = match Options::parse(env::args_os().skip(1), is_init) {
        Ok(options) => options,
        Err(error) => {
            log(format_args!("{error}"));
            log(format_args!(
                "usage: [--listen vsock:PORT|unix:PATH] [-- COMMAND…]"
            ));
            return ExitCode::from(2);
        }
    };
    if is_init {
        init::set_up();
    }
    match run(options) {
        Ok(code) => code,
        Err(error) => {
            log(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> io::Result<ExitCode> {
    // Before any thread: what is blocked here is blocked in all of them.
    let signals = sys::block(signals::HANDLED)?;
    let agent = Arc::new(Agent {
        gate: gate::Gate::default(),
        server: Server::new(options.listen)?,
        children: children::Children::default(),
        jobs: jobs::Jobs::default(),
        environment: environment::Environment::default(),
    });
    let main = match options.command.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments).envs(agent.environment.all());
            Some(agent.children.spawn(&mut command)?.1)
        }
        None => None,
    };
    let server = Arc::clone(&agent);
    thread::Builder::new().stack_size(STACK).spawn(move || {
        // Without a port there still is an init to be.
        if let Err(error) = server.server.run(&server) {
            log(format_args!("listening: {error}"));
            if !init::is_init() {
                signals::leave();
            }
        }
    })?;
    signals::run(&agent, &signals, main.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str], is_init: bool) -> Result<Options, String> {
        Options::parse(words.iter().map(OsString::from), is_init)
    }

    #[test]
    fn options_are_few_and_strict_except_for_an_init() {
        let options = parse(&["--listen", "unix:/x", "--", "a", "--listen"], false).unwrap();
        assert_eq!(options.listen, Address::Unix("/x".into()));
        assert_eq!(options.command, ["a", "--listen"]);
        assert!(parse(&["quiet"], false).is_err() && parse(&["--listen"], false).is_err());
        assert_eq!(parse(&["quiet", "splash"], true), Ok(Options::default()));
    }
}
