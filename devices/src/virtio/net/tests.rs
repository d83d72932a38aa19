//! Real sockets, a real tap and a real passt on one side; a guest's driver on rings on the other.

mod guest;
mod passt;
mod tap;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{HEADER_LEN, MAX_FRAME, Mac, Net, NetConfig, NetState, OFFLOADS, Stream};
use crate::virtio::interrupt::CONFIG_CHANGE;
use crate::virtio::{SetupError, VirtioDevice};
use guest::{Guest, MERGEABLE, config};

fn pair() -> (Box<Stream>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    theirs
        .set_write_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    (Box::new(Stream::new(ours).unwrap()), theirs)
}

fn write_frame(peer: &mut UnixStream, frame: &[u8]) {
    let mut message = u32::try_from(frame.len()).unwrap().to_be_bytes().to_vec();
    message.extend(frame);
    peer.write_all(&message).unwrap();
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn frame(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i * 31 + seed * 7) >> 2).to_le_bytes()[0])
        .collect()
}

/// Lengths from the smallest frame to the largest, in no order.
fn lengths() -> impl Iterator<Item = usize> {
    (0..200usize)
        .map(|i| 14 + (i * 7919 * 13) % (MAX_FRAME - 13))
        .chain([14, 15, 1514, MAX_FRAME])
}

#[test]
fn frames_of_all_sizes_go_both_ways() {
    for (features, rx_size) in [(MERGEABLE, 1536), (0, 65562)] {
        let (backend, mut peer) = pair();
        let mut guest = Guest::boot(backend, features, rx_size);
        guest.fragment = true;
        let echo = std::thread::spawn(move || {
            for _ in lengths() {
                let frame = read_frame(&mut peer);
                write_frame(&mut peer, &frame);
            }
        });
        for (i, len) in lengths().enumerate() {
            let sent = frame(len, i);
            guest.send(&sent);
            let got = guest.receive();
            assert_eq!(got[..10], [0; 10]);
            assert!(
                got[HEADER_LEN..] == sent,
                "frame {i} of {len} bytes differs"
            );
        }
        echo.join().unwrap();
    }
}

#[test]
fn a_peer_that_sends_in_drops_is_understood() {
    let (backend, mut peer) = pair();
    let mut guest = Guest::boot(backend, MERGEABLE, 1536);
    let sent: Vec<_> = (0..20).map(|i| frame(60 + i, i)).collect();
    let mut bytes = Vec::new();
    for frame in &sent {
        bytes.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
        bytes.extend(frame);
    }
    for chunk in bytes.chunks(7) {
        peer.write_all(chunk).unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    for frame in &sent {
        assert_eq!(guest.receive()[HEADER_LEN..], frame[..]);
    }
}

#[test]
fn a_peer_that_reads_nothing_holds_the_frames_back_in_order() {
    let (backend, mut peer) = pair();
    let mut guest = Guest::boot(backend, MERGEABLE, 1536);
    let mut sent = 0;
    let end = Instant::now() + Duration::from_secs(5);
    // Until both the socket and the driver's slots are full.
    let mut idle = 0;
    while idle < 20 {
        assert!(Instant::now() < end);
        if guest.try_send([0; HEADER_LEN], &frame(9000, sent)) {
            sent += 1;
            idle = 0;
        } else {
            std::thread::sleep(Duration::from_millis(5));
            idle += 1;
        }
    }
    assert!(guest.tx_pending() > 0);
    for i in 0..sent {
        assert!(read_frame(&mut peer) == frame(9000, i), "frame {i} differs");
    }
    let end = Instant::now() + Duration::from_secs(5);
    while guest.tx_pending() > 0 {
        assert!(Instant::now() < end, "frames are left");
    }
}

#[test]
fn a_guest_without_buffers_gets_its_frames_later() {
    let (backend, mut peer) = pair();
    let mut guest = Guest::boot_with(backend, MERGEABLE, 1536, 0);
    let feeder = std::thread::spawn(move || {
        for i in 0..300 {
            write_frame(&mut peer, &frame(5000, i));
        }
        peer
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.try_receive().is_none());
    // Too few for one packet, then enough.
    guest.post_more(2);
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.try_receive().is_none());
    guest.post_more(2);
    for i in 0..300 {
        assert!(
            guest.receive()[HEADER_LEN..] == frame(5000, i),
            "frame {i} differs"
        );
    }
    drop(feeder.join().unwrap());
}

/// virtio 1.2, 5.1.6.4: without mergeable buffers a packet is in one chain or not there.
#[test]
fn a_frame_that_fits_no_buffer_is_dropped_and_the_next_one_comes() {
    for features in [0, MERGEABLE] {
        let (backend, mut peer) = pair();
        // With mergeable buffers all 256 that a queue can have are too small.
        let rx_size = if features == 0 { 1536 } else { 200 };
        let mut guest = Guest::boot_with(backend, features, rx_size, 256);
        write_frame(&mut peer, &frame(60000, 1));
        write_frame(&mut peer, &frame(100, 2));
        assert_eq!(guest.receive()[HEADER_LEN..], frame(100, 2)[..]);
    }
}

#[test]
fn the_link_goes_down_with_the_peer() {
    for over_long in [false, true] {
        let (backend, mut peer) = pair();
        let mut guest = Guest::boot(backend, MERGEABLE, 1536);
        assert_eq!(guest.config_status(), 1);
        let kept = if over_long {
            peer.write_all(&65551u32.to_be_bytes()).unwrap();
            Some(peer)
        } else {
            drop(peer);
            None
        };
        assert!(guest.wait(Duration::from_secs(5)));
        assert_eq!(guest.interrupt.status() & CONFIG_CHANGE, CONFIG_CHANGE);
        assert_eq!(guest.config_status(), 0);
        assert!(!guest.device.lock().unwrap().link_up());
        // What is sent is lost, not stuck.
        for i in 0..200 {
            guest.send(&frame(100, i));
        }
        drop(kept);
        assert!(!guest.device.lock().unwrap().needs_reset());
    }
}

#[test]
fn chains_that_hold_no_frame_are_used_up() {
    let (backend, mut peer) = pair();
    let mut guest = Guest::boot(backend, MERGEABLE, 1536);
    let area = 0x4_0000;
    let (tx, memory) = (&mut guest.tx, &guest.memory);
    tx.add(memory, &[(area, 11, false)]).unwrap();
    tx.add(memory, &[(area, 12, false)]).unwrap();
    tx.add(memory, &[(area, 100, true)]).unwrap();
    tx.add(memory, &[(area, 12, false), (area, 100, true)])
        .unwrap();
    tx.add(memory, &[(area, 12 + 65551, false)]).unwrap();
    tx.add(memory, &[(area, u32::MAX, false), (area, u32::MAX, false)])
        .unwrap();
    tx.add(memory, &[(u64::MAX - 50, 100, false)]).unwrap();
    let looping = tx.add(memory, &[(area, 100, false)]).unwrap();
    tx.descriptor(memory, looping, (area, 1), 1, looping);
    guest.kick();
    let end = Instant::now() + Duration::from_secs(5);
    let mut used = 0;
    while used < 8 {
        used += usize::from(guest.tx.used(&guest.memory).is_some());
        assert!(Instant::now() < end);
    }
    guest.send(&frame(100, 1));
    assert_eq!(
        read_frame(&mut peer),
        frame(100, 1),
        "nothing else was sent"
    );
    assert!(!guest.device.lock().unwrap().needs_reset());
}

/// virtio 1.2, 2.7.13.3: the available index never runs more than a queue ahead.
#[test]
fn a_wild_available_index_needs_a_reset() {
    let (backend, _peer) = pair();
    let mut guest = Guest::boot(backend, MERGEABLE, 1536);
    guest.tx.avail = 4000;
    guest.tx.publish(&guest.memory, 0);
    guest.kick();
    let end = Instant::now() + Duration::from_secs(5);
    while !guest.device.lock().unwrap().needs_reset() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.interrupt.status() & CONFIG_CHANGE, CONFIG_CHANGE);
    guest.device.lock().unwrap().reset();
    assert!(!guest.device.lock().unwrap().needs_reset());
}

#[test]
fn a_quiesced_device_moves_nothing_until_it_resumes() {
    let (backend, mut peer) = pair();
    let mut guest = Guest::boot(backend, MERGEABLE, 1536);
    guest.quiesce();
    write_frame(&mut peer, &frame(100, 1));
    assert!(guest.try_send([0; HEADER_LEN], &frame(100, 2)));
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.try_receive().is_none());
    assert_eq!(guest.tx_pending(), 1);
    guest.device.lock().unwrap().resume().unwrap();
    assert_eq!(guest.receive()[HEADER_LEN..], frame(100, 1)[..]);
    assert_eq!(read_frame(&mut peer), frame(100, 2));
}

#[test]
fn saved_state_comes_back_and_is_checked() {
    let (backend, _peer) = pair();
    let guest = Guest::boot(backend, MERGEABLE, 1536);
    guest.quiesce();
    let state = guest.device.lock().unwrap().save();
    let other = Mac::new([2, 0, 0, 0, 0, 9]).unwrap();
    let copy = Net::restore(&state, Some(other), pair().0).unwrap();
    assert_eq!(copy.features(), guest.device.lock().unwrap().features());
    let mut raw = [0; 14];
    copy.read_config(0, &mut raw);
    assert_eq!(raw, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xdc, 5, 0, 0]);
    assert_eq!(
        copy.save(),
        NetState {
            mac: other,
            negotiated: None,
            ..state
        }
    );

    // A guest of a tap that uses its offloads cannot move to a socket.
    let tapped = NetState {
        offered_offloads: OFFLOADS,
        negotiated: Some(1 << 11),
        ..state
    };
    let error = Net::restore(&tapped, None, pair().0).unwrap_err();
    let SetupError::MissingOffload { feature } = error else {
        panic!("{error}")
    };
    assert_eq!(feature, "VIRTIO_NET_F_HOST_TSO4");
    // One that took none of them can.
    let plain = NetState {
        negotiated: Some(MERGEABLE),
        ..tapped
    };
    Net::restore(&plain, None, pair().0).unwrap();

    for bad in [
        NetState {
            offered_offloads: 1 << 3,
            ..state
        },
        NetState {
            negotiated: Some(1),
            ..state
        },
    ] {
        let error = Net::restore(&bad, None, pair().0).unwrap_err();
        assert!(
            matches!(
                error,
                SetupError::State {
                    device: "network",
                    ..
                }
            ),
            "{error}"
        );
    }
    let group = r"cannot be a card's Ethernet address";
    assert!(
        Mac::new([1, 0, 0, 0, 0, 0])
            .unwrap_err()
            .to_string()
            .contains(group)
    );
    let tiny = NetConfig {
        mtu: Some(67),
        ..config()
    };
    assert!(matches!(
        Net::new(tiny, pair().0).unwrap_err(),
        SetupError::Mtu { mtu: 67 }
    ));
}

/// Not a check but a measurement: `cargo test --release net::tests::measure -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn measure() {
    for len in [1514, MAX_FRAME] {
        let (backend, mut peer) = pair();
        let mut guest = Guest::boot(backend, MERGEABLE, 4096);
        let count = if len > 2000 { 20_000 } else { 300_000 };
        let sink = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            let mut left = count * (len + 4);
            while left > 0 {
                left -= peer.read(&mut buffer).unwrap();
            }
            peer
        });
        let data = frame(len, 1);
        let start = Instant::now();
        for _ in 0..count {
            guest.send(&data);
        }
        let mut peer = sink.join().unwrap();
        let out = start.elapsed();
        let source = std::thread::spawn(move || {
            let mut message = u32::try_from(len).unwrap().to_be_bytes().to_vec();
            message.extend(frame(len, 2));
            for _ in 0..count {
                peer.write_all(&message).unwrap();
            }
            peer
        });
        let start = Instant::now();
        for _ in 0..count {
            guest.receive();
        }
        let back = start.elapsed();
        drop(source.join().unwrap());
        let rate = |time: Duration| (count * len) as f64 / time.as_secs_f64() / 1048576.0;
        println!(
            "frames of {len}: out {:.0} MiB/s, in {:.0} MiB/s",
            rate(out),
            rate(back)
        );
    }
}
