//! The pilot under QEMU's software emulation: a machine that is not ours, so that what the
//! pilot takes for the rules of PVH, ACPI and virtio is not just what Offshoot does.

mod guest;

use std::fs::File;
use std::os::unix::fs::FileExt;

use guest::{Failure, Guest, GuestOptions, qemu};
use offshoot_pilot::protocol::{
    BlkOp, Device, DeviceKind, Id, Mode, Outcome, Reply, Request, State, pattern,
};

type TestResult = Result<(), Failure>;

/// Skips the test when there is no QEMU; the macro's value is its path.
macro_rules! need_qemu {
    () => {
        match qemu() {
            Some(path) => path,
            None => {
                println!("skipped: qemu-system-x86_64 (package qemu-system-x86) is not installed");
                return Ok(());
            }
        }
    };
}

fn state(guest: &mut Guest) -> Result<State, Failure> {
    match guest.ask("state")? {
        Reply::State { state } => Ok(state),
        other => Err(format!("no report: {other}").into()),
    }
}

fn outcome(guest: &mut Guest, line: &str) -> Result<Outcome, Failure> {
    match guest.ask(line)? {
        Reply::Outcome { outcome } => Ok(outcome),
        other => Err(format!("no outcome: {other}").into()),
    }
}

fn device(state: &State, kind: DeviceKind) -> Result<Device, String> {
    let found = state
        .devices
        .as_slice()
        .iter()
        .find(|device| device.kind == kind);
    found
        .copied()
        .ok_or_else(|| format!("no {kind} in the report"))
}

#[test]
fn boots_by_pvh_and_finds_its_devices() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    assert!(
        guest.ready.starts_with("offshoot-pilot 1 ready "),
        "{}",
        guest.ready
    );
    assert!(
        guest.ready.ends_with(" vcpus=1 blk=1 net=1 vsock=0 rng=1"),
        "{}",
        guest.ready
    );
    let first = state(&mut guest)?;
    assert!(first.ram > 100 << 20 && first.ram <= 128 << 20, "{first}");
    assert!(first.owned > 90 << 20 && first.owned < first.ram, "{first}");
    assert_eq!(device(&first, DeviceKind::Blk)?.value, guest::DISK_BYTES);
    assert_eq!(
        device(&first, DeviceKind::Net)?.value.to_le_bytes()[..6],
        guest::MAC
    );
    assert_ne!(
        device(&first, DeviceKind::Rng)?.features & 1 << 32,
        0,
        "virtio 1.2, 6: VERSION_1"
    );
    assert_ne!(first.boot_id, Id::default());
    let second = state(&mut guest)?;
    // Both may be answered in one turn of its loop.
    assert!(second.counter >= first.counter);
    assert_eq!(second.boot_id, first.boot_id);
    assert_eq!(second.requests, first.requests + 1);
    Ok(())
}

#[test]
fn finds_devices_by_acpi_when_the_command_line_is_silent() -> TestResult {
    let options = GuestOptions {
        machine: "auto-kernel-cmdline=off,acpi=on",
        ..Default::default()
    };
    let guest = Guest::boot(&need_qemu!(), options)?;
    assert!(
        guest.ready.ends_with(" vcpus=1 blk=1 net=1 vsock=0 rng=1"),
        "{}",
        guest.ready
    );
    Ok(())
}

#[test]
fn works_without_acpi_and_with_the_first_interrupt_controller() -> TestResult {
    let options = GuestOptions {
        machine: "acpi=off",
        ..Default::default()
    };
    let mut guest = Guest::boot(&need_qemu!(), options)?;
    assert!(
        guest.ready.ends_with(" vcpus=1 blk=1 net=1 vsock=0 rng=1"),
        "{}",
        guest.ready
    );
    let done = outcome(&mut guest, "blk op=write seed=1 len=1048576")?;
    assert_eq!(done.bytes, 1 << 20);
    Ok(())
}

#[test]
fn every_processor_counts() -> TestResult {
    let options = GuestOptions {
        cpus: 3,
        ..Default::default()
    };
    let mut guest = Guest::boot(&need_qemu!(), options)?;
    assert!(guest.ready.contains(" vcpus=3 "), "{}", guest.ready);
    for mode in [Mode::Halt, Mode::Poll] {
        guest.ask(&Request::SetMode { mode }.to_string())?;
        let before = state(&mut guest)?;
        std::thread::sleep(std::time::Duration::from_millis(200));
        let after = state(&mut guest)?;
        let pairs = before.vcpus.as_slice().iter().zip(after.vcpus.as_slice());
        assert_eq!(pairs.clone().count(), 3);
        assert!(
            pairs.clone().all(|(before, after)| before < after),
            "{before}\n{after}"
        );
    }
    Ok(())
}

#[test]
fn memory_keeps_its_pattern_until_it_is_changed() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    let owned = state(&mut guest)?.owned;
    assert_eq!(outcome(&mut guest, "fill seed=7")?.bytes, owned);
    assert_eq!(outcome(&mut guest, "touch")?.units, owned / 4096);
    let good = outcome(&mut guest, "verify seed=7")?;
    assert_eq!((good.bytes, good.bad, good.first_bad), (owned, 0, u64::MAX));
    // One page of another pattern is found, word for word.
    outcome(&mut guest, "fill seed=8 offset=1048576 len=4096")?;
    let spoilt = outcome(&mut guest, "verify seed=7")?;
    assert_eq!((spoilt.bad, spoilt.first_bad), (512, 1 << 20));
    assert_eq!(
        outcome(&mut guest, "verify seed=8 offset=1048576 len=4096")?.bad,
        0
    );
    Ok(())
}

#[test]
fn dirtying_runs_at_its_rate_and_changes_nothing() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    outcome(&mut guest, "fill seed=3 len=1048576")?;
    guest.ask("dirty len=1048576 rate=500")?;
    let begin = state(&mut guest)?;
    assert!(begin.tsc_khz > 100_000, "{begin}");
    std::thread::sleep(std::time::Duration::from_secs(1));
    let end = state(&mut guest)?;
    let rate = (end.dirtied - begin.dirtied) * begin.tsc_khz * 1000 / (end.tsc - begin.tsc);
    // An upper bound that holds always; a lower one that allows for a loaded host.
    assert!((50..=510).contains(&rate), "{rate} pages a second");
    guest.ask("dirty rate=0")?;
    let (stopped, later) = (state(&mut guest)?, state(&mut guest)?);
    assert_eq!(stopped.dirtied, later.dirtied);
    assert_eq!(outcome(&mut guest, "verify seed=3 len=1048576")?.bad, 0);
    Ok(())
}

#[test]
fn disk_holds_what_was_written_and_nothing_else() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    let work = |op, offset, len, depth| Request::Blk {
        device: 0,
        op,
        offset,
        len,
        seed: 99,
        chunk: 16384,
        depth,
    };
    let mib = 1 << 20;
    for (mode, depth) in [(Mode::Halt, 1), (Mode::Poll, 20)] {
        guest.ask(&Request::SetMode { mode }.to_string())?;
        let offset = mib * u64::from(depth);
        let written = outcome(
            &mut guest,
            &work(BlkOp::Write, offset, mib, depth).to_string(),
        )?;
        assert_eq!((written.bytes, written.units), (mib, 64));
        let read = outcome(
            &mut guest,
            &work(BlkOp::Verify, offset, mib, depth).to_string(),
        )?;
        assert_eq!((read.bytes, read.bad), (mib, 0));
        outcome(&mut guest, &work(BlkOp::Flush, 0, 0, 1).to_string())?;
        // The host sees the same bytes at the same place.
        let mut bytes = vec![0; usize::try_from(mib)?];
        let disk = File::open(guest.disk())?;
        disk.read_exact_at(&mut bytes, offset)?;
        assert_eq!(pattern::compare(&bytes, 99, offset), (0, None));
        disk.read_exact_at(&mut bytes, offset + mib)?;
        assert!(bytes.iter().all(|byte| *byte == 0), "written past the end");
    }
    let wrong = outcome(&mut guest, &work(BlkOp::Verify, 0, mib, 4).to_string())?;
    assert_eq!((wrong.bad, wrong.first_bad), (mib / 8, 0));
    outcome(&mut guest, &work(BlkOp::Zero, mib, mib / 2, 4).to_string())?;
    assert_eq!(
        outcome(
            &mut guest,
            &work(BlkOp::VerifyZero, mib, mib / 2, 4).to_string()
        )?
        .bad,
        0
    );
    outcome(
        &mut guest,
        &work(BlkOp::Discard, 20 * mib, mib, 4).to_string(),
    )?;
    let end = guest.ask("blk op=read offset=33553920 len=1024")?;
    assert_eq!(
        end.to_string(),
        format!("refused code=out-of-range detail={}", guest::DISK_BYTES)
    );
    let odd = guest.ask("blk op=read offset=100 len=512")?;
    assert_eq!(odd.to_string(), "refused code=misaligned detail=512");
    let none = guest.ask("blk device=1 op=flush")?;
    assert_eq!(none.to_string(), "refused code=no-device detail=1");
    Ok(())
}

#[test]
fn network_card_answers_and_asks() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    guest.ask("net-address ip=10.9.8.7")?;
    let mut wire = guest.wire()?;
    let host = [2, 0, 0, 0, 0, 1];

    // RFC 826.
    let mut arp = guest::frame([0xff; 6], host, 0x0806);
    arp.extend([
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 9, 8, 1, 0, 0, 0, 0, 0, 0, 10, 9, 8, 7,
    ]);
    wire.send(&arp)?;
    let answer = wire.receive()?;
    assert_eq!(answer[..14], guest::frame(host, guest::MAC, 0x0806));
    assert_eq!(
        answer[14..28],
        [&[0, 1, 8, 0, 6, 4, 0, 2][..], &guest::MAC].concat()
    );
    assert_eq!(
        answer[28..42],
        [&[10, 9, 8, 7][..], &host, &[10, 9, 8, 1]].concat()
    );

    // Not its address: no answer, and the next frame's answer is the next one on the wire.
    *arp.last_mut().ok_or("empty")? = 6;
    wire.send(&arp)?;

    // RFC 792.
    let mut icmp = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    icmp.extend(b"is anybody there?");
    let sum = guest::internet_checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    wire.send(&guest::ipv4(host, 1, [10, 9, 8, 1], [10, 9, 8, 7], &icmp))?;
    let answer = wire.receive()?;
    assert_eq!(answer[26..34], [10, 9, 8, 7, 10, 9, 8, 1]);
    assert_eq!(
        guest::internet_checksum(&answer[14..34]),
        0,
        "header checksum"
    );
    assert_eq!(answer[34], 0, "echo reply");
    assert_eq!(
        guest::internet_checksum(&answer[34..34 + icmp.len()]),
        0,
        "ICMP checksum"
    );
    assert_eq!(answer[38..34 + icmp.len()], icmp[4..]);

    // RFC 862.
    let udp = [&[0x30, 0x39, 0, 7, 0, 12, 0, 0][..], b"ping"].concat();
    wire.send(&guest::ipv4(host, 17, [10, 9, 8, 1], [10, 9, 8, 7], &udp))?;
    let answer = wire.receive()?;
    assert_eq!(
        answer[34..46],
        [&[0, 7, 0x30, 0x39, 0, 12, 0, 0][..], b"ping"].concat()
    );

    // The pilot asks, and the host sends back what it gets.
    let echo = wire.echo_in_background(5)?;
    let pinged = outcome(&mut guest, "net-ping frames=5 len=1400")?;
    assert_eq!(
        (pinged.units, pinged.bytes, pinged.received, pinged.bad),
        (5, 7000, 7000, 0)
    );
    let mut wire = echo.join().map_err(|_| "the echo died")??;

    outcome(&mut guest, "net-send frames=50 len=500")?;
    for _ in 0..50 {
        let frame = wire.receive()?;
        assert_eq!(
            (frame.len(), &frame[6..14]),
            (514, &[&guest::MAC[..], &[0x88, 0xb5]].concat()[..])
        );
    }
    let state = state(&mut guest)?;
    assert_eq!((state.frames_in, state.frames_out), (4 + 5, 3 + 5 + 50));
    Ok(())
}

#[test]
fn memory_goes_to_the_host_and_comes_back() -> TestResult {
    const MIB: u64 = 1 << 20;
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    let owned = state(&mut guest)?.owned;
    outcome(&mut guest, "fill seed=5")?;
    // Reported pages are zero afterwards, and no others.
    let reported = outcome(&mut guest, "report offset=4194304 len=8388608")?;
    assert_eq!(reported.bytes, 8 * MIB);
    let bad = outcome(&mut guest, "verify seed=5")?;
    assert_eq!((bad.bad, bad.first_bad), (MIB, 4 * MIB));
    outcome(&mut guest, "fill seed=5")?;

    let target = |mib: u64| {
        let bytes = mib * MIB;
        format!(r#"{{"execute":"balloon","arguments":{{"value":{bytes}}}}}"#)
    };
    guest.command(&target(96))?;
    let inflated = outcome(&mut guest, "balloon")?;
    assert_eq!((inflated.bytes, inflated.units), (32 * MIB, 32));
    assert_eq!(state(&mut guest)?.owned, owned - 32 * MIB);
    let kept = outcome(&mut guest, "verify seed=5")?;
    assert_eq!((kept.bytes, kept.bad), (owned - 32 * MIB, 0));

    guest.command(&target(120))?;
    assert_eq!(outcome(&mut guest, "balloon")?.bytes, 8 * MIB);
    assert_eq!(state(&mut guest)?.owned, owned - 8 * MIB);
    let back = outcome(&mut guest, "verify seed=5")?;
    assert_eq!((back.bad, back.first_bad), (3 * MIB, owned - 32 * MIB));
    Ok(())
}

#[test]
fn random_bytes_differ() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    let mut seen = Vec::new();
    for _ in 0..3 {
        match guest.ask("random len=64")? {
            Reply::Random { bytes } => seen.push(bytes.0.as_slice().to_vec()),
            other => return Err(format!("no bytes: {other}").into()),
        }
    }
    assert!(seen.iter().all(|bytes| bytes.len() == 64));
    assert!(seen[0] != seen[1] && seen[1] != seen[2]);
    Ok(())
}

#[test]
fn bad_lines_are_refused_and_change_nothing() -> TestResult {
    let mut guest = Guest::boot(&need_qemu!(), GuestOptions::default())?;
    let long = "x".repeat(3000);
    for line in [
        "nonsense",
        "fill",
        "fill seed=z",
        "fill seed=1 seed=2",
        "blk op=eat",
        &long,
    ] {
        let reply = guest.ask(line)?.to_string();
        assert!(
            reply.starts_with("refused code=malformed"),
            "{line}: {reply}"
        );
    }
    let odd = guest.ask("fill seed=1 offset=4")?.to_string();
    assert_eq!(odd, "refused code=misaligned detail=8");
    let far = guest
        .ask("verify seed=1 offset=0xfffffffffffffff8 len=16")?
        .to_string();
    assert!(far.starts_with("refused code=out-of-range"), "{far}");
    assert_eq!(state(&mut guest)?.requests, 3);
    Ok(())
}

#[test]
fn deaths_are_readable() -> TestResult {
    let qemu = need_qemu!();
    for (how, words) in [
        ("page-fault", "pilot-fault vector=14 code=0x4 "),
        ("invalid-opcode", "pilot-fault vector=6 code=0x0 "),
        ("panic", "pilot-panic "),
    ] {
        let mut guest = Guest::boot(&qemu, GuestOptions::default())?;
        guest.tell(&format!("crash how={how}"))?;
        let line = guest.line_after_blank()?;
        assert!(line.starts_with(words), "{how}: {line}");
    }
    Ok(())
}

#[test]
fn ends_by_triple_fault_and_by_reset() -> TestResult {
    let qemu = need_qemu!();
    for line in ["crash how=triple-fault", "reboot"] {
        let mut guest = Guest::boot(&qemu, GuestOptions::default())?;
        guest.tell(line)?;
        assert!(guest.ends()?, "{line}: the machine went on");
    }
    Ok(())
}
