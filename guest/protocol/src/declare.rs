//! Macros that declare a structure, an enumeration or a set of messages once and derive both of
//! its forms from that.

/// A C-like enumeration: `Variant = number "name"`. One byte on the wire, the name in text.
macro_rules! choices {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $number,)* }

        impl $name {
            /// Every value.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
        }

        impl crate::wire::Wire for $name {
            fn put(&self, writer: &mut crate::wire::Writer<'_>) -> Result<(), crate::wire::WireError> {
                (*self as u8).put(writer)
            }
            fn take(reader: &mut crate::wire::Reader<'_>) -> Result<Self, crate::wire::WireError> {
                let bad = reader.error(crate::wire::WireErrorKind::BadValue);
                match reader.take::<u8>()? {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(bad),
                }
            }
        }

        impl crate::value::Text for $name {
            fn write(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
            fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                crate::value::Text::write(self, f)
            }
        }
    };
}
pub(crate) use choices;

/// A structure whose fields follow each other on the wire and are `key=value` in text.
macro_rules! record {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }

        impl crate::wire::Wire for $name {
            fn put(&self, writer: &mut crate::wire::Writer<'_>) -> Result<(), crate::wire::WireError> {
                $(self.$field.put(writer)?;)*
                Ok(())
            }
            fn take(reader: &mut crate::wire::Reader<'_>) -> Result<Self, crate::wire::WireError> {
                Ok(Self { $($field: reader.take()?,)* })
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                let mut gap = "";
                $(
                    write!(f, "{gap}{}=", stringify!($field))?;
                    crate::value::Text::write(&self.$field, f)?;
                    gap = " ";
                )*
                let _ = gap;
                Ok(())
            }
        }

        impl crate::declare::Member for $name {
            const KEYS: &'static [&'static str] = &[$(stringify!($field)),*];

            fn write(&self, _: &str, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, " {self}")
            }
            fn read(
                _: &str,
                words: &crate::declare::Words<'_>,
            ) -> Result<Option<Self>, crate::wire::WireError> {
                Ok(Some(Self { $($field: words.required(stringify!($field))?,)* }))
            }
        }
    };
}
pub(crate) use record;

/// A set of messages: `Name = kind "name" { field: Type [= default], … }`. A default counts in
/// the text form only, for a key that was left out.
macro_rules! messages {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$mdoc:meta])* $message:ident = $kind:literal $text:literal {
            $($(#[$fdoc:meta])* $field:ident: $type:ty $(= $default:expr)?,)*
        })*
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name { $($(#[$mdoc])* $message { $($(#[$fdoc])* $field: $type,)* },)* }

        impl $name {
            /// The message's number in a frame's header.
            pub fn kind(&self) -> u16 {
                match self { $(Self::$message { .. } => $kind,)* }
            }

            /// Appends the message's fields.
            ///
            /// # Errors
            /// `TooLong` when the buffer is full.
            pub fn put(&self, writer: &mut crate::wire::Writer<'_>) -> Result<(), crate::wire::WireError> {
                match self {
                    $(Self::$message { $($field,)* } => {
                        $(crate::wire::Wire::put($field, writer)?;)*
                    })*
                }
                let _ = writer;
                Ok(())
            }

            /// Reads the message of number `kind` from its payload.
            ///
            /// # Errors
            /// `UnknownMessage`, or whatever is wrong with the payload, left-over bytes included.
            pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, crate::wire::WireError> {
                let mut reader = crate::wire::Reader::new(payload);
                let message = match kind {
                    $($kind => Self::$message { $($field: reader.take()?,)* },)*
                    _ => return Err(reader.error(crate::wire::WireErrorKind::UnknownMessage)),
                };
                reader.finish()?;
                Ok(message)
            }

            /// Reads the message from a line of its text form.
            ///
            /// # Errors
            /// `UnknownMessage`, `Truncated` when a key is missing, `BadValue` when a key is
            /// unknown, given twice or has a value that it can't have.
            pub fn parse(line: &str) -> Result<Self, crate::wire::WireError> {
                let line = line.trim();
                let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
                let words = crate::declare::Words::new(rest);
                match name {
                    $($text => {
                        words.check(&[
                            $((stringify!($field), <$type as crate::declare::Member>::KEYS)),*
                        ])?;
                        Ok(Self::$message {
                            $($field: crate::declare::field!(words, $field $(, $default)?),)*
                        })
                    })*
                    _ => Err(crate::wire::WireError {
                        kind: crate::wire::WireErrorKind::UnknownMessage,
                        at: 0,
                    }),
                }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self {
                    $(Self::$message { $($field,)* } => {
                        f.write_str($text)?;
                        $(
                            crate::declare::Member::write($field, stringify!($field), f)?;
                        )*
                        Ok(())
                    })*
                }
            }
        }
    };
}
pub(crate) use messages;

/// One field of a message in text form: required, or with a default.
macro_rules! field {
    ($words:ident, $field:ident) => {
        $words.required(stringify!($field))?
    };
    ($words:ident, $field:ident, $default:expr) => {
        $words.optional(stringify!($field))?.unwrap_or($default)
    };
}
pub(crate) use field;

use core::fmt;

use crate::value::Text;
use crate::wire::{WireError, WireErrorKind};

/// A field of a message in text form: one `key=value` word, or the words of a record.
pub(crate) trait Member: Sized {
    /// The keys of a record's words; none for a value, which stands under the field's own name.
    const KEYS: &'static [&'static str];

    fn write(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result;
    fn read(name: &str, words: &Words<'_>) -> Result<Option<Self>, WireError>;
}

impl<T: Text> Member for T {
    const KEYS: &'static [&'static str] = &[];

    fn write(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " {name}=")?;
        Text::write(self, f)
    }
    fn read(name: &str, words: &Words<'_>) -> Result<Option<Self>, WireError> {
        match words.pairs().find(|(key, _)| *key == name) {
            Some((key, Some(value))) => T::parse(value).map(Some).ok_or(words.bad(key)),
            _ => Ok(None),
        }
    }
}

/// The `key=value` words of a line.
#[derive(Debug)]
pub(crate) struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    pub(crate) fn new(line: &'a str) -> Self {
        Self(line)
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a str, Option<&'a str>)> {
        self.0
            .split_ascii_whitespace()
            .map(|word| match word.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (word, None),
            })
    }

    /// Where `part`, a piece of the line, starts in it.
    fn at(&self, part: &str) -> usize {
        (part.as_ptr().addr()).saturating_sub(self.0.as_ptr().addr())
    }

    fn bad(&self, part: &str) -> WireError {
        WireError {
            kind: WireErrorKind::BadValue,
            at: self.at(part),
        }
    }

    /// Refuses unknown and repeated keys and words that are not `key=value`.
    pub(crate) fn check(&self, known: &[(&str, &[&str])]) -> Result<(), WireError> {
        let is_known = |key: &str| {
            known.iter().any(|(name, keys)| match keys.is_empty() {
                true => *name == key,
                false => keys.contains(&key),
            })
        };
        for (index, (key, value)) in self.pairs().enumerate() {
            let repeated = self.pairs().take(index).any(|(earlier, _)| earlier == key);
            if value.is_none() || repeated || !is_known(key) {
                return Err(self.bad(key));
            }
        }
        Ok(())
    }

    pub(crate) fn optional<T: Member>(&self, key: &str) -> Result<Option<T>, WireError> {
        T::read(key, self)
    }

    pub(crate) fn required<T: Member>(&self, key: &str) -> Result<T, WireError> {
        self.optional(key)?.ok_or(WireError {
            kind: WireErrorKind::Truncated,
            at: self.0.len(),
        })
    }
}
