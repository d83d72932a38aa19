//! Why a command failed, as one sentence with the causes behind it.

use std::error::Error;
use std::fmt::{self, Write};
use std::io;

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    causes: Vec<String>,
    reader_gone: bool,
    status: u8,
}

/// The exit status of a command that failed, unless it documents others.
const FAILED: u8 = 1;

impl Failure {
    /// A failure that nothing else caused.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            causes: Vec::new(),
            reader_gone: false,
            status: FAILED,
        }
    }

    /// Writing to standard output failed.
    pub(crate) fn output(error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let reader_gone = error.kind() == io::ErrorKind::BrokenPipe;
        Self {
            reader_gone,
            ..Self::from(error).context("cannot write to standard output")
        }
    }

    /// Whether whoever reads standard output has enough of it (`offshoot inspect … | head`).
    pub(crate) fn is_reader_gone(&self) -> bool {
        self.reader_gone
    }

    /// The failure with another exit status than 1.
    pub(crate) fn with_status(self, status: u8) -> Self {
        Self { status, ..self }
    }

    /// What the command exits with.
    pub(crate) fn status(&self) -> u8 {
        self.status
    }

    /// Says what was being done when `self` happened.
    pub(crate) fn context(mut self, what: impl Into<String>) -> Self {
        let cause = std::mem::replace(&mut self.what, what.into());
        self.causes.insert(0, cause);
        self
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut causes = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        Self {
            what: error.to_string(),
            causes,
            reader_gone: false,
            status: FAILED,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_printable(f, &self.what)?;
        self.causes.iter().try_for_each(|cause| {
            f.write_str("\n  because: ")?;
            write_printable(f, cause)
        })
    }
}

/// Writes `text` without control characters: it may quote a path or a file's content, and must not
/// drive a terminal.
fn write_printable(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    text.chars()
        .try_for_each(|c| f.write_char(if c.is_control() { ' ' } else { c }))
}

/// Says what was being done when a result failed.
pub(crate) trait Context<T> {
    /// The value, or the failure with `what` before it.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<Failure>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| error.into().context(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_the_sentence_in_order() {
        let inner = std::io::Error::other("disk on fire");
        let failure = Err::<(), _>(inner).context(|| "cannot read the manifest".into());
        let failure = failure.context(|| "cannot load snap-1".into()).unwrap_err();
        let expected =
            "cannot load snap-1\n  because: cannot read the manifest\n  because: disk on fire";
        assert_eq!(failure.to_string(), expected);
        assert_eq!(Failure::new("no").to_string(), "no");
    }

    #[test]
    fn nothing_in_a_failure_drives_a_terminal() {
        let failure = Failure::new("no file a\u{1b}[2J\nb").context("cannot \r");
        let expected = "cannot  \n  because: no file a [2J b";
        assert_eq!(failure.to_string(), expected);
    }

    #[test]
    fn only_standard_output_can_lose_its_reader() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(Failure::output(broken()).is_reader_gone());
        assert!(!Failure::from(broken()).is_reader_gone());
        assert!(!Failure::output(io::Error::other("full")).is_reader_gone());
    }
}
