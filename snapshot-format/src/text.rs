//! The two kinds of text in a snapshot. Both are safe to print on a terminal.

use crate::limits::MAX_LABEL_VALUE;

/// The longest label in bytes.
const MAX_LABEL: usize = 128;
/// The longest line in bytes.
const MAX_LINE: usize = 255;

/// A text that may not stand in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidText {
    /// Not a label.
    #[error(
        "{0} is not 1 to 128 of the characters a-z A-Z 0-9 . _ - starting with a letter or a digit"
    )]
    Label(&'static str),
    /// Not a line.
    #[error("{0} is longer than 255 bytes or has control characters")]
    Line(&'static str),
    /// Not a label's value.
    #[error("{0} is longer than 1024 bytes or has control characters")]
    Value(&'static str),
    /// Empty where a text is needed.
    #[error("{0} is empty")]
    Empty(&'static str),
}

/// Checks that `text` is 1 to 128 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
pub(crate) fn label(field: &'static str, text: &str) -> Result<(), InvalidText> {
    let mut bytes = text.bytes();
    let valid = text.len() <= MAX_LABEL
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if valid {
        Ok(())
    } else {
        Err(InvalidText::Label(field))
    }
}

/// Checks that `text` is at most 255 bytes without control characters.
pub(crate) fn line(field: &'static str, text: &str) -> Result<(), InvalidText> {
    if text.len() <= MAX_LINE && !text.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(InvalidText::Line(field))
    }
}

/// Checks that `text` may be the value of a user's label.
pub(crate) fn value(field: &'static str, text: &str) -> Result<(), InvalidText> {
    if text.len() <= MAX_LABEL_VALUE && !text.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(InvalidText::Value(field))
    }
}

/// Checks that `text` is a line and not empty.
pub(crate) fn filled_line(field: &'static str, text: &str) -> Result<(), InvalidText> {
    if text.is_empty() {
        return Err(InvalidText::Empty(field));
    }
    line(field, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_file_name_safe() {
        for good in ["a", "0", "vda", "layer-1.2_x", &"a".repeat(128)] {
            assert_eq!(label("x", good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "a b",
            "ä",
            "a\0",
            &"a".repeat(129),
        ] {
            assert_eq!(label("x", bad), Err(InvalidText::Label("x")), "{bad}");
        }
    }

    #[test]
    fn lines_cannot_drive_a_terminal() {
        assert_eq!(line("x", "größe 1 µ"), Ok(()));
        for bad in ["\u{1b}[2J", "a\nb", "\u{9b}1m", "\0", "\u{7f}"] {
            assert_eq!(line("x", bad), Err(InvalidText::Line("x")), "{bad:?}");
            assert_eq!(value("x", bad), Err(InvalidText::Value("x")), "{bad:?}");
        }
        assert_eq!(line("x", &"ä".repeat(128)), Err(InvalidText::Line("x")));
        assert_eq!(filled_line("x", ""), Err(InvalidText::Empty("x")));
    }
}
