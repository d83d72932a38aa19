//! How a section's payload becomes bytes: beside each device's saved state stands one
//! [`Payload`] implementation with its kind and version.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a section holds: four ASCII characters, declared beside the state it names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectionKind(pub [u8; 4]);

impl std::fmt::Debug for SectionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SectionKind({self})")
    }
}

impl std::fmt::Display for SectionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl Serialize for SectionKind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A payload that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadError {
    /// This build does not read the payload's version.
    #[error("section {kind} has version {found}, this build reads {newest} and older")]
    Version {
        /// The section's kind.
        kind: SectionKind,
        /// The version found.
        found: u16,
        /// The newest version that this build reads.
        newest: u16,
    },
    /// The bytes are not a payload of this kind.
    #[error("section {kind} does not decode")]
    Malformed {
        /// The section's kind.
        kind: SectionKind,
        /// What the decoder met.
        source: postcard::Error,
    },
    /// Bytes are left over behind the payload.
    #[error("section {kind} has {left} bytes too many")]
    LeftOver {
        /// The section's kind.
        kind: SectionKind,
        /// How many bytes are left over.
        left: usize,
    },
}

/// Saved state of one kind. It is untrusted plain data: whoever builds something from it checks
/// every field first.
pub trait Payload: Serialize + DeserializeOwned {
    /// The kind of section that holds it.
    const KIND: SectionKind;
    /// The version that [`encode`](Self::encode) writes. A change of the type's layout is a new
    /// version, and [`decode`](Self::decode) then converts the older ones.
    const VERSION: u16;

    /// The payload's bytes.
    ///
    /// # Errors
    /// When a value cannot be represented.
    fn encode(&self) -> Result<Vec<u8>, PayloadError> {
        postcard::to_stdvec(self).map_err(|source| PayloadError::Malformed {
            kind: Self::KIND,
            source,
        })
    }

    /// Reads a payload of `version`, all of `bytes`.
    ///
    /// # Errors
    /// Never panics and allocates in proportion to `bytes.len()` only.
    fn decode(version: u16, bytes: &[u8]) -> Result<Self, PayloadError> {
        if version == Self::VERSION {
            decode_exact(Self::KIND, bytes)
        } else {
            Err(PayloadError::Version {
                kind: Self::KIND,
                found: version,
                newest: Self::VERSION,
            })
        }
    }
}

/// Decodes all of `bytes` as one `T`: the piece that [`Payload::decode`] is made of.
///
/// # Errors
/// When `bytes` are not exactly one `T`.
pub fn decode_exact<T: DeserializeOwned>(
    kind: SectionKind,
    bytes: &[u8],
) -> Result<T, PayloadError> {
    let (value, rest) = postcard::take_from_bytes(bytes)
        .map_err(|source| PayloadError::Malformed { kind, source })?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(PayloadError::LeftOver {
            kind,
            left: rest.len(),
        })
    }
}
