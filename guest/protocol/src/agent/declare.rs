//! Macros that declare structures and messages with owned fields once. Unlike the pilot's they
//! have no text form.

/// A structure whose fields follow each other on the wire.
macro_rules! owned {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }

        impl crate::wire::Wire for $name {
            fn put(
                &self,
                writer: &mut crate::wire::Writer<'_>,
            ) -> Result<(), crate::wire::WireError> {
                $(self.$field.put(writer)?;)*
                Ok(())
            }
            fn take(
                reader: &mut crate::wire::Reader<'_>,
            ) -> Result<Self, crate::wire::WireError> {
                Ok(Self { $($field: reader.take()?,)* })
            }
        }
    };
}
pub(super) use owned;

/// A set of messages: `Name = kind { field: Type, … }`.
macro_rules! owned_messages {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$mdoc:meta])* $message:ident = $kind:literal {
            $($(#[$fdoc:meta])* $field:ident: $type:ty,)*
        })*
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name { $($(#[$mdoc])* $message { $($(#[$fdoc])* $field: $type,)* },)* }

        impl $name {
            /// The number and name of every message.
            pub const KINDS: &[(u16, &str)] = &[$(($kind, stringify!($message)),)*];

            /// The message's number in a frame's header.
            pub fn kind(&self) -> u16 {
                match self { $(Self::$message { .. } => $kind,)* }
            }

            /// The message's name.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$message { .. } => stringify!($message),)* }
            }

            /// Appends the message's fields.
            ///
            /// # Errors
            /// `TooLong` when the buffer is full.
            pub fn put(
                &self,
                writer: &mut crate::wire::Writer<'_>,
            ) -> Result<(), crate::wire::WireError> {
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
        }
    };
}
pub(super) use owned_messages;
