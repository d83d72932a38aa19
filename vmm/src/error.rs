//! The one error of this crate.

use std::borrow::Cow;
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong; match on this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no usable `/dev/kvm`, or no permission to use it.
    NoKvm,
    /// This host's KVM or processor lacks something that is needed.
    Unsupported,
    /// The machine's configuration asks for something that cannot be.
    Config,
    /// The kernel, its initrd or its command line cannot be booted.
    Boot,
    /// The host resources that were brought do not fit the machine.
    Bindings,
    /// A saved state is damaged or hostile.
    BadState,
    /// A saved state is fine and does not fit this host.
    Mismatch,
    /// A device could not be made, stopped or started.
    Device,
    /// No space is left where a snapshot is written.
    StorageFull,
    /// A disk's storage failed.
    Storage,
    /// The machine has ended; what was asked for needs a live one.
    Ended,
    /// A worker did not answer in time.
    TimedOut,
    /// KVM or the operating system refused.
    System,
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// An operation on a machine that failed: what was being done, and why it failed.
pub struct Error {
    kind: ErrorKind,
    context: Cow<'static, str>,
    source: Option<Source>,
}

/// The result of most operations here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with nothing beneath it. `context` is one sentence without a full stop that says
    /// what is wrong and, where there is something, what to do.
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error caused by `source`.
    pub fn because(
        kind: ErrorKind,
        context: impl Into<Cow<'static, str>>,
        source: impl Into<Source>,
    ) -> Self {
        Self {
            kind,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// An operating system error; a full disk is told apart.
    pub fn io(context: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::StorageFull,
            _ => ErrorKind::System,
        };
        Self::because(kind, context, source)
    }

    /// What kind of error this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.context)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// Says what a system or KVM call was for.
pub(crate) trait Context<T> {
    /// Wraps the error as [`ErrorKind::System`].
    fn context(self, context: &'static str) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn context(self, context: &'static str) -> Result<T> {
        self.map_err(|e| Error::io(context, io::Error::from_raw_os_error(e.errno())))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, context: &'static str) -> Result<T> {
        self.map_err(|e| Error::io(context, e))
    }
}
