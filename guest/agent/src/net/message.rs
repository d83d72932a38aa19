//! rtnetlink messages as bytes: what is needed to set up interfaces, addresses and routes.
//! Host byte order, everything on four-byte boundaries (netlink(7), rtnetlink(7)).

use std::net::IpAddr;

/// Bytes of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;

/// A message that is being put together.
#[derive(Debug)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A message of a type with its fixed part.
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        let mut message = Self(bytes);
        message.pad();
        message
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.pad();
        self
    }

    /// The bytes, with length and sequence number filled in.
    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let fields = [(0, len), (8, sequence)];
        for (at, value) in fields {
            if let Some(field) = self.0.get_mut(at..at + 4) {
                field.copy_from_slice(&value.to_ne_bytes());
            }
        }
        self.0
    }
}

/// An integer of the kernel's; 0 where the bytes end too early.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u32::from_ne_bytes(*field))
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u16::from_ne_bytes(*field))
}

/// The messages of a datagram: type, sequence number and body of each.
pub(super) fn messages(mut bytes: &[u8]) -> Vec<(u16, u32, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= HEADER {
        let len = usize::try_from(u32_at(bytes, 0)).unwrap_or(usize::MAX);
        let Some(body) = bytes.get(HEADER..len) else {
            break;
        };
        found.push((u16_at(bytes, 4), u32_at(bytes, 8), body));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The attributes after a body's fixed part.
pub(super) fn attributes(body: &[u8], fixed: usize) -> Vec<(u16, &[u8])> {
    let mut rest = body.get(fixed..).unwrap_or_default();
    let mut found = Vec::new();
    while rest.len() >= 4 {
        let len = usize::from(u16_at(rest, 0));
        let Some(value) = rest.get(4..len) else { break };
        found.push((u16_at(rest, 2), value));
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Family and bytes of an address.
pub(super) fn family(ip: IpAddr) -> (u8, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (2, ip.octets().to_vec()),
        IpAddr::V6(ip) => (10, ip.octets().to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_can_be_read_back() {
        let message = Message::new(16, 5, &[1, 2, 3, 4])
            .with(3, b"eth0\0")
            .with(4, &[9, 9]);
        let bytes = message.finish(7);
        assert_eq!(bytes.len(), 16 + 4 + 12 + 8);
        let two = [bytes.as_slice(), &bytes].concat();
        let found = messages(&two);
        let [(16, 7, body), (16, 7, _)] = found.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!(
            attributes(body, 4),
            [(3, b"eth0\0".as_slice()), (4, &[9, 9])]
        );
    }

    #[test]
    fn cut_and_lying_messages_end_the_list() {
        let bytes = Message::new(16, 5, &[0; 16]).with(3, b"eth0\0").finish(7);
        for cut in 0..bytes.len() {
            assert!(messages(&bytes[..cut]).is_empty());
            let _ = attributes(&bytes[..cut], 16);
        }
        let mut lying = bytes;
        lying[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(messages(&lying).is_empty());
        lying[..4].copy_from_slice(&3u32.to_ne_bytes());
        assert!(messages(&lying).is_empty());
        assert!(attributes(&[0, 0, 1, 1, 5], 0).is_empty());
    }
}
