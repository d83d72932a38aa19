//! The conformance suite: what every backend must pass, ours and yours alike.
//!
//! One call in one test of the backend's own crate:
//!
//! ```no_run
//! # fn my_backend(_: &std::path::Path) -> Result<std::sync::Arc<dyn offshoot_storage::StorageBackend>, offshoot_storage::Error> { todo!() }
//! use offshoot_storage::conformance::{self, Options};
//!
//! let report = conformance::run(&my_backend, "/tmp/empty-directory".as_ref(), &Options::default());
//! println!("{report}");
//! assert!(report.passed());
//! ```
//!
//! Each case gets a directory of its own beneath the given one, opens the backend there (several
//! times, as a store is opened again after a crash or by another process), and returns what it
//! found instead of panicking. Nothing depends on the clock or on chance: the random operations
//! come from [`Options::seed`], which is part of every failure.

mod cases;
mod concurrency;
mod failure;
mod model;
mod pattern;
mod rng;
mod sharing;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use failure::Failure;
pub(crate) use failure::{ensure, refused};
pub(crate) use rng::Rng;

use crate::{Error, StorageBackend};

/// How the suite opens a backend on a directory. Two backends opened on one directory are two
/// views of one store, also at the same time.
pub type Open<'a> = dyn Fn(&Path) -> Result<Arc<dyn StorageBackend>, Error> + Sync + 'a;

/// How much to do.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Where the random operations come from.
    pub seed: u64,
    /// How many random operations are compared with the model.
    pub operations: u32,
    /// How many threads work at once where threads matter.
    pub threads: u32,
    /// Run only the cases whose name contains this.
    pub only: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0x0ff5_4007,
            operations: 4000,
            threads: 4,
            only: None,
        }
    }
}

/// One case: a promise of the contract.
#[derive(Debug, Clone, Copy)]
struct Case {
    name: &'static str,
    run: fn(&Bench<'_>) -> Result<(), Failure>,
}

const CASES: &[Case] = &[
    Case {
        name: "sizes",
        run: cases::sizes,
    },
    Case {
        name: "names",
        run: cases::names,
    },
    Case {
        name: "reads and writes",
        run: cases::reads_and_writes,
    },
    Case {
        name: "zeroes",
        run: cases::zeroes,
    },
    Case {
        name: "filled creation",
        run: cases::filled_creation,
    },
    Case {
        name: "reopening",
        run: cases::reopening,
    },
    Case {
        name: "freezing an open volume",
        run: cases::freezing_an_open_volume,
    },
    Case {
        name: "forks of forks",
        run: sharing::forks_of_forks,
    },
    Case {
        name: "deletion",
        run: sharing::deletion,
    },
    Case {
        name: "flattening",
        run: sharing::flattening,
    },
    Case {
        name: "usage",
        run: sharing::usage,
    },
    Case {
        name: "capabilities",
        run: sharing::capabilities,
    },
    Case {
        name: "locks",
        run: concurrency::locks,
    },
    Case {
        name: "threads on one volume",
        run: concurrency::threads_on_one_volume,
    },
    Case {
        name: "threads on one store",
        run: concurrency::threads_on_one_store,
    },
    Case {
        name: "model",
        run: model::model,
    },
];

/// What a case works with.
pub(crate) struct Bench<'a> {
    open: &'a Open<'a>,
    dir: PathBuf,
    options: &'a Options,
}

impl Bench<'_> {
    /// Opens the case's store, once more if it is open already.
    pub(crate) fn open(&self) -> Result<Arc<dyn StorageBackend>, Failure> {
        (self.open)(&self.dir).map_err(Failure::from)
    }

    pub(crate) fn rng(&self) -> Rng {
        Rng::new(self.options.seed)
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    outcomes: Vec<(&'static str, Result<(), Failure>)>,
}

impl Report {
    /// Whether every case passed, and there was one.
    #[must_use]
    pub fn passed(&self) -> bool {
        !self.outcomes.is_empty() && self.failures().next().is_none()
    }

    /// The cases that failed.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, &Failure)> {
        self.outcomes
            .iter()
            .filter_map(|(name, outcome)| Some((*name, outcome.as_ref().err()?)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, outcome) in &self.outcomes {
            match outcome {
                Ok(()) => writeln!(f, "pass  {name}")?,
                Err(failure) => writeln!(f, "FAIL  {name} (seed {:#x}): {failure}", self.seed)?,
            }
        }
        Ok(())
    }
}

/// Runs the suite on the backend that `open` opens, in new directories beneath `dir`, which exists
/// and is empty. What the cases leave there is the caller's to remove.
pub fn run(open: &Open<'_>, dir: &Path, options: &Options) -> Report {
    let wanted = |case: &&Case| {
        options
            .only
            .as_ref()
            .is_none_or(|only| case.name.contains(only))
    };
    let outcomes = CASES
        .iter()
        .filter(wanted)
        .map(|case| {
            let bench = Bench {
                open,
                dir: dir.join(case.name.replace(' ', "-")),
                options,
            };
            (case.name, (case.run)(&bench))
        })
        .collect();
    Report {
        seed: options.seed,
        outcomes,
    }
}
