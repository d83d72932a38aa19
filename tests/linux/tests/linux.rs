//! Every scenario of the lab as a test. All that are wanted share one boot of the outer guest.
//!
//! One alone: `cargo test -p offshoot-lab --test linux -- bzimage_boots --exact --nocapture`.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what a test says is shown when it fails or is asked for"
)]

use std::path::Path;
use std::sync::{Mutex, OnceLock};

use offshoot_lab::report::Outcome;
use offshoot_lab::{Error, SCENARIOS};

macro_rules! scenarios {
    ($($name:ident)*) => {
        /// The scenarios that have a test.
        const TESTS: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                check(stringify!($name));
            }
        )*
    };
}

scenarios! {
    bzimage_boots
    bzimage_boots_on_four_cpus
    vmlinux_boots
    vmlinux_boots_on_four_cpus
    ends_are_told_apart
    a_guest_that_does_not_end_is_ended
    ext4_root_survives_on_copy
    ext4_root_survives_on_qcow2
    snapshot_goes_on
    snapshot_goes_on_on_four_cpus
    agent_runs_commands
    live_forks_of_linux
    vsock_over_generations
    snapshot_by_fork_under_load
}

#[test]
fn every_scenario_has_a_test() {
    assert_eq!(TESTS, SCENARIOS);
}

/// The outcomes of the scenarios that this run of the tests seems to want: those whose names
/// contain an argument, or all.
static OUTCOMES: OnceLock<Result<Vec<Outcome>, Error>> = OnceLock::new();

fn wanted() -> Vec<&'static str> {
    // Options of the test harness with a value that is no name, or the name of what not to run.
    const WITH_VALUE: [&str; 5] = [
        "--skip",
        "--test-threads",
        "--color",
        "--format",
        "--logfile",
    ];
    let mut words = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if WITH_VALUE.contains(&argument.as_str()) {
            arguments.next();
        } else if !argument.starts_with('-') {
            words.push(argument);
        }
    }
    let wanted = |name: &&str| words.is_empty() || words.iter().any(|word| name.contains(word));
    SCENARIOS.into_iter().filter(wanted).collect()
}

fn run(scenarios: &[&str], log: &str) -> Result<Vec<Outcome>, Error> {
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(log);
    println!("the outer guest's console is kept in {}", log.display());
    offshoot_lab::run(scenarios, &log)
}

fn check(scenario: &str) {
    let of = |outcomes: &Result<Vec<Outcome>, Error>| match outcomes {
        Ok(outcomes) => Ok(outcomes.iter().find(|o| o.scenario == scenario).cloned()),
        Err(Error::Missing(what)) => Err(what.clone()),
        Err(error) => panic!("the lab cannot run: {error}"),
    };
    let found = of(OUTCOMES.get_or_init(|| run(&wanted(), "lab.log")));
    let found = match found {
        // The arguments were of another kind than names: run it by itself.
        Ok(None) => {
            static ONE_BY_ONE: Mutex<()> = Mutex::new(());
            let _one = ONE_BY_ONE.lock();
            of(&run(&[scenario], &format!("{scenario}.log")))
        }
        found => found,
    };
    match found {
        Err(missing) => eprintln!("skipped: {missing}"),
        Ok(Some(outcome)) => match outcome.failure {
            None => println!("{}", outcome.log),
            Some(why) => panic!("{scenario}: {why}\n{}", outcome.log),
        },
        Ok(None) => panic!("{scenario} has no outcome"),
    }
}
