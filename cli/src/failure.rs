//! Why a command failed, as one sentence with the causes behind it.

use std::error::Error;
use std::fmt;

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    causes: Vec<String>,
}

impl Failure {
    /// A failure that nothing else caused.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            causes: Vec::new(),
        }
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
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.causes
            .iter()
            .try_for_each(|cause| write!(f, "\n  because: {cause}"))
    }
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
}
