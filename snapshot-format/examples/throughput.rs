//! How fast snapshots are written, opened and verified: `throughput <directory> [MiB]`.
//!
//! A quarter of the image's chunks are zero, the others hold noise. Everything is in the page cache.
#![allow(clippy::print_stdout, reason = "printing is what this program is for")]

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use offshoot_snapshot_format::*;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let store = arguments
        .next()
        .ok_or("usage: throughput <directory> [MiB]")?;
    let mib: u64 = arguments.next().as_deref().unwrap_or("1024").parse()?;

    let mut noise = vec![0; 1 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);

    let started = Instant::now();
    let mut writer = SnapshotWriter::create(Path::new(&store), SnapshotId::generate()?)?;
    let memory = writer.memory_image(MemoryLayout::new(&[Region {
        guest_start: 0,
        length: mib << 20,
    }])?)?;
    for index in 0..memory.layout().chunk_count() {
        if index % 4 == 0 {
            memory.zero_chunk(index)?;
        } else {
            memory.write_chunk(index, &noise)?;
        }
    }
    let memory = memory.finish()?;
    let filled = started.elapsed();
    let dir = writer.publish(memory, content())?;
    report("write", filled, mib);
    report("write and publish", started.elapsed(), mib);

    const TIMES: u32 = 100;
    let started = Instant::now();
    for _ in 0..TIMES {
        std::hint::black_box(read_requirements(&dir)?);
    }
    println!("read requirements: {:?}", started.elapsed() / TIMES);
    let started = Instant::now();
    for _ in 0..TIMES {
        std::hint::black_box(RawSnapshot::open(&dir)?);
    }
    println!("open: {:?}", started.elapsed() / TIMES);

    let snapshot = RawSnapshot::open(&dir)?;
    for _ in 0..3 {
        let started = Instant::now();
        let go_on = |_| ControlFlow::Continue(());
        snapshot.memory().prove(Verify::Eager, go_on)?;
        report("verify, all threads", started.elapsed(), mib);
    }
    let started = Instant::now();
    let mut bytes = vec![0; 1 << 20];
    for index in 0..mib {
        snapshot.memory().read_chunk(index, &mut bytes)?;
    }
    report("read chunks, one thread", started.elapsed(), mib);
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

fn report(what: &str, time: Duration, mib: u64) {
    let seconds = time.as_secs_f64();
    let milliseconds = seconds * 1e3;
    // Exact below 2^53 MiB.
    let rate = f64::from(u32::try_from(mib).unwrap_or(u32::MAX)) / 1024.0 / seconds;
    println!("{what}: {milliseconds:.0} ms, {rate:.2} GiB/s");
}

fn content() -> SnapshotContent {
    SnapshotContent {
        created: Timestamp::now(),
        requirements: Requirements {
            arch: Arch::X86_64,
            cpu_vendor: String::new(),
            cpu_baseline: String::new(),
            cpuid: vec![],
            xsave_size: 0,
            msrs: vec![],
            kvm_capabilities: vec![],
            tsc: None,
            devices: vec![],
        },
        disks: vec![],
        metadata: Metadata::default(),
        sections: vec![],
    }
}
