//! The kinds of values that only the agent's messages have.

use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::value::Id;
use crate::wire::{Reader, Wire, WireError, WireErrorKind, Writer};

/// Bytes that the guest's kernel takes as they are: paths, arguments, environment.
pub type ByteString = Vec<u8>;

/// Which fork or restore of a guest is meant: the VM generation id. All zero before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Generation(pub [u8; 16]);

impl Generation {
    /// No generation: of an agent that was not told one yet, or of a host that does not care.
    pub const NONE: Self = Self([0; 16]);
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Id(self.0).fmt(f)
    }
}

impl Wire for Generation {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        self.0.put(writer)
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        reader.array().map(Self)
    }
}

/// A command that the agent knows. Never given twice by one agent, forks included: each fork
/// counts on from where its source was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct JobId(pub u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Wire for JobId {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        self.0.put(writer)
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        reader.take().map(Self)
    }
}

impl Wire for i32 {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        writer.bytes(&self.to_le_bytes())
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self::from_le_bytes(reader.array()?))
    }
}

/// One byte, 0 or 1.
impl Wire for bool {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        u8::from(*self).put(writer)
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let bad = reader.error(WireErrorKind::BadValue);
        match reader.take::<u8>()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(bad),
        }
    }
}

/// Whether there is one, as a byte; then the value.
impl<T: Wire> Wire for Option<T> {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        self.is_some().put(writer)?;
        self.iter().try_for_each(|value| value.put(writer))
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        match reader.take()? {
            true => T::take(reader).map(Some),
            false => Ok(None),
        }
    }
}

/// A count of four bytes, then the items. Nothing is allocated ahead: a count costs its sender the
/// bytes of the items.
impl<T: Wire> Wire for Vec<T> {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        let count = u32::try_from(self.len()).map_err(|_| WireError {
            kind: WireErrorKind::TooLong,
            at: writer.written(),
        })?;
        count.put(writer)?;
        self.iter().try_for_each(|item| item.put(writer))
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut items = Self::new();
        for _ in 0..reader.take::<u32>()? {
            items.push(T::take(reader)?);
        }
        Ok(items)
    }
}

/// The family as a byte, 4 or 6; then the address in network order.
impl Wire for IpAddr {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        match self {
            Self::V4(address) => {
                4u8.put(writer)?;
                address.octets().put(writer)
            }
            Self::V6(address) => {
                6u8.put(writer)?;
                address.octets().put(writer)
            }
        }
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let bad = reader.error(WireErrorKind::BadValue);
        match reader.take::<u8>()? {
            4 => Ok(Self::V4(Ipv4Addr::from(reader.array::<4>()?))),
            6 => Ok(Self::V6(Ipv6Addr::from(reader.array::<16>()?))),
            _ => Err(bad),
        }
    }
}
