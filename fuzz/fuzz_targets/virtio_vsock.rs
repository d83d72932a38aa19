//! virtio-vsock with real host sockets against a driver that does anything.
#![no_main]

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use offshoot_devices::virtio::vsock::{GuestCid, Vsock, VsockBinding};
use offshoot_fuzz::{Script, drive};

/// What the guest may connect to: ports 0 and 1 of the host.
struct Peers {
    path: PathBuf,
    listeners: Vec<UnixListener>,
}

static PEERS: LazyLock<Peers> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("offshoot-fuzz-{}.vsock", std::process::id()));
    let listeners = [0, 1].map(|port| {
        let path = format!("{}_{port}", path.display());
        let _stale = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        listener
    });
    Peers {
        path,
        listeners: listeners.into(),
    }
});

fuzz_target!(|script: Script| {
    let mut binding = VsockBinding::new(&PEERS.path);
    binding.replace_stale = true;
    let vsock = Vsock::new(GuestCid::new(3).expect("a CID"), binding).expect("a vsock");
    // A host program that asks for a connection and has something to say at once.
    let mut host = UnixStream::connect(&PEERS.path).expect("the host side");
    host.write_all(b"CONNECT 1024\nhello")
        .expect("the host side");
    drive(Arc::new(Mutex::new(vsock)), &script);
    // Connections that the guest made are not kept for the next run.
    for listener in &PEERS.listeners {
        while listener.accept().is_ok() {}
    }
});
