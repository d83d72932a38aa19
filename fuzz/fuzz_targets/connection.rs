//! The state machine of one vsock connection: no order of packets and host events may panic, hang,
//! or make the guest's credit larger than what it announced.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use offshoot_devices::virtio::vsock::connection::Connection;
use offshoot_devices::virtio::vsock::packet::Header;

#[derive(Debug, Arbitrary)]
enum Event {
    Packet {
        op: u16,
        len: u32,
        flags: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
    },
    Forwarded(u32),
    HostEnd,
    HostDeaf,
    Next {
        host_readable: bool,
        sent: u32,
    },
}

fuzz_target!(|input: (bool, u32, Vec<Event>)| {
    let (from_host, buf_alloc, events) = input;
    let mut connection = if from_host {
        Connection::from_host()
    } else {
        Connection::from_guest(&Header {
            buf_alloc,
            ..Header::default()
        })
    };
    for event in events.iter().take(256) {
        match *event {
            Event::Packet {
                op,
                len,
                flags,
                buf_alloc,
                fwd_cnt,
            } => {
                let header = Header {
                    op,
                    len,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                    ..Header::default()
                };
                let _reaction = connection.on_packet(&header);
                assert!(
                    connection.guest_room() <= buf_alloc,
                    "more room than was announced"
                );
            }
            // The device forwards only what it holds, and sends only what there is room for.
            Event::Forwarded(bytes) => connection.on_forwarded(bytes.min(connection.buffered())),
            Event::HostEnd => connection.on_host_end(),
            Event::HostDeaf => connection.on_host_deaf(),
            Event::Next {
                host_readable,
                sent,
            } => {
                if connection.next(host_readable).is_some() {
                    connection.on_sent(sent.min(connection.guest_room()));
                    connection.stamp(&mut Header::default());
                }
            }
        }
    }
});
