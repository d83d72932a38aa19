//! Becoming another guest: what a boot, restore or fork has to repair, in a fixed order, each
//! step timed and reported, a failed one no reason to leave out the next.

mod hooks;
mod settings;

use std::time::{Duration, Instant};

use offshoot_protocol::agent::{
    DEFAULT_HOOK_LIMIT_MS, Generation, Identity, MIN_SEED, Refusal, Report, Settings, Step,
    StepKind, StepResult,
};

use crate::failure::{Doing, log, refusal};
use crate::gate::Take;
use crate::{Agent, clock, sys};
use offshoot_protocol::agent::{ErrorCode, MAX_SEED};

/// What a step came to: whether there was anything to do.
type Outcome = Result<bool, Refusal>;

/// A report that is being written.
#[derive(Debug)]
struct Steps {
    started: Instant,
    steps: Vec<Step>,
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Steps {
    fn new() -> Self {
        Self {
            started: Instant::now(),
            steps: Vec::new(),
        }
    }

    fn step(&mut self, kind: StepKind, subject: &[u8], run: impl FnOnce() -> Outcome) {
        let started = Instant::now();
        let outcome = run();
        let mut step = Step {
            kind,
            subject: subject.to_vec(),
            result: StepResult::Done,
            errno: 0,
            detail: Vec::new(),
            micros: micros(started),
        };
        match outcome {
            Ok(true) => {}
            Ok(false) => step.result = StepResult::Nothing,
            Err(failure) => {
                log(format_args!("{kind}: {failure}"));
                step.result = StepResult::Failed;
                step.errno = failure.errno;
                step.detail = failure.detail;
            }
        }
        self.steps.push(step);
    }

    fn report(self, generation: Generation) -> Report {
        Report {
            generation,
            steps: self.steps,
            micros: micros(self.started),
        }
    }
}

/// Serves `Identify`, over the connection of this number. When this is called everybody else is
/// kept waiting; when it returns the agent is of the new generation.
pub(crate) fn identify(
    agent: &Agent,
    connection: u64,
    identity: &Identity,
) -> Result<Report, Refusal> {
    if identity.generation == Generation::NONE {
        return Err(refusal(
            ErrorCode::Invalid,
            "an identity needs a generation",
        ));
    }
    if identity.seed.len() > MAX_SEED {
        return Err(refusal(ErrorCode::Invalid, "the seed is too long"));
    }
    let taking = match agent.gate.take(identity.generation) {
        Take::Already(report) => return Ok(report),
        Take::Now(taking) => taking,
    };
    // First what others could see: connections of the old generation get no further answer.
    agent.jobs.outlive_clients();
    agent.server.drop_others(connection);
    let mut steps = Steps::new();
    steps.step(StepKind::Entropy, b"", || entropy(&identity.seed));
    steps.step(StepKind::Clock, b"", || match identity.unix_ns {
        0 => Ok(false),
        unix_ns => clock::step(unix_ns),
    });
    apply(agent, &mut steps, &identity.settings);
    steps.step(StepKind::Listen, b"", || {
        agent.server.listen_again().doing("listening again")?;
        Ok(true)
    });
    let limit = match identity.hook_limit_ms {
        0 => DEFAULT_HOOK_LIMIT_MS,
        limit => limit,
    };
    let deadline = Instant::now() + Duration::from_millis(u64::from(limit));
    hooks::run(agent, identity, deadline, &mut steps);
    let report = steps.report(identity.generation);
    taking.finish(&report);
    Ok(report)
}

/// Serves `Configure`.
pub(crate) fn configure(agent: &Agent, settings: &Settings) -> Report {
    let mut steps = Steps::new();
    apply(agent, &mut steps, settings);
    steps.report(agent.gate.generation())
}

fn apply(agent: &Agent, steps: &mut Steps, wanted: &Settings) {
    steps.step(StepKind::Hostname, b"", || match &wanted.hostname {
        Some(name) => settings::set_hostname(name),
        None => Ok(false),
    });
    steps.step(StepKind::MachineId, b"", || match wanted.machine_id {
        Some(id) => settings::set_machine_id(id),
        None => Ok(false),
    });
    steps.step(StepKind::Environment, b"", || {
        agent.environment.change(&wanted.env)?;
        Ok(!wanted.env.is_empty())
    });
    for link in &wanted.links {
        steps.step(StepKind::Link, &link.name, || {
            crate::net::configure(link)?;
            Ok(true)
        });
    }
    steps.step(StepKind::Resolvers, b"", || {
        match wanted.resolvers.is_empty() {
            true => Ok(false),
            false => settings::set_resolvers(&wanted.resolvers),
        }
    });
}

/// Two copies of a guest give the same random numbers until this was done in one of them.
fn entropy(seed: &[u8]) -> Outcome {
    let random = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/urandom");
    let random = random.doing("opening /dev/urandom")?;
    let random = std::os::fd::AsFd::as_fd(&random);
    if seed.len() < MIN_SEED {
        return Err(refusal(ErrorCode::Invalid, "the seed is too short"));
    }
    for part in seed.chunks(sys::SEED_PART) {
        sys::add_entropy(random, part).doing("adding entropy")?;
    }
    sys::reseed(random).doing("reseeding")?;
    Ok(true)
}
