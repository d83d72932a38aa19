//! Errors on their way to becoming a refusal.

use std::fmt;
use std::io::{self, Write};

use offshoot_protocol::agent::{ErrorCode, Refusal};
use rustix::io::Errno;

/// A refusal without an error number.
pub(crate) fn refusal(code: ErrorCode, detail: &str) -> Refusal {
    Refusal {
        code,
        errno: 0,
        detail: detail.as_bytes().to_vec(),
    }
}

/// The error number of an error, `EIO` when it has none.
pub(crate) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        // A NUL byte in a path or argument.
        io::ErrorKind::InvalidInput => libc::EINVAL,
        io::ErrorKind::TimedOut => libc::ETIMEDOUT,
        _ => libc::EIO,
    })
}

/// Turns an error of the system into a refusal that says what was being done.
pub(crate) trait Doing<T> {
    /// Adds what was being done.
    fn doing(self, what: &str) -> Result<T, Refusal>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: &str) -> Result<T, Refusal> {
        self.map_err(|error| Refusal {
            errno: errno(&error),
            ..refusal(ErrorCode::Os, what)
        })
    }
}

impl<T> Doing<T> for Result<T, Errno> {
    fn doing(self, what: &str) -> Result<T, Refusal> {
        self.map_err(io::Error::from).doing(what)
    }
}

/// Tells whoever reads the console. There is nobody to tell that this failed.
pub(crate) fn log(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "offshoot-agent: {line}");
}
