//! Sections of the machine and its devices: opaque here, consumed one by one when a machine is built.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use crate::{Error, ErrorKind, Payload, PayloadError, Place, SectionKind};

/// A section: somebody's saved state, as bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Section {
    /// Whose state it is.
    pub kind: SectionKind,
    /// The payload's version.
    pub version: u16,
    /// Tells sections of one kind apart.
    pub instance: u32,
    /// A reader that does not consume the section must refuse the snapshot.
    pub required: bool,
    /// The state.
    pub payload: Vec<u8>,
}

impl std::fmt::Debug for Section {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Section")
            .field("kind", &self.kind)
            .field("version", &self.version)
            .field("instance", &self.instance)
            .field("required", &self.required)
            .field("payload", &format_args!("{} bytes", self.payload.len()))
            .finish()
    }
}

impl Section {
    /// A required section that holds `state`.
    ///
    /// # Errors
    /// When `state` cannot be encoded.
    pub fn required<P: Payload>(instance: u32, state: &P) -> Result<Self, Error> {
        let payload = state.encode().map_err(|source| {
            let place = Place::Section {
                kind: P::KIND,
                instance,
            };
            Error::because(ErrorKind::Malformed, place, "it cannot be encoded", source)
        })?;
        Ok(Self {
            kind: P::KIND,
            version: P::VERSION,
            instance,
            required: true,
            payload,
        })
    }

    /// Where the section is, for errors.
    #[must_use]
    pub fn place(&self) -> Place {
        Place::Section {
            kind: self.kind,
            instance: self.instance,
        }
    }

    /// The state in it.
    ///
    /// # Errors
    /// [`ErrorKind::Version`] when this build does not read the payload's version, [`ErrorKind::Malformed`] when the
    /// section is of another kind than `P` or does not decode.
    pub fn decode<P: Payload>(&self) -> Result<P, Error> {
        if self.kind != P::KIND {
            let detail = "the section is of another kind than what is read from it";
            return Err(Error::new(ErrorKind::Malformed, self.place(), detail));
        }
        decode(self.place(), self.version, &self.payload)
    }
}

/// Decodes the payload of a section at `place`.
pub(crate) fn decode<P: Payload>(place: Place, version: u16, bytes: &[u8]) -> Result<P, Error> {
    P::decode(version, bytes).map_err(|source| {
        let kind = match source {
            PayloadError::Version { .. } => ErrorKind::Version,
            _ => ErrorKind::Malformed,
        };
        Error::because(kind, place, "the payload is not readable", source)
    })
}

/// The sections that nobody consumed yet. What is left at the end decides whether state would be lost.
#[derive(Debug, Clone)]
#[must_use = "call `finish`, or left-over state goes unnoticed"]
pub struct Sections<'a> {
    left: Vec<&'a Section>,
}

impl<'a> Sections<'a> {
    pub(crate) fn new(all: &'a [Section]) -> Self {
        Self {
            left: all.iter().collect(),
        }
    }

    /// Consumes the section of `P` with this instance and decodes it.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] when there is none (any more), else as [`Section::decode`].
    pub fn take<P: Payload>(&mut self, instance: u32) -> Result<P, Error> {
        self.take_raw(P::KIND, instance)?.decode()
    }

    /// Consumes the section of this kind and instance.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] when there is none (any more).
    pub fn take_raw(&mut self, kind: SectionKind, instance: u32) -> Result<&'a Section, Error> {
        self.take_if_present(kind, instance).ok_or_else(|| {
            let place = Place::Section { kind, instance };
            Error::new(ErrorKind::Missing, place, "the snapshot does not have it")
        })
    }

    /// Consumes the section of this kind and instance if it is there.
    pub fn take_if_present(&mut self, kind: SectionKind, instance: u32) -> Option<&'a Section> {
        let found = |s: &&Section| s.kind == kind && s.instance == instance;
        let position = self.left.iter().position(found)?;
        Some(self.left.remove(position))
    }

    /// The instances of `kind` that are left, in the manifest's order.
    pub fn instances(&self, kind: SectionKind) -> impl Iterator<Item = u32> {
        let of_kind = self.left.iter().filter(move |s| s.kind == kind);
        of_kind.map(|s| s.instance)
    }

    /// Ends consuming. Returns the optional sections that are left.
    ///
    /// # Errors
    /// [`ErrorKind::LeftOver`], naming the first one, when a required section is left.
    pub fn finish(self) -> Result<Vec<&'a Section>, Error> {
        if let Some(section) = self.left.iter().find(|s| s.required) {
            let detail =
                "this machine does not know what to do with it, and it must not be ignored";
            return Err(Error::new(ErrorKind::LeftOver, section.place(), detail));
        }
        Ok(self.left)
    }
}
