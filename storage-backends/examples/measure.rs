//! How long forks and freezes take: figures, not promises. Run with
//! `cargo run --release -p offshoot-storage --example measure -- reflink` (as root), or with
//! `--features qcow2-rs` and `qcow2-engines`.

#![allow(clippy::print_stdout, reason = "the figures are what this is for")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::IoSlice;
use std::time::{Duration, Instant};

use offshoot_storage::{Durability, LayerName, StorageBackend, Volume, VolumeName, open_backend};
use support::{FileSystem, Mounted};

const GIB: u64 = 1 << 30;

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("reflink") => reflink(),
        Some("qcow2-engines") => qcow2_engines(),
        _ => println!("say what to measure: reflink or qcow2-engines"),
    }
}

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

fn layer(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_micros();
    println!(
        "{what}: n {} p50 {} us, p95 {} us, max {} us",
        times.len(),
        at(50),
        at(95),
        at(100)
    );
}

/// A GiB of content in pieces of `piece` bytes, spread evenly over the volume.
fn scatter(vol: &dyn Volume, piece: usize) {
    let mut bytes = vec![0; piece];
    let pieces = GIB / piece as u64;
    let stride = vol.size() / pieces;
    for index in 0..pieces {
        bytes[..8].copy_from_slice(&(index + 1).to_le_bytes());
        vol.write_vectored_at(&[IoSlice::new(&bytes)], index * stride)
            .unwrap();
    }
    vol.flush().unwrap();
}

fn measure(store: &dyn StorageBackend, what: &str, piece: usize) {
    let rounds = if piece < 1 << 20 { 20 } else { 200 };
    let source = store.create(&volume("source"), 10 * GIB).unwrap();
    scatter(&*source, piece);
    let base = layer("base");
    store.freeze(source.name(), &base, Durability::Now).unwrap();
    let (mut forks, mut first_flush) = (Vec::new(), Vec::new());
    for index in 0..rounds {
        let name = volume(&format!("f{index}"));
        let start = Instant::now();
        let fork = store.fork(&base, &name).unwrap();
        forks.push(start.elapsed());
        fork.write_vectored_at(&[IoSlice::new(&[1; 4096])], 0)
            .unwrap();
        let start = Instant::now();
        fork.flush().unwrap();
        first_flush.push(start.elapsed());
    }
    report(&format!("{what}: fork"), forks);
    report(&format!("{what}: first flush"), first_flush);
    if piece < 1 << 20 {
        return;
    }
    for durability in [Durability::Deferred, Durability::Now] {
        for dirty in [0, 1 << 20, 64 << 20] {
            let mut times = Vec::new();
            for index in 0..20 {
                let bytes = vec![u8::try_from(index + 1).unwrap(); dirty];
                source
                    .write_vectored_at(&[IoSlice::new(&bytes)], 0)
                    .unwrap();
                let frozen = layer(&format!("{durability:?}-{dirty}-{index}"));
                let start = Instant::now();
                store.freeze(source.name(), &frozen, durability).unwrap();
                times.push(start.elapsed());
            }
            report(
                &format!("{what}: freeze {durability:?}, {} MiB dirty", dirty >> 20),
                times,
            );
        }
    }
}

fn reflink() {
    for file_system in [FileSystem::Btrfs, FileSystem::Xfs] {
        for piece in [16 << 20, 1 << 20, 64 << 10] {
            let Some(mounted) = Mounted::new(file_system, 12 << 10) else {
                return;
            };
            let store = open_backend("reflink", &mounted.path().join("store")).unwrap();
            let what = format!("reflink on {file_system:?}, pieces of {} KiB", piece >> 10);
            measure(&*store, &what, piece);
        }
    }
}

/// Both qcow2 engines do the same work on the same file system, one after the other.
fn qcow2_engines() {
    const SIZE: u64 = 256 << 20;
    for kind in ["qcow2:imago", "qcow2:qcow2-rs"] {
        let dir = tempfile::tempdir().unwrap();
        let store = match open_backend(kind, &dir.path().join("store")) {
            Ok(store) => store,
            Err(error) => {
                println!("{kind}: {error}");
                continue;
            }
        };
        let time = |what: &str, work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            println!("{kind}: {what}: {} ms", start.elapsed().as_millis());
        };
        let base = store.create(&volume("base"), SIZE).unwrap();
        let piece = vec![0x5a; 1 << 20];
        let mut block = vec![0xa5; 4096];
        time(
            "256 MiB written in order, 1 MiB each, and flushed",
            &mut || {
                for at in (0..SIZE).step_by(piece.len()) {
                    base.write_vectored_at(&[IoSlice::new(&piece)], at).unwrap();
                }
                base.flush().unwrap();
            },
        );
        store
            .freeze(base.name(), &layer("base"), Durability::Now)
            .unwrap();
        let fork = store.fork(&layer("base"), &volume("fork")).unwrap();
        let scattered = |i: u64| i * 0x9e37_79b9 % (SIZE / 4096) * 4096;
        time(
            "4000 first writes of 4 KiB to a fork, all over",
            &mut || {
                for i in 0..4000 {
                    fork.write_vectored_at(&[IoSlice::new(&block)], scattered(i))
                        .unwrap();
                }
            },
        );
        time("the flush after that", &mut || fork.flush().unwrap());
        time("40000 writes of 4 KiB over them", &mut || {
            for i in 0..40_000 {
                fork.write_vectored_at(&[IoSlice::new(&block)], scattered(i % 4000))
                    .unwrap();
            }
        });
        time("40000 reads of 4 KiB through the fork", &mut || {
            for i in 0..40_000 {
                let mut bufs = [std::io::IoSliceMut::new(&mut block)];
                fork.read_vectored_at(&mut bufs, scattered(i)).unwrap();
            }
        });
        let mut forks = Vec::new();
        for index in 0..50 {
            let name = volume(&format!("f{index}"));
            let start = Instant::now();
            drop(store.fork(&layer("base"), &name).unwrap());
            forks.push(start.elapsed());
        }
        report(&format!("{kind}: fork"), forks);
        for flushed in [false, true] {
            let mut freezes = Vec::new();
            for index in 0..12 {
                fork.write_vectored_at(&[IoSlice::new(&block)], 0).unwrap();
                if flushed {
                    fork.flush().unwrap();
                }
                let frozen = layer(&format!("l{flushed}-{index}"));
                let start = Instant::now();
                store
                    .freeze(fork.name(), &frozen, Durability::Deferred)
                    .unwrap();
                freezes.push(start.elapsed());
            }
            report(
                &format!("{kind}: freeze, flushed before: {flushed}"),
                freezes,
            );
        }
    }
}
