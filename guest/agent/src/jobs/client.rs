//! A client of a command: output to it, input from it, and what becomes of the command when the
//! connection is lost.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use offshoot_protocol::agent::frame::MAX_RAW;
use offshoot_protocol::agent::{Exec, JobId, RawKind, Refusal, Reply};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::Job;
use super::output::{Next, Reader};
use crate::connection::{Connection, Trouble};
use crate::failure::Doing;
use crate::{Agent, STACK};

/// How long after a connection was reset an identity may come that explains it: a copy of the
/// guest has lost the connections of its source, and keeps its commands.
const GRACE: Duration = Duration::from_secs(10);
/// How long a client may take to close after the end of its command.
const FAREWELL: Duration = Duration::from_secs(2);
/// What ends the input of a terminal: Control-D.
const END_OF_TRANSMISSION: u8 = 4;

/// Serves `Exec`.
pub(crate) fn exec(
    agent: &Arc<Agent>,
    connection: &Arc<Connection>,
    command: &Exec,
) -> Result<(), Refusal> {
    let (job, ticket) = agent.jobs.start(agent, command)?;
    let reader = job.output.claim(ticket);
    let started = Reply::Started {
        job: job.id,
        pid: job.pid(),
    };
    serve(agent, connection, &job, reader, &started)?;
    // The connection that started it is gone, and the command with it.
    if !job.own.load(Ordering::Acquire) {
        job.output.settled();
        agent.jobs.forget(job.id)?;
    }
    Ok(())
}

/// Serves `Attach`.
pub(crate) fn attach(
    agent: &Arc<Agent>,
    connection: &Arc<Connection>,
    id: JobId,
    from: u64,
) -> Result<(), Refusal> {
    let job = agent.jobs.find(id)?;
    let reader = job.output.attach(from);
    let attached = Reply::Attached {
        info: job.info(),
        from: reader.place(),
    };
    serve(agent, connection, &job, reader, &attached)
}

fn serve(
    agent: &Arc<Agent>,
    connection: &Arc<Connection>,
    job: &Arc<Job>,
    reader: Reader<'_>,
    first: &Reply,
) -> Result<(), Refusal> {
    let (done, is_done) = mpsc::channel();
    let input = thread::Builder::new().stack_size(STACK).spawn({
        let (agent, connection, job) = (Arc::clone(agent), Arc::clone(connection), Arc::clone(job));
        let starts = matches!(first, Reply::Started { .. });
        let id = reader.id();
        move || {
            let end = take_input(&connection, &job);
            // The output side may be waiting for a command that says nothing more.
            job.output.detach(id);
            if starts {
                client_lost(&agent, &connection, &job, &end);
            }
            let _ = done.send(());
        }
    });
    let input = input.doing("starting a thread for the command's input")?;
    // A failure here is a lost client, which the other thread sees too.
    let told = connection
        .reply(first)
        .and_then(|()| give_output(connection, reader));
    if told.is_ok() {
        connection.finish();
        let _ = is_done.recv_timeout(FAREWELL);
    }
    connection.close();
    let _ = input.join();
    Ok(())
}

fn give_output(connection: &Connection, mut reader: Reader<'_>) -> io::Result<()> {
    loop {
        match reader.next(MAX_RAW) {
            Next::Bytes(stream, bytes) => connection.raw(stream, &bytes)?,
            Next::Exit(exit) => return connection.reply(&Reply::Exited { exit }),
            Next::Detached => return Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }
}

/// Takes frames of input until the connection ends, and says how it did.
fn take_input(connection: &Connection, job: &Job) -> Trouble {
    let mut payload = Vec::new();
    if let Err(error) = connection.set_read_timeout(None) {
        return error.into();
    }
    loop {
        let kind = match connection.frame(&mut payload) {
            Ok(kind) => kind,
            Err(trouble) => return trouble,
        };
        match RawKind::of(kind) {
            Some(RawKind::Data) => {
                // Input for a command that takes none is no reason to lose its output.
                if let Some(input) = job.input()
                    && write_input(connection, &input, &payload).is_err()
                {
                    job.close_input();
                }
            }
            Some(RawKind::End) if job.terminal.is_some() => {
                if let Some(input) = job.input() {
                    let _ = write_input(connection, &input, &[END_OF_TRANSMISSION]);
                }
            }
            Some(RawKind::End) => job.close_input(),
            _ => return Trouble::Closed,
        }
    }
}

/// Writes input as fast as the command takes it, and no longer than its client is there.
fn write_input(connection: &Connection, input: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    rustix::io::ioctl_fionbio(input, true)?;
    while !bytes.is_empty() {
        match rustix::io::write(input, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [
                    PollFd::new(input, PollFlags::OUT),
                    PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::empty()),
                ];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                let [_, of_connection] = fds;
                if !of_connection.revents().is_empty() {
                    return Ok(());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A client is gone. Its command goes with it, unless it was to outlive its client, or the client
/// was lost because this guest is a copy.
fn client_lost(agent: &Agent, connection: &Connection, job: &Job, how: &Trouble) {
    let reset =
        matches!(how, Trouble::Broken(error) if error.kind() == io::ErrorKind::ConnectionReset);
    if reset && !connection.is_superseded() {
        let before = agent.gate.generation();
        let until = Instant::now() + GRACE;
        while !job.own.load(Ordering::Acquire) && job.output.exit().is_none() {
            // Nobody is woken by a generation alone: an identity is taken in milliseconds, and
            // this wait happens once in the life of a copy.
            if agent.gate.generation() != before || Instant::now() >= until {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
    if !job.own.load(Ordering::Acquire) && !connection.is_superseded() {
        let _ = agent.children.signal(&job.child, libc::SIGKILL, true);
    }
}
