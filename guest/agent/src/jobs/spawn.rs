//! From a request to a process.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Stdio};
use std::sync::Arc;

use offshoot_protocol::agent::{ErrorCode, Exec, RawKind, Refusal, WindowSize};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::pump::Source;
use crate::Agent;
use crate::children::Child;
use crate::failure::{Doing, refusal};
use crate::sys;
use crate::users::Account;

/// A process that was started, and the agent's ends of its streams.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) child: Arc<Child>,
    pub(super) sources: Vec<Source>,
    pub(super) input: Option<OwnedFd>,
    pub(super) terminal: Option<OwnedFd>,
}

/// Sets the size of a terminal.
pub(super) fn resize(terminal: impl AsFd, size: WindowSize) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size)
}

pub(super) fn spawn(agent: &Agent, exec: &Exec) -> Result<Spawned, Refusal> {
    let mut argv = exec.argv.iter();
    let Some(program) = argv.next().filter(|program| !program.is_empty()) else {
        return Err(refusal(ErrorCode::Invalid, "a command without a program"));
    };
    let account = exec.user.as_ref().map(Account::find).transpose()?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command.args(argv.map(|argument| OsStr::from_bytes(argument)));
    set_environment(&mut command, agent, exec, account.as_ref())?;
    let home = account
        .as_ref()
        .map_or(OsStr::new("/"), |account| &account.home);
    match &exec.cwd {
        Some(cwd) => command.current_dir(OsStr::from_bytes(cwd)),
        // A home that does not exist is no reason not to run.
        None if File::open(home).is_ok() => command.current_dir(home),
        None => command.current_dir("/"),
    };
    let rights = account.map(|account| account.rights);
    match exec.terminal {
        Some(size) => with_terminal(agent, command, size, rights),
        None => with_pipes(agent, command, exec.input, rights),
    }
}

fn with_pipes(
    agent: &Agent,
    mut command: Command,
    input: bool,
    rights: Option<sys::Rights>,
) -> Result<Spawned, Refusal> {
    command
        .stdin(if input { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    sys::set_apart(&mut command, false, rights);
    let (mut process, child) = agent
        .children
        .spawn(&mut command)
        .doing("starting the program")?;
    let out = process.stdout.take().map(OwnedFd::from);
    let err = process.stderr.take().map(OwnedFd::from);
    let sources = [(RawKind::Stdout, out), (RawKind::Stderr, err)];
    Ok(Spawned {
        child,
        sources: sources
            .into_iter()
            .filter_map(|(stream, fd)| Some(Source { stream, fd: fd? }))
            .collect(),
        input: process.stdin.take().map(OwnedFd::from),
        terminal: None,
    })
}

fn with_terminal(
    agent: &Agent,
    mut command: Command,
    size: WindowSize,
    rights: Option<sys::Rights>,
) -> Result<Spawned, Refusal> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags).doing("opening a terminal")?;
    grantpt(&terminal).doing("opening a terminal")?;
    unlockpt(&terminal).doing("opening a terminal")?;
    let far = ioctl_tiocgptpeer(&terminal, flags).doing("opening a terminal")?;
    resize(&terminal, size).doing("setting the terminal's size")?;
    if let Some(rights) = &rights {
        // As login does: the user may reopen the terminal by name.
        let owner = Some(rights.uid);
        rustix::fs::fchown(&far, owner, None).doing("giving the terminal away")?;
    }
    let copy = |fd: &OwnedFd| fd.try_clone().doing("opening a terminal");
    command.stdin(copy(&far)?).stdout(copy(&far)?).stderr(far);
    sys::set_apart(&mut command, true, rights);
    let (_, child) = agent
        .children
        .spawn(&mut command)
        .doing("starting the program")?;
    Ok(Spawned {
        child,
        sources: vec![Source {
            stream: RawKind::Stdout,
            fd: copy(&terminal)?,
        }],
        input: Some(copy(&terminal)?),
        terminal: Some(terminal),
    })
}

fn set_environment(
    command: &mut Command,
    agent: &Agent,
    exec: &Exec,
    account: Option<&Account>,
) -> Result<(), Refusal> {
    command.env_clear();
    if !exec.clean_env {
        command.envs(agent.environment.all());
        if let Some(account) = account {
            command.env("HOME", &account.home);
            command
                .env("USER", &account.name)
                .env("LOGNAME", &account.name);
        }
        if exec.terminal.is_some() {
            command.env("TERM", "xterm-256color");
        }
    }
    for variable in &exec.env {
        let name = variable.name.as_slice();
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
            return Err(refusal(
                ErrorCode::Invalid,
                "the name of an environment variable",
            ));
        }
        let name = OsStr::from_bytes(name);
        match &variable.value {
            Some(value) => command.env(name, OsString::from_vec(value.clone())),
            None => command.env_remove(name),
        };
    }
    Ok(())
}
