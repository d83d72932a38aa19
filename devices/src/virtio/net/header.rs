//! `virtio_net_hdr_v1` (virtio 1.2, 5.1.6): what the guest writes there reaches the host's
//! network stack, so it is checked here.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of the header; `num_buffers` is always there in virtio 1.x.
pub const HEADER_LEN: usize = 12;
/// The longest frame (virtio 1.2, 5.1.6.3.1: 65550 bytes with segmentation offloads).
pub const MAX_FRAME: usize = 65550;
/// Header and frame.
pub const MAX_PACKET: usize = HEADER_LEN + MAX_FRAME;

const ETHERNET_HEADER: usize = 14;

#[derive(Debug, Clone, Copy)]
struct Header {
    flags: u8,
    gso_type: u8,
    header_len: u16,
    gso_size: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Header {
    fn decode(packet: &[u8]) -> Option<(Self, &[u8])> {
        let (raw, frame) = packet.split_first_chunk::<HEADER_LEN>()?;
        let [
            flags,
            gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            _num_buffers0,
            _num_buffers1,
        ] = *raw;
        let header = Self {
            flags,
            gso_type,
            header_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            checksum_start: u16::from_le_bytes([s0, s1]),
            checksum_offset: u16::from_le_bytes([o0, o1]),
        };
        Some((header, frame))
    }
}

/// Whether a packet of the guest's may go to the peer: its header asks only for what was agreed
/// on in `features`, with values that lie within the frame. Bits that mean nothing from a driver
/// are cleared (virtio 1.2, 5.1.6.2: DATA_VALID and RSC_INFO are not the driver's).
pub(super) fn admit(packet: &mut [u8], features: u64) -> bool {
    let Some((header, frame)) = Header::decode(packet) else {
        return false;
    };
    let has = |bit: u32| features & (1 << bit) != 0;
    if frame.len() < ETHERNET_HEADER || frame.len() > MAX_FRAME {
        return false;
    }
    let needs_checksum = u32::from(header.flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if needs_checksum {
        let field = usize::from(header.checksum_start)
            .saturating_add(usize::from(header.checksum_offset))
            .saturating_add(2);
        if !has(VIRTIO_NET_F_CSUM) || field > frame.len() {
            return false;
        }
    }
    let segments = match u32::from(header.gso_type) {
        VIRTIO_NET_HDR_GSO_NONE => false,
        VIRTIO_NET_HDR_GSO_TCPV4 if has(VIRTIO_NET_F_HOST_TSO4) => true,
        VIRTIO_NET_HDR_GSO_TCPV6 if has(VIRTIO_NET_F_HOST_TSO6) => true,
        // UFO, USO and the ECN bit are not offered.
        _ => return false,
    };
    let header_len = usize::from(header.header_len);
    if segments && (!needs_checksum || header.gso_size == 0 || header_len > frame.len()) {
        return false;
    }
    if let Some((flags, rest)) = packet.split_first_mut() {
        *flags = u8::from(needs_checksum);
        if !segments {
            // gso_type is zero already; without it hdr_len and gso_size mean nothing.
            if let Some(sizes) = rest.get_mut(1..5) {
                sizes.fill(0);
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(flags: u8, gso: u8, sizes: [u16; 4], frame: usize) -> Vec<u8> {
        let mut packet = vec![flags, gso];
        packet.extend(sizes.iter().flat_map(|s| s.to_le_bytes()));
        packet.extend([9, 9]);
        packet.resize(HEADER_LEN + frame, 7);
        packet
    }

    const ALL: u64 = super::super::OFFLOADS;

    #[test]
    fn what_was_agreed_on_goes_through() {
        assert!(admit(&mut packet(0, 0, [0; 4], 60), 0));
        assert!(admit(&mut packet(1, 0, [0, 0, 34, 6], 60), ALL));
        assert!(admit(&mut packet(1, 1, [54, 1448, 34, 16], 9000), ALL));
        assert!(admit(&mut packet(1, 4, [74, 1428, 54, 16], 9000), ALL));
        let mut noisy = packet(0xfe, 0, [5, 6, 0, 0], 60);
        assert!(admit(&mut noisy, 0));
        assert_eq!(noisy[..6], [0; 6], "what means nothing is cleared");
    }

    #[test]
    fn what_was_not_agreed_on_or_lies_outside_the_frame_does_not() {
        for (mut bad, features) in [
            (packet(1, 0, [0, 0, 34, 6], 60), 0),
            (
                packet(1, 1, [54, 1448, 34, 16], 9000),
                ALL & !(1 << VIRTIO_NET_F_HOST_TSO4),
            ),
            (packet(1, 0, [0, 0, 57, 2], 60), ALL),
            (packet(1, 0, [0, 0, u16::MAX, u16::MAX], 60), ALL),
            (packet(0, 1, [54, 1448, 0, 0], 9000), ALL),
            (packet(1, 1, [54, 0, 34, 16], 9000), ALL),
            (packet(1, 1, [9001, 1448, 34, 16], 9000), ALL),
            (packet(1, 0x81, [54, 1448, 34, 16], 9000), ALL),
            (packet(1, 3, [54, 1448, 34, 16], 9000), ALL),
            (packet(1, 5, [54, 1448, 34, 16], 9000), ALL),
            (packet(0, 0, [0; 4], 13), ALL),
            (packet(0, 0, [0; 4], MAX_FRAME + 1), ALL),
            (vec![0; 11], ALL),
            (Vec::new(), ALL),
        ] {
            let shown = bad.iter().take(12).copied().collect::<Vec<_>>();
            assert!(!admit(&mut bad, features), "{shown:?}");
        }
    }
}
