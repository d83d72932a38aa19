//! Little-endian encoding with bounds on everything.

use core::fmt;

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireErrorKind {
    /// The bytes or the line end before the message does.
    Truncated,
    /// Bytes or words are left over after the message.
    LeftOver,
    /// A frame does not start with the magic number.
    BadMagic,
    /// A length is above what this version allows, or the buffer is too small.
    TooLong,
    /// No message of this kind or name is known.
    UnknownMessage,
    /// A field holds a value that it can't have, or a key is unknown or given twice.
    BadValue,
}

/// Why a message could not be read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireError {
    /// What is wrong.
    pub kind: WireErrorKind,
    /// Where: the offset in bytes from the start of what was read or written.
    pub at: usize,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            WireErrorKind::Truncated => "message ends too early",
            WireErrorKind::LeftOver => "something is left over after the message",
            WireErrorKind::BadMagic => "frame does not start with the magic number",
            WireErrorKind::TooLong => "message is longer than allowed",
            WireErrorKind::UnknownMessage => "message is not known",
            WireErrorKind::BadValue => "field has a value that it can't have",
        };
        write!(f, "{what} (at byte {})", self.at)
    }
}

impl core::error::Error for WireError {}

/// Reads values from the front of a slice.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// A reader of all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, at: 0 }
    }

    /// Takes the next `N` bytes.
    ///
    /// # Errors
    /// `Truncated` when fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(self.error(WireErrorKind::Truncated))?;
        self.rest = rest;
        self.at = self.at.saturating_add(N);
        Ok(*head)
    }

    /// Takes a value.
    ///
    /// # Errors
    /// Whatever the value's decoder finds wrong.
    pub fn take<T: Wire>(&mut self) -> Result<T, WireError> {
        T::take(self)
    }

    /// Ends reading.
    ///
    /// # Errors
    /// `LeftOver` when bytes are left.
    pub fn finish(self) -> Result<(), WireError> {
        match self.rest.is_empty() {
            true => Ok(()),
            false => Err(self.error(WireErrorKind::LeftOver)),
        }
    }

    /// An error at the place reached.
    pub fn error(&self, kind: WireErrorKind) -> WireError {
        WireError { kind, at: self.at }
    }
}

/// Writes values to the front of a slice.
#[derive(Debug)]
pub struct Writer<'a> {
    buffer: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    /// A writer into `buffer`.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, at: 0 }
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// `TooLong` when they do not fit.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        let too_long = WireError {
            kind: WireErrorKind::TooLong,
            at: self.at,
        };
        let end = self.at.checked_add(bytes.len()).ok_or(too_long)?;
        self.buffer
            .get_mut(self.at..end)
            .ok_or(too_long)?
            .copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }

    /// How many bytes were written.
    pub fn written(&self) -> usize {
        self.at
    }
}

/// A value with a place in a frame.
pub trait Wire: Sized {
    /// Appends the value.
    ///
    /// # Errors
    /// `TooLong` when the buffer is full.
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError>;

    /// Takes the value from the front.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing, `BadValue` when they mean nothing.
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError>;
}

macro_rules! integers {
    ($($t:ty)*) => {$(
        impl Wire for $t {
            fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
                writer.bytes(&self.to_le_bytes())
            }
            fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
                Ok(Self::from_le_bytes(reader.array()?))
            }
        }
    )*};
}
integers!(u8 u16 u32 u64);

impl<const N: usize> Wire for [u8; N] {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        writer.bytes(self)
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        reader.array()
    }
}
