//! Commands to run, and running them to their end.

use std::thread;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::{EndState, EnvVar, Exec, Lifetime, User, WindowSize};

use super::Agent;
use super::process::Event;
use crate::{Error, ErrorKind};

/// A command, to be run by [`Agent::run`] or [`Agent::start`]. It gets a session and process
/// group of its own, the agent's environment defaults, and an empty standard input unless
/// [`input`](Self::input) is called.
#[derive(Debug, Clone)]
pub struct Command {
    pub(super) exec: Exec,
}

impl Command {
    /// A program with its arguments. Without `/` it is looked for in `PATH`.
    pub fn new<A: Into<Vec<u8>>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            exec: Exec {
                argv: argv.into_iter().map(Into::into).collect(),
                cwd: None,
                env: Vec::new(),
                clean_env: false,
                user: None,
                terminal: None,
                input: false,
                time_limit_ms: 0,
                output_kept: 0,
                lifetime: Lifetime::Client,
            },
        }
    }

    /// A line for `/bin/sh`.
    pub fn shell(script: impl Into<Vec<u8>>) -> Self {
        Self::new([b"/bin/sh".to_vec(), b"-c".to_vec(), script.into()])
    }

    /// Its working directory, instead of the user's home.
    #[must_use]
    pub fn cwd(mut self, path: impl Into<Vec<u8>>) -> Self {
        self.exec.cwd = Some(path.into());
        self
    }

    /// A variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        self.exec.env.push(EnvVar {
            name: name.into(),
            value: Some(value.into()),
        });
        self
    }

    /// Takes a variable of the agent's defaults away.
    #[must_use]
    pub fn without_env(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.exec.env.push(EnvVar {
            name: name.into(),
            value: None,
        });
        self
    }

    /// Leaves out all of the agent's defaults.
    #[must_use]
    pub fn clean_env(mut self) -> Self {
        self.exec.clean_env = true;
        self
    }

    /// Runs it as a user of the guest, in all his groups.
    #[must_use]
    pub fn user(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.exec.user = Some(User::Name(name.into()));
        self
    }

    /// Runs it under a user and a group number.
    #[must_use]
    pub fn ids(mut self, uid: u32, gid: u32) -> Self {
        self.exec.user = Some(User::Ids { uid, gid });
        self
    }

    /// Gives it a terminal of this size; what it writes then all comes as standard output.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.exec.terminal = Some(WindowSize { rows, columns });
        self
    }

    /// Gives it a standard input that can be written to.
    #[must_use]
    pub fn input(mut self) -> Self {
        self.exec.input = true;
        self
    }

    /// Has its process group killed after this time.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        let millis = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.exec.time_limit_ms = millis.max(1);
        self
    }

    /// How many bytes of its newest output are kept for [`Agent::attach`].
    #[must_use]
    pub fn keep_output(mut self, bytes: u32) -> Self {
        self.exec.output_kept = bytes;
        self
    }

    /// Lets it live on when its client is lost; it is remembered until [`Agent::forget`].
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.exec.lifetime = Lifetime::Own;
        self
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exit {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// It was killed because its time limit had passed.
    pub timed_out: bool,
}

impl Exit {
    /// It ended by itself with code 0.
    #[must_use]
    pub fn success(self) -> bool {
        self.code == Some(0)
    }
}

impl From<offshoot_protocol::agent::Exit> for Exit {
    fn from(exit: offshoot_protocol::agent::Exit) -> Self {
        let (code, signal) = match exit.state {
            EndState::Signal => (None, Some(exit.value)),
            _ => (Some(exit.value), None),
        };
        Self {
            code,
            signal,
            timed_out: exit.timed_out,
        }
    }
}

/// What a command wrote, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Agent {
    /// Runs a command to its end with this standard input, and collects at most `most` bytes of
    /// output. Given up before its end, it is killed unless it is detached.
    ///
    /// # Errors
    /// `TooLarge` when it writes more than that; `NotFound` when there is no such program.
    pub fn run(
        &self,
        command: &Command,
        input: &[u8],
        most: usize,
        deadline: Instant,
    ) -> Result<Output, Error> {
        let mut command = command.clone();
        command.exec.input |= !input.is_empty();
        let process = self.start(&command, deadline)?;
        let mut writer = process.input();
        let has_input = command.exec.input || command.exec.terminal.is_some();
        // The guest may want to be read from before it takes all of its input.
        thread::scope(|scope| {
            let writing = thread::Builder::new().spawn_scoped(scope, move || {
                // Input that nobody wants is not an error of the command's.
                if has_input && writer.write(input, deadline).is_ok() {
                    let _ = writer.end(deadline);
                }
            });
            let result = writing
                .map_err(|error| Error::because(ErrorKind::Host, "run a command", error))
                .and_then(|_| collect(&process, most, deadline));
            // Wakes the writer.
            process.hang_up();
            result
        })
    }
}

fn collect(process: &super::Process, most: usize, deadline: Instant) -> Result<Output, Error> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let (to, bytes) = match process.next(deadline)? {
            Event::Stdout(bytes) => (&mut stdout, bytes),
            Event::Stderr(bytes) => (&mut stderr, bytes),
            Event::Exited(exit) => {
                return Ok(Output {
                    exit,
                    stdout,
                    stderr,
                });
            }
        };
        to.extend(bytes);
        if stdout.len().saturating_add(stderr.len()) > most {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "collect a command's output",
            ));
        }
    }
}
