//! Names of volumes and layers.

use std::fmt;

/// The longest name in bytes: leaves room for a suffix under `NAME_MAX`.
const MAX_LEN: usize = 128;

/// A name that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {0:?} is not valid: 1 to 128 of the characters a-z A-Z 0-9 . _ -, starting with a letter or a digit"
)]
pub struct InvalidName(pub(crate) String);

fn check(name: &str) -> Result<(), InvalidName> {
    let mut bytes = name.bytes();
    let valid = name.len() <= MAX_LEN
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if valid {
        Ok(())
    } else {
        Err(InvalidName(name.chars().take(MAX_LEN + 1).collect()))
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// Checks and takes `name`.
            ///
            /// # Errors
            /// When `name` could not serve as a file name on every backend.
            pub fn new(name: impl Into<String>) -> Result<Self, InvalidName> {
                let name = name.into();
                check(&name)?;
                Ok(Self(name))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidName;
            fn from_str(s: &str) -> Result<Self, InvalidName> {
                Self::new(s)
            }
        }
    };
}

name_type! {
    /// Names a writable volume within one backend.
    VolumeName
}
name_type! {
    /// Names an immutable layer within one backend.
    LayerName
}

impl From<LayerName> for VolumeName {
    /// The same characters are valid in both; an opened layer is a volume that bears its name.
    fn from(name: LayerName) -> Self {
        Self(name.0)
    }
}
