//! Snapshot ids.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Timestamp;

/// Crockford's base 32 in lower case: no i, l, o, u.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Characters of an id: 26 * 5 = 130 bits, the top two of them zero.
const TEXT_LEN: usize = 26;
/// What stands before an id in the name of a snapshot's directory.
const PREFIX: &str = "snap-";

/// Names a snapshot. Shown as `snap-` and 26 characters that sort by creation time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId([u8; 16]);

/// A text that is not a snapshot id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a snapshot id is `snap-` and 26 of the characters 0-9 a-z without i, l, o, u, the first one at most 7"
)]
pub struct InvalidSnapshotId;

impl SnapshotId {
    /// A new id: the present time and 80 random bits of the kernel.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn generate() -> std::io::Result<Self> {
        let mut random = [0; 10];
        let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        if got != random.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self::from_parts(Timestamp::now(), random))
    }

    /// The id of a time and 80 bits. Times from the year 10889 on, which a [`Timestamp`] cannot hold, would not fit.
    #[must_use]
    pub fn from_parts(time: Timestamp, random: [u8; 10]) -> Self {
        let mut low = [0; 16];
        for (to, from) in low.iter_mut().skip(6).zip(random) {
            *to = from;
        }
        let value = (u128::from(time.unix_ms()) << 80) | u128::from_be_bytes(low);
        Self(value.to_be_bytes())
    }

    /// From the 16 bytes of the header.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes of the header.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        let value = u128::from_be_bytes(self.0);
        for shift in (0..TEXT_LEN).rev().map(|i| i.saturating_mul(5)) {
            let digit = value.checked_shr(u32::try_from(shift).unwrap_or(u32::MAX));
            let digit = usize::try_from(digit.unwrap_or(0) & 31).unwrap_or(0);
            let byte = ALPHABET.get(digit).copied().unwrap_or(b'0');
            write!(f, "{}", char::from(byte))?;
        }
        Ok(())
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

impl FromStr for SnapshotId {
    type Err = InvalidSnapshotId;

    /// Takes the id with or without its `snap-`.
    fn from_str(text: &str) -> Result<Self, InvalidSnapshotId> {
        let digits = text.strip_prefix(PREFIX).unwrap_or(text);
        if digits.len() != TEXT_LEN || digits.as_bytes().first().is_none_or(|b| *b > b'7') {
            return Err(InvalidSnapshotId);
        }
        let mut value = 0u128;
        for byte in digits.bytes() {
            let digit = ALPHABET.iter().position(|b| *b == byte);
            value = (value << 5) | digit.ok_or(InvalidSnapshotId)? as u128;
        }
        Ok(Self(value.to_be_bytes()))
    }
}

impl Serialize for SnapshotId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for SnapshotId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 16]>::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_sorts_by_time() {
        let early = SnapshotId::from_parts(Timestamp::from_unix_ms(1).unwrap(), [0xff; 10]);
        let late = SnapshotId::from_parts(Timestamp::from_unix_ms(2).unwrap(), [0; 10]);
        assert_eq!(early.to_string(), "snap-0000000001zzzzzzzzzzzzzzzz");
        assert_eq!(late.to_string(), "snap-00000000020000000000000000");
        assert!(early.to_string() < late.to_string());
        for id in [
            early,
            late,
            SnapshotId([0xff; 16]),
            SnapshotId([0; 16]),
            SnapshotId::generate().unwrap(),
        ] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
    }

    #[test]
    fn refuses_what_is_no_id() {
        for bad in [
            "",
            "snap-",
            "snap-8000000000000000000000000z", // more than 128 bits
            "snap-000000000000000000000000il",
            "snap-0000000000000000000000000",
            "snap-000000000000000000000000000",
            "snap-0000000000000000000000000Z",
            "snap-../../../../../../etc/pass",
        ] {
            assert_eq!(bad.parse::<SnapshotId>(), Err(InvalidSnapshotId), "{bad}");
        }
    }
}
