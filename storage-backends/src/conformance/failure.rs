//! What a case found.

use std::fmt;
use std::panic::Location;

use crate::{Error, ErrorKind};

/// A promise that was not kept: what was seen, where in the suite, and the error behind it if an
/// operation failed that must not.
#[derive(Debug)]
pub struct Failure {
    finding: String,
    at: &'static Location<'static>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Failure {
    /// A finding.
    #[track_caller]
    pub(crate) fn new(finding: impl Into<String>) -> Self {
        Self {
            finding: finding.into(),
            at: Location::caller(),
            source: None,
        }
    }

    #[track_caller]
    fn unexpected(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            finding: "an operation failed that must not".into(),
            at: Location::caller(),
            source: Some(source.into()),
        }
    }

    /// Says more about when it happened.
    pub(crate) fn during(mut self, when: impl fmt::Display) -> Self {
        self.finding = format!("{when}: {}", self.finding);
        self
    }
}

impl From<Error> for Failure {
    #[track_caller]
    fn from(e: Error) -> Self {
        Self::unexpected(e)
    }
}

impl From<std::io::Error> for Failure {
    #[track_caller]
    fn from(e: std::io::Error) -> Self {
        Self::unexpected(e)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}:{})",
            self.finding,
            self.at.file(),
            self.at.line()
        )?;
        // A report is read as text, so the causes are part of it.
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// Fails unless `holds`.
#[track_caller]
pub(crate) fn ensure(holds: bool, otherwise: impl fmt::Display) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::new(otherwise.to_string()))
    }
}

/// Fails unless `result` is a refusal of that kind.
#[track_caller]
pub(crate) fn refused<T>(
    result: Result<T, Error>,
    kind: ErrorKind,
    what: impl fmt::Display,
) -> Result<(), Failure> {
    match result {
        Ok(_) => Err(Failure::new(format!(
            "{what} was done, not refused as {kind:?}"
        ))),
        Err(e) if e.kind() == kind => Ok(()),
        Err(e) => {
            let finding = format!("{what} was refused as {:?}, not as {kind:?}", e.kind());
            Err(Failure {
                source: Some(e.into()),
                ..Failure::new(finding)
            })
        }
    }
}
