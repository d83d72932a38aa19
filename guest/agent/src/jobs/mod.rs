//! Commands: started for a client, and remembered beyond it when asked to.

mod client;
mod output;
mod pump;
mod spawn;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use offshoot_protocol::agent::{
    DEFAULT_OUTPUT_KEPT, ErrorCode, Exec, JobId, JobInfo, Lifetime, MAX_OUTPUT_KEPT, Refusal,
    WindowSize,
};
use rustix::event::{EventfdFlags, eventfd};

pub(crate) use client::{attach, exec};

use crate::Agent;
use crate::children::Child;
use crate::failure::{Doing, refusal};
use crate::lock::lock;
use crate::{STACK, clock};
use output::{Output, Ticket};

/// Commands that run at a time.
const MAX_RUNNING: usize = 128;
/// Commands that have ended and are still remembered.
const MAX_ENDED: usize = 64;
/// Bytes of output that all commands together may keep.
const MAX_KEPT: usize = 32 << 20;
/// Bytes of a command's title.
const TITLE: usize = 256;

/// A command.
#[derive(Debug)]
pub(crate) struct Job {
    id: JobId,
    child: Arc<Child>,
    title: Vec<u8>,
    started_unix_ns: u64,
    own: AtomicBool,
    output: Output,
    input: Mutex<Option<Arc<OwnedFd>>>,
    terminal: Option<OwnedFd>,
    /// Readable once the job has been forgotten.
    forgotten: OwnedFd,
    is_forgotten: AtomicBool,
}

impl Job {
    fn info(&self) -> JobInfo {
        let (first, next) = self.output.span();
        JobInfo {
            job: self.id,
            pid: self.pid(),
            title: self.title.clone(),
            started_unix_ns: self.started_unix_ns,
            terminal: self.terminal.is_some(),
            lifetime: match self.own.load(Ordering::Acquire) {
                true => Lifetime::Own,
                false => Lifetime::Client,
            },
            first,
            next,
            exit: self.output.exit(),
        }
    }

    fn pid(&self) -> u32 {
        u32::try_from(self.child.pid()).unwrap_or_default()
    }

    fn input(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.input).clone()
    }

    fn close_input(&self) {
        lock(&self.input).take();
    }

    fn is_forgotten(&self) -> bool {
        self.is_forgotten.load(Ordering::Acquire)
    }

    fn forget(&self) {
        self.is_forgotten.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.forgotten, &1u64.to_ne_bytes());
    }
}

#[derive(Debug, Default)]
struct Table {
    jobs: BTreeMap<JobId, Arc<Job>>,
    last: u64,
}

/// All commands.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<Table>);

impl Jobs {
    /// Starts a command and the thread that looks after it; holds a place for its first reader.
    fn start(&self, agent: &Arc<Agent>, command: &Exec) -> Result<(Arc<Job>, Ticket), Refusal> {
        let kept = match command.output_kept {
            0 => DEFAULT_OUTPUT_KEPT,
            kept => kept.min(MAX_OUTPUT_KEPT),
        };
        let output = Output::new(usize::try_from(kept).unwrap_or_default().max(4 << 10));
        let mut table = lock(&self.0);
        make_room(&mut table, output.kept())?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let forgotten = eventfd(0, flags).doing("starting a command")?;
        let spawned = spawn::spawn(agent, command)?;
        table.last += 1;
        let job = Arc::new(Job {
            id: JobId(table.last),
            child: spawned.child,
            title: title(command),
            started_unix_ns: clock::unix_ns(),
            own: AtomicBool::new(command.lifetime == Lifetime::Own),
            output,
            input: Mutex::new(spawned.input.map(Arc::new)),
            terminal: spawned.terminal,
            forgotten,
            is_forgotten: AtomicBool::new(false),
        });
        let ticket = job.output.reserve(0);
        let limit = Some(command.time_limit_ms).filter(|limit| *limit > 0);
        let limit = limit.map(Duration::from_millis);
        let (of_thread, sources) = (Arc::clone(&job), spawned.sources);
        let owner = Arc::clone(agent);
        let thread = thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || pump::run(&of_thread, &owner.children, sources, limit));
        if let Err(error) = thread {
            let _ = agent.children.signal(&job.child, libc::SIGKILL, true);
            return Err(error).doing("starting a thread for the command");
        }
        table.jobs.insert(job.id, Arc::clone(&job));
        Ok((job, ticket))
    }

    /// A command by its number.
    pub(crate) fn find(&self, id: JobId) -> Result<Arc<Job>, Refusal> {
        let job = lock(&self.0).jobs.get(&id).cloned();
        job.ok_or_else(|| refusal(ErrorCode::NoJob, &format!("command {id}")))
    }

    /// All commands.
    pub(crate) fn list(&self) -> Vec<JobInfo> {
        lock(&self.0).jobs.values().map(|job| job.info()).collect()
    }

    /// How many run.
    pub(crate) fn running(&self) -> usize {
        running(&lock(&self.0))
    }

    /// Forgets a command that has ended.
    pub(crate) fn forget(&self, id: JobId) -> Result<(), Refusal> {
        let job = self.find(id)?;
        if job.output.exit().is_none() {
            return Err(refusal(ErrorCode::WrongState, "the command still runs"));
        }
        lock(&self.0).jobs.remove(&id);
        job.forget();
        Ok(())
    }

    /// Sends a signal.
    pub(crate) fn signal(
        &self,
        agent: &Agent,
        id: JobId,
        signal: u8,
        group: bool,
    ) -> Result<(), Refusal> {
        if !(1..=64).contains(&signal) {
            return Err(refusal(ErrorCode::Invalid, "a signal number is 1 to 64"));
        }
        let job = self.find(id)?;
        match agent.children.signal(&job.child, i32::from(signal), group) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(refusal(ErrorCode::WrongState, "the command has ended"))
            }
            result => result.doing("sending the signal"),
        }
    }

    /// Changes the size of a command's terminal.
    pub(crate) fn resize(&self, id: JobId, size: WindowSize) -> Result<(), Refusal> {
        match &self.find(id)?.terminal {
            Some(terminal) => spawn::resize(terminal, size).doing("resizing the terminal"),
            None => Err(refusal(ErrorCode::Invalid, "the command has no terminal")),
        }
    }

    /// In a copy of the guest the clients of its source are not there, and that is no fault of
    /// the commands: they all go on.
    pub(crate) fn outlive_clients(&self) {
        for job in lock(&self.0).jobs.values() {
            job.own.store(true, Ordering::Release);
        }
    }
}

fn running(table: &Table) -> usize {
    let jobs = table.jobs.values();
    jobs.filter(|job| job.output.exit().is_none()).count()
}

/// Forgets the oldest of too many commands that have ended; refuses one too many.
fn make_room(table: &mut Table, kept: usize) -> Result<(), Refusal> {
    let ended = |table: &Table| {
        let mut jobs = table.jobs.values();
        jobs.find(|job| job.output.exit().is_some())
            .map(|job| job.id)
    };
    let held = |table: &Table| {
        table
            .jobs
            .values()
            .map(|job| job.output.kept())
            .sum::<usize>()
    };
    while table.jobs.len() - running(table) >= MAX_ENDED || held(table) + kept > MAX_KEPT {
        match ended(table).and_then(|oldest| table.jobs.remove(&oldest)) {
            Some(job) => job.forget(),
            None => break,
        }
    }
    if running(table) >= MAX_RUNNING {
        return Err(refusal(ErrorCode::Busy, "too many commands run"));
    }
    if held(table) + kept > MAX_KEPT {
        return Err(refusal(
            ErrorCode::Busy,
            "the commands keep too much output",
        ));
    }
    Ok(())
}

fn title(command: &Exec) -> Vec<u8> {
    let mut title = command.argv.join(b" ".as_slice());
    title.truncate(TITLE);
    title
}
