//! A real tap interface, with the host's network stack behind it.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::guest::{Guest, MERGEABLE, config};
use crate::virtio::SetupError;
use crate::virtio::net::{HEADER_LEN, NetBackend, OFFLOADS, Tap};

/// A name and a subnet of two addresses that nobody else has.
fn unique() -> (String, [u8; 4], [u8; 4]) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = std::process::id().wrapping_mul(8) + NEXT.fetch_add(1, Ordering::SeqCst);
    // 198.18.0.0/15 is for tests of networks.
    let [_, _, high, low] = (id << 2).to_be_bytes();
    let net = |host| [198, 18 + (high >> 7), high, (low & 0xfc) | host];
    (format!("ost{:x}", id & 0xff_ffff), net(1), net(2))
}

fn ip(arguments: &str) -> bool {
    Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .is_ok_and(|status| status.success())
}

fn dotted(address: [u8; 4]) -> String {
    std::net::Ipv4Addr::from(address).to_string()
}

/// A tap that is up with the host's address on it; `None` when this cannot be had here.
fn tap() -> Option<(Tap, [u8; 4], [u8; 4])> {
    let (name, host, guest) = unique();
    let tap = match Tap::create(&name) {
        Ok(tap) => tap,
        Err(error) => {
            println!("skipped: no tap interface can be made here: {error}");
            return None;
        }
    };
    if !ip(&format!("addr add {}/30 dev {name}", dotted(host)))
        || !ip(&format!("link set {name} up"))
    {
        println!("skipped: the tap interface cannot be configured");
        return None;
    }
    Some((tap, host, guest))
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// An answer to an ARP request for `address`.
fn arp_reply(request: &[u8], address: [u8; 4]) -> Option<Vec<u8>> {
    if request.get(12..14)? != [8, 6] || request.get(38..42)? != address {
        return None;
    }
    let mac = config().mac.bytes();
    let mut reply = request[6..12].to_vec();
    reply.extend(mac);
    reply.extend(&request[12..20]);
    reply.extend([0, 2]);
    reply.extend(mac);
    reply.extend(address);
    reply.extend(&request[22..32]);
    Some(reply)
}

/// The answer to a UDP packet, its checksum left to the host as `VIRTIO_NET_F_CSUM` allows.
fn udp_reply(request: &[u8], data: &[u8]) -> (Vec<u8>, [u8; HEADER_LEN]) {
    let (ethernet, packet) = request.split_at(14);
    let mut reply = [&ethernet[6..12], &ethernet[..6], &ethernet[12..]].concat();
    let length = u16::try_from(20 + 8 + data.len()).unwrap();
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    header.extend(&packet[16..20]);
    header.extend(&packet[12..16]);
    let sum = checksum(&[&header]).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    let udp_length = u16::try_from(8 + data.len()).unwrap().to_be_bytes();
    let pseudo = [&header[12..20], &[0, 17], &udp_length].concat();
    let partial = !checksum(&[&pseudo]);
    reply.extend(header);
    reply.extend(&packet[22..24]);
    reply.extend(&packet[20..22]);
    reply.extend(udp_length);
    reply.extend(partial.to_be_bytes());
    reply.extend(data);
    let [start, offset] = [34u16.to_le_bytes(), 6u16.to_le_bytes()];
    let virtio = [
        1, 0, 0, 0, 0, 0, start[0], start[1], offset[0], offset[1], 0, 0,
    ];
    (reply, virtio)
}

#[test]
fn the_hosts_stack_talks_to_the_guest_with_offloaded_checksums() {
    let Some((tap, host, guest_address)) = tap() else {
        return;
    };
    assert_eq!(tap.offload_features(), OFFLOADS);
    let mut guest = Guest::boot(Box::new(tap), MERGEABLE | OFFLOADS, 1536);
    let socket = UdpSocket::bind((dotted(host), 0)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // Larger than one buffer: the host's stack hands it over in several of them or in fragments.
    let request = [b'q'; 1200];
    let answer = vec![b'a'; 1300];
    socket
        .send_to(&request, (dotted(guest_address), 4711))
        .unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    let mut got = [0; 2000];
    loop {
        assert!(Instant::now() < end, "no answer came through the tap");
        while let Some(packet) = guest.try_receive() {
            let frame = &packet[HEADER_LEN..];
            if let Some(reply) = arp_reply(frame, guest_address) {
                guest.send(&reply);
            } else if frame.get(12..14) == Some(&[8, 0])
                && frame[23] == 17
                && frame[36..38] == 4711u16.to_be_bytes()
            {
                assert_eq!(frame[42..], request);
                let (reply, header) = udp_reply(frame, &answer);
                assert!(guest.try_send(header, &reply));
            }
        }
        if let Ok((len, from)) = socket.recv_from(&mut got) {
            assert_eq!(from.port(), 4711);
            assert_eq!(got[..len], answer[..]);
            return;
        }
    }
}

#[test]
fn taps_that_cannot_be_had() {
    let (name, ..) = unique();
    let error = Tap::open(&name).unwrap_err();
    assert!(matches!(error, SetupError::NoSuchTap { .. }), "{error}");
    assert!(error.to_string().contains(&name));
    assert!(
        !std::path::Path::new("/sys/class/net").join(&name).exists(),
        "it was made"
    );
    for bad in ["", "a-name-that-is-too-long", "tap%d"] {
        let error = Tap::create(bad).unwrap_err();
        assert!(matches!(error, SetupError::TapName { .. }), "{error}");
    }
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(Tap::from_fd(null.into()).is_err());
    let error = match Tap::open("lo").unwrap_err() {
        // Without the right to open /dev/net/tun nothing more can be seen.
        SetupError::Host { source, .. } => {
            println!("skipped: {source}");
            return;
        }
        other => other,
    };
    assert!(matches!(error, SetupError::NotATap { .. }), "{error}");
    let Ok(first) = Tap::create(&name) else {
        println!("skipped: no tap interface can be made here");
        return;
    };
    let error = Tap::open(&name).unwrap_err();
    assert!(matches!(error, SetupError::TapBusy { .. }), "{error}");
    let copy = first.fd().try_clone_to_owned().unwrap();
    Tap::from_fd(copy).unwrap();
}
