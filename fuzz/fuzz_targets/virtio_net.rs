//! virtio-net over a stream socket with a peer that sends whatever it likes, against a driver that
//! does anything.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use offshoot_devices::virtio::net::{Mac, Net, NetConfig, Stream};
use offshoot_fuzz::{Script, drive};

fuzz_target!(|input: (Vec<u8>, Script)| {
    let (from_peer, script) = input;
    let (guest, mut peer) = UnixStream::pair().expect("a socket pair");
    peer.set_nonblocking(true).expect("a socket");
    let _full = peer.write(&from_peer);
    let backend = Stream::new(guest).expect("a network backend");
    let mac = Mac::new([2, 0, 0, 0, 0, 1]).expect("an address");
    let config = NetConfig {
        mac,
        mtu: Some(1500),
    };
    let net = Net::new(config, Box::new(backend)).expect("a network device");
    drive(Arc::new(Mutex::new(net)), &script);
});
