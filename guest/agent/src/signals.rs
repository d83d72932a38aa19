//! The main thread: takes every signal.

use std::io;
use std::process::ExitCode;

use offshoot_protocol::agent::{EndState, PowerAction};

use crate::children::{Child, End};
use crate::failure::log;
use crate::{Agent, init, sys};

/// The kernel's notice of a power failure.
const POWER: i32 = libc::SIGPWR;

/// What is taken here instead of ending the agent.
pub(crate) const HANDLED: &[i32] = &[
    libc::SIGCHLD,
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
    POWER,
];

/// Has the main thread end the agent.
pub(crate) fn leave() {
    let _ = sys::kill(
        rustix::process::getpid().as_raw_nonzero().get(),
        libc::SIGTERM,
        false,
    );
}

/// Takes signals until the end.
pub(crate) fn run(
    agent: &Agent,
    signals: &sys::Signals,
    main: Option<&Child>,
) -> io::Result<ExitCode> {
    loop {
        let signal = sys::wait_for(signals)?;
        if signal == libc::SIGCHLD {
            agent.children.reap();
            if let Some(end) = main.and_then(Child::end) {
                return finish(agent, end);
            }
        } else if let Some(main) = main {
            let _ = agent.children.signal(main, signal, false);
        } else if init::is_init() {
            let action = match signal {
                libc::SIGTERM | POWER => PowerAction::Off,
                // Control-Alt-Delete.
                libc::SIGINT => PowerAction::Reboot,
                _ => continue,
            };
            stop(agent, action);
        } else if matches!(
            signal,
            libc::SIGTERM | libc::SIGINT | libc::SIGHUP | libc::SIGQUIT
        ) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// The main command has ended.
fn finish(agent: &Agent, (state, value): End) -> io::Result<ExitCode> {
    log(format_args!("the command has ended: {state} {value}"));
    if init::is_init() {
        stop(agent, PowerAction::Off);
    }
    // As a shell has it.
    let code = match state {
        EndState::Signal => value.saturating_add(128),
        _ => value,
    };
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// Does not return where it works. The reaping goes on, by the thread that calls this.
fn stop(agent: &Agent, action: PowerAction) {
    if let Err(failure) = init::stop(agent, action) {
        log(format_args!("{failure}"));
    }
}
