//! Busy guests are forked: live, and from a snapshot.

use std::thread;
use std::time::Duration;

use offshoot::agent::WriteOptions;
use offshoot_snapshot_format::Verify;
use offshoot_vmm::SaveOptions;
use offshoot_vmm::worker::Worker;

use crate::Failure;
use crate::load::{self, Progress};
use crate::sandbox::{Identities, PATIENCE, Place, Sandbox, soon};

const CPUS: u8 = 2;
/// How long a snapshot lies there: longer than a monotonic clock may seem to jump.
const AT_REST: Duration = Duration::from_secs(6);
/// What is in memory only, from before any fork.
const KEPT: (&str, &[u8]) = ("/run/kept", b"from before the fork");

pub(crate) fn live() -> Result<(), Failure> {
    let (place, source) = Place::boot("live-forks", CPUS)?;
    let mut identities = Identities::default();
    identities.add(&source)?;
    let spinning = load::start(&source)?;
    source.agent.write_file(KEPT.0, KEPT.1, soon())?;
    leave_mark(&source)?;
    let mut children = Vec::new();
    for name in ["child-1", "child-2", "child-3"] {
        let before = load::progress(&source)?;
        let mut child = place
            .fork(&source.worker, &[name])?
            .pop()
            .ok_or("no child")?;
        is_right(&mut child, before, &mut identities, &["source"])?;
        // Emulation has one processor for all that compute.
        spinning.end(&child)?;
        children.push(child);
        if name != "child-1" {
            end_busy(&place, children.pop().ok_or("no child")?)?;
        }
    }
    spinning.end(&source)?;
    has_marks(&source, &["source"])?;
    end_busy(&place, source)?;

    // A child does not need its source.
    let mut child = children.pop().ok_or("no child")?;
    let spinning = load::spin(&child)?;
    let before = load::progress(&child)?;
    let mut grandchild = place
        .fork(&child.worker, &["grandchild"])?
        .pop()
        .ok_or("no grandchild")?;
    let marks = ["child-1", "source"];
    is_right(&mut grandchild, before, &mut identities, &marks)?;
    spinning.end(&child)?;
    has_marks(&child, &marks)?;
    end_busy(&place, grandchild)?;
    load::goes_on(&child, before)?;
    child.no_alarm()?;
    child.power_off()?;
    place.check_disk("child-1", false)?;
    place.end()
}

/// Stops a guest in the middle of its work, when that went on up to now.
fn end_busy(place: &Place, mut sandbox: Sandbox) -> Result<(), Failure> {
    load::goes_on(&sandbox, load::progress(&sandbox)?)?;
    sandbox.no_alarm()?;
    sandbox.worker.stop(PATIENCE)?;
    place.check_disk(&sandbox.name, true)
}

pub(crate) fn by_snapshot() -> Result<(), Failure> {
    let (place, mut source) = Place::boot("fork-snapshot", CPUS)?;
    let mut identities = Identities::default();
    identities.add(&source)?;
    let spinning = load::start(&source)?;
    source.agent.write_file(KEPT.0, KEPT.1, soon())?;
    leave_mark(&source)?;
    let before = load::progress(&source)?;
    let writing = source
        .worker
        .snapshot(&place.snapshots(), SaveOptions::new()?, PATIENCE)?;
    println!("the source stood {:?}", writing.source_pause);
    // The source goes on while the snapshot is written, and after.
    load::goes_on(&source, before)?;
    let saved = writing.wait(|_, _| (), PATIENCE)?;
    source.sh("touch /mnt/mark-later; sync")?;
    load::goes_on(&source, before)?;
    source.no_alarm()?;
    spinning.end(&source)?;

    thread::sleep(AT_REST);
    let (template, _) = Worker::template(&place.program, &saved.path, Verify::Eager, PATIENCE)?;
    let mut copies = place.fork(&template, &["copy-1", "copy-2"])?;
    for copy in &mut copies {
        is_right(copy, before, &mut identities, &["source"])?;
        spinning.end(copy)?;
    }
    has_marks(&source, &["later", "source"])?;
    template.stop(PATIENCE)?;
    copies.push(source);
    for copy in copies {
        end_busy(&place, copy)?;
    }
    place.end()
}

/// Takes the identity, and has all that a copy should have and nothing that it should not.
fn is_right(
    copy: &mut Sandbox,
    before: Progress,
    identities: &mut Identities,
    marks: &[&str],
) -> Result<(), Failure> {
    copy.identify()?;
    identities.add(copy)?;
    if copy.agent.read_file(KEPT.0, 1 << 10, soon())? != KEPT.1 {
        return Err(format!("{} has lost a file in memory", copy.name).into());
    }
    load::goes_on(copy, before)?;
    load::time_is_right(copy)?;
    has_marks(copy, marks)?;
    leave_mark(copy)?;
    copy.no_alarm()
}

/// Writes a file with the guest's name to its disk.
fn leave_mark(sandbox: &Sandbox) -> Result<(), Failure> {
    let options = WriteOptions {
        sync: true,
        ..WriteOptions::default()
    };
    let path = format!("/mnt/mark-{}", sandbox.name);
    sandbox
        .agent
        .write_from(path, &options, &mut &b"here"[..], soon())?;
    Ok(())
}

/// Fails unless exactly these have left their marks on the guest's disk.
fn has_marks(sandbox: &Sandbox, names: &[&str]) -> Result<(), Failure> {
    let found = sandbox.sh("cd /mnt; for mark in mark-*; do echo ${mark#mark-}; done")?;
    let found: Vec<_> = found.lines().collect();
    if found == names {
        Ok(())
    } else {
        Err(format!("{} has the marks {found:?}, not {names:?}", sandbox.name).into())
    }
}
