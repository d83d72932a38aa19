//! The real passt at the other end of the stream socket.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::guest::{Guest, MERGEABLE, config};
use crate::virtio::net::{HEADER_LEN, Stream};

struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(socket: &Path) -> Option<Passt> {
    let child = Command::new("passt")
        .args([
            "--foreground",
            "--quiet",
            "--one-off",
            "--runas",
            "0",
            "--socket",
        ])
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => Some(Passt(child)),
        Err(error) => {
            println!("skipped: passt cannot be started: {error}");
            None
        }
    }
}

/// A DHCP request for an address, as broadcast by a client that has none.
fn discover() -> Vec<u8> {
    let mac = config().mac.bytes();
    let mut dhcp = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78];
    dhcp.resize(28, 0);
    dhcp.extend(mac);
    dhcp.resize(236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    dhcp.resize(300, 0);
    let mut udp = vec![0, 68, 0, 67];
    udp.extend(u16::try_from(8 + dhcp.len()).unwrap().to_be_bytes());
    // No checksum, which UDP over IPv4 allows.
    udp.extend([0, 0]);
    udp.extend(dhcp);
    let mut ip = vec![0x45, 0];
    ip.extend(u16::try_from(20 + udp.len()).unwrap().to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = ip
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(udp);
    frame
}

#[test]
fn passt_offers_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("passt.sock");
    let Some(mut passt) = start(&socket) else {
        return;
    };
    let end = Instant::now() + Duration::from_secs(10);
    let backend = loop {
        if let Ok(backend) = Stream::connect(&socket) {
            break backend;
        }
        if let Ok(Some(status)) = passt.0.try_wait() {
            println!("skipped: passt does not run here: {status}");
            return;
        }
        assert!(Instant::now() < end, "passt does not listen");
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut guest = Guest::boot(Box::new(backend), MERGEABLE, 1536);
    guest.send(&discover());
    loop {
        let packet = guest.receive();
        let frame = &packet[HEADER_LEN..];
        // UDP from the server's port to the client's: a reply with our transaction's number.
        if frame.get(12..14) == Some(&[8, 0]) && frame[23] == 17 && frame[34..38] == [0, 67, 0, 68]
        {
            assert_eq!(frame[42], 2, "not a reply");
            assert_eq!(frame[46..50], [0x12, 0x34, 0x56, 0x78]);
            assert_ne!(frame[58..62], [0; 4], "no address was offered");
            break;
        }
    }
    // passt leaves with its only client: the link goes down when it is killed before.
    drop(passt);
    let end = Instant::now() + Duration::from_secs(5);
    while guest.config_status() != 0 {
        assert!(Instant::now() < end, "the link is still up");
        guest.wait(Duration::from_millis(50));
    }
}
