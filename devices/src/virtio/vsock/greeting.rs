//! The line that a host program sends first: `CONNECT <port>\n`.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// `CONNECT 4294967295\n` and a few bytes to spare.
const MAX_LINE: usize = 32;

pub(super) enum Greeting {
    /// The line is not complete yet.
    Partial,
    /// The guest's port that is asked for.
    Connect(u32),
    /// Not such a line, or the program left.
    Invalid,
}

/// Reads on. What follows the line belongs to the connection and stays in the socket, so the
/// socket is looked into before it is read from.
pub(super) fn read(socket: &OwnedFd, line: &mut Vec<u8>) -> Greeting {
    loop {
        let mut peeked = [0u8; MAX_LINE];
        let space = MAX_LINE.saturating_sub(line.len());
        let Some(buffer) = peeked.get_mut(..space).filter(|b| !b.is_empty()) else {
            return Greeting::Invalid;
        };
        let got = match recv(socket, &mut *buffer, RecvFlags::PEEK) {
            Ok((0, _)) => return Greeting::Invalid,
            Ok((got, _)) => got,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Greeting::Partial,
            Err(_) => return Greeting::Invalid,
        };
        let seen = peeked.get(..got).unwrap_or_default();
        let end = seen.iter().position(|&byte| byte == b'\n');
        let take = end.map_or(got, |end| end.saturating_add(1));
        let mut taken = [0u8; MAX_LINE];
        let Some(buffer) = taken.get_mut(..take) else {
            return Greeting::Invalid;
        };
        match recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((got, _)) if got == take => line.extend_from_slice(buffer),
            _ => return Greeting::Invalid,
        }
        if end.is_some() {
            return parse(line).map_or(Greeting::Invalid, Greeting::Connect);
        }
    }
}

/// `CONNECT <port>`, the line's end included. The port is decimal without a sign.
fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let port = text
        .strip_suffix('\r')
        .unwrap_or(text)
        .strip_prefix("CONNECT ")?;
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn only_the_exact_line_is_taken() {
        assert_eq!(parse(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967295\r\n"), Some(u32::MAX));
        for bad in [
            &b"CONNECT 4294967296\n"[..],
            b"CONNECT +1\n",
            b"CONNECT \n",
            b"CONNECT 1",
            b"connect 1\n",
            b"CONNECT 1 \n",
            b"\xff\n",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
