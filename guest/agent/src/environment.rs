//! The environment that commands start with.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::Mutex;

use offshoot_protocol::agent::{EnvVar, ErrorCode, Refusal};

use crate::failure::refusal;
use crate::lock::lock;

/// The most variables that there may be.
const MOST: usize = 1024;
/// The most bytes of all names and values.
const MOST_BYTES: usize = 512 << 10;

/// The defaults.
#[derive(Debug)]
pub(crate) struct Environment(Mutex<BTreeMap<OsString, OsString>>);

impl Default for Environment {
    fn default() -> Self {
        let defaults = [
            (
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            ),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
        ];
        Self(Mutex::new(
            defaults
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        ))
    }
}

impl Environment {
    /// All variables.
    pub(crate) fn all(&self) -> BTreeMap<OsString, OsString> {
        lock(&self.0).clone()
    }

    /// Applies changes: all of them, or none.
    pub(crate) fn change(&self, changes: &[EnvVar]) -> Result<(), Refusal> {
        let mut current = lock(&self.0);
        let mut next = current.clone();
        for change in changes {
            let name = &change.name;
            let value = change.value.as_deref().unwrap_or_default();
            if name.is_empty() || name.contains(&b'=') || name.contains(&0) || value.contains(&0) {
                return Err(refusal(ErrorCode::Invalid, "an environment variable"));
            }
            let name = OsString::from_vec(name.clone());
            match &change.value {
                Some(value) => next.insert(name, OsString::from_vec(value.clone())),
                None => next.remove(&name),
            };
        }
        let bytes: usize = next
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if next.len() > MOST || bytes > MOST_BYTES {
            return Err(refusal(ErrorCode::Invalid, "the environment is too large"));
        }
        *current = next;
        Ok(())
    }
}
