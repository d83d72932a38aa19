//! The kinds of values that messages are made of, in both forms.

use core::fmt;

use crate::wire::{Reader, Wire, WireError, WireErrorKind, Writer};

/// A value with a text form that holds neither space nor `=`.
pub trait Text: Sized {
    /// Writes the value.
    ///
    /// # Errors
    /// Only those of the formatter.
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;

    /// Reads the value back; `None` when `text` is not one.
    fn parse(text: &str) -> Option<Self>;
}

macro_rules! integers {
    ($($t:ty)*) => {$(
        impl Text for $t {
            fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
            /// Decimal, `0x` and hexadecimal, or `all` for the largest value.
            fn parse(text: &str) -> Option<Self> {
                if text == "all" {
                    return Some(Self::MAX);
                }
                match text.strip_prefix("0x") {
                    Some(digits) => Self::from_str_radix(digits, 16).ok(),
                    None => text.parse().ok(),
                }
            }
        }
    )*};
}
integers!(u8 u16 u32 u64);

/// Reads exactly `N` items of `text` between separators.
fn parts<const N: usize>(
    text: &str,
    separator: char,
    parse: impl Fn(&str) -> Option<u8>,
) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut items = text.split(separator);
    for byte in &mut bytes {
        *byte = parse(items.next()?)?;
    }
    items.next().is_none().then_some(bytes)
}

fn hex_byte(text: &str) -> Option<u8> {
    (text.len() == 2 && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(text, 16).ok())?
}

macro_rules! byte_arrays {
    ($($(#[$doc:meta])* $name:ident($len:literal);)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub [u8; $len]);

        impl Wire for $name {
            fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
                self.0.put(writer)
            }
            fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
                reader.array().map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Text::write(self, f)
            }
        }
    )*};
}
byte_arrays! {
    /// 16 bytes that name something; hexadecimal in text.
    Id(16);
    /// An Ethernet address; `aa:bb:cc:dd:ee:ff` in text.
    Mac(6);
    /// An IPv4 address; `a.b.c.d` in text, all zero for none.
    Ipv4(4);
}

impl Text for Id {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
    fn parse(text: &str) -> Option<Self> {
        (text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit()))
            .then(|| u128::from_str_radix(text, 16).ok())?
            .map(|n| Self(n.to_be_bytes()))
    }
}

impl Text for Mac {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
    fn parse(text: &str) -> Option<Self> {
        parts(text, ':', hex_byte).map(Self)
    }
}

impl Text for Ipv4 {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{a}.{b}.{c}.{d}")
    }
    fn parse(text: &str) -> Option<Self> {
        parts(text, '.', |item| item.parse().ok()).map(Self)
    }
}

/// Up to `N` values: a count in one byte, then the values. In text they stand between commas,
/// and `-` is the empty list.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct List<T, const N: usize> {
    items: [T; N],
    len: usize,
}

impl<T: Copy + Default, const N: usize> List<T, N> {
    /// Appends an item; false, and nothing done, when the list is full.
    #[must_use]
    pub fn push(&mut self, item: T) -> bool {
        match self.items.get_mut(self.len) {
            Some(slot) => {
                *slot = item;
                self.len = self.len.saturating_add(1);
                true
            }
            None => false,
        }
    }

    /// The items.
    pub fn as_slice(&self) -> &[T] {
        self.items.get(..self.len).unwrap_or_default()
    }
}

impl<T: Copy + Default, const N: usize> Default for List<T, N> {
    fn default() -> Self {
        Self {
            items: [T::default(); N],
            len: 0,
        }
    }
}

impl<T: Copy + Default + fmt::Debug, const N: usize> fmt::Debug for List<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().fmt(f)
    }
}

impl<T: Wire + Copy + Default, const N: usize> Wire for List<T, N> {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        let count = u8::try_from(self.len).map_err(|_| WireError {
            kind: WireErrorKind::TooLong,
            at: writer.written(),
        })?;
        count.put(writer)?;
        self.as_slice().iter().try_for_each(|item| item.put(writer))
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut list = Self::default();
        for _ in 0..reader.take::<u8>()? {
            let item = T::take(reader)?;
            if !list.push(item) {
                return Err(reader.error(WireErrorKind::BadValue));
            }
        }
        Ok(list)
    }
}

impl<T: Text + Copy + Default, const N: usize> Text for List<T, N> {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.len == 0 {
            return f.write_str("-");
        }
        for (index, item) in self.as_slice().iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            item.write(f)?;
        }
        Ok(())
    }
    fn parse(text: &str) -> Option<Self> {
        let mut list = Self::default();
        if text == "-" {
            return Some(list);
        }
        for item in text.split(',') {
            if !list.push(T::parse(item)?) {
                return None;
            }
        }
        Some(list)
    }
}

/// Up to `N` bytes; hexadecimal in text, `-` for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bytes<const N: usize>(pub List<u8, N>);

impl<const N: usize> Wire for Bytes<N> {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        self.0.put(writer)
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        reader.take().map(Self)
    }
}

impl<const N: usize> Text for Bytes<N> {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.as_slice().is_empty() {
            return f.write_str("-");
        }
        self.0
            .as_slice()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
    fn parse(text: &str) -> Option<Self> {
        let mut list = List::default();
        if text == "-" {
            return Some(Self(list));
        }
        let mut rest = text;
        while !rest.is_empty() {
            let (pair, tail) = rest.split_at_checked(2)?;
            if !list.push(hex_byte(pair)?) {
                return None;
            }
            rest = tail;
        }
        Some(Self(list))
    }
}
