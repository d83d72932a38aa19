//! Several users at once.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::pattern::{is_whole, layer, read, same, volume, write};
use super::{Bench, Failure, Rng, ensure, refused};
use crate::{Access, Durability, ErrorKind};

/// One writer alone, or any number of readers, within one store object and across two.
pub(super) fn locks(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let elsewhere = bench.open()?;
    let (name, frozen) = (volume("v")?, layer("l")?);
    let in_use = ErrorKind::InUse;
    let writer = store.create(&name, 64 << 10)?;
    for (view, what) in [
        (&store, "the same store"),
        (&elsewhere, "another view of it"),
    ] {
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let opened = view.open(&name, access);
            refused(
                opened,
                in_use,
                format_args!("opening for {access:?} in {what}"),
            )?;
        }
        refused(
            view.delete(&name),
            in_use,
            format_args!("deleting in {what}"),
        )?;
        refused(
            view.flatten(&name),
            in_use,
            format_args!("flattening in {what}"),
        )?;
    }
    let freeze = elsewhere.freeze(&name, &frozen, Durability::Now);
    refused(
        freeze,
        in_use,
        "freezing what is open for writing elsewhere",
    )?;
    ensure(store.layers()?.is_empty(), "a refused freeze left a layer")?;
    write(&*writer, 0, &[5; 512])?;
    // Looking is allowed, as far as there is something steady to look at.
    store.usage(&name)?;
    elsewhere.usage(&name)?;
    store.check(&name)?;
    if let Err(e) = elsewhere.check(&name) {
        refused::<()>(
            Err(e),
            in_use,
            "checking what is open for writing elsewhere",
        )?;
    }
    drop(writer);

    let readers = [
        store.open(&name, Access::ReadOnly)?,
        store.open(&name, Access::ReadOnly)?,
        elsewhere.open(&name, Access::ReadOnly)?,
    ];
    for view in [&store, &elsewhere] {
        let opened = view.open(&name, Access::ReadWrite);
        refused(opened, in_use, "writing beside readers")?;
        refused(view.delete(&name), in_use, "deleting under readers")?;
    }
    for reader in &readers {
        same(&**reader, 0, &[5; 512])?;
    }
    drop(readers);

    let writer = elsewhere.open(&name, Access::ReadWrite)?;
    refused(
        store.open(&name, Access::ReadOnly),
        in_use,
        "a reader beside a writer",
    )?;
    drop(writer);
    // A fork is locked from the moment it exists, and does not lock what it came from.
    store.freeze(&name, &frozen, Durability::Now)?;
    let fork = store.fork(&frozen, &volume("fork")?)?;
    let opened = elsewhere.open(fork.name(), Access::ReadOnly);
    refused(opened, in_use, "opening a fork elsewhere")?;
    drop(elsewhere.open(&name, Access::ReadWrite)?);
    drop(elsewhere.fork(&frozen, &volume("fork2")?)?);
    drop(fork);
    drop(elsewhere.open(&volume("fork")?, Access::ReadWrite)?);
    Ok(())
}

/// Requests that do not overlap do not disturb one another, with layers underneath and freezes
/// in between.
pub(super) fn threads_on_one_volume(bench: &Bench<'_>) -> Result<(), Failure> {
    const SLICE: usize = 300_000;
    let store = bench.open()?;
    let threads = bench.options.threads.max(2) as usize;
    let size = (SLICE * threads).next_multiple_of(512);
    let base = store.create(&volume("base")?, size as u64)?;
    let mut content = bench.rng().bytes(size);
    write(&*base, 0, &content)?;
    store.freeze(base.name(), &layer("base")?, Durability::Deferred)?;
    let vol = store.fork(&layer("base")?, &volume("v")?)?;
    for round in 0..3_u64 {
        let slices: Vec<_> = content.chunks_mut(SLICE).take(threads).collect();
        thread::scope(|scope| {
            let running: Vec<_> = slices
                .into_iter()
                .enumerate()
                .map(|(index, slice)| {
                    let vol = &*vol;
                    let rng = Rng::new(bench.options.seed ^ round << 32 ^ index as u64);
                    scope.spawn(move || hammer(vol, index * SLICE, slice, rng))
                })
                .collect();
            joined(running)
        })?;
        is_whole(&*vol, &content).map_err(|f| f.during(format_args!("round {round}")))?;
        let frozen = layer(&format!("round{round}"))?;
        store.freeze(vol.name(), &frozen, Durability::Deferred)?;
        is_whole(&*store.open_layer(&frozen)?, &content)?;
    }
    Ok(())
}

/// Random operations on one thread's own part of a volume.
fn hammer(
    vol: &dyn crate::Volume,
    start: usize,
    slice: &mut [u8],
    mut rng: Rng,
) -> Result<(), Failure> {
    for _ in 0..60 {
        let at = rng.index(slice.len() - 1);
        let len = 1 + rng.index((slice.len() - at).min(40_000));
        let offset = (start + at) as u64;
        let part = &mut slice[at..at + len];
        match rng.below(8) {
            0 => {
                vol.discard(offset, len as u64)?;
                part.fill(0);
            }
            1 => {
                vol.write_zeroes(offset, len as u64, rng.below(2) == 0)?;
                part.fill(0);
            }
            2 => vol.flush()?,
            3..=5 => {
                rng.fill(part);
                write(vol, offset, part)?;
            }
            _ => same(vol, offset, part)?,
        }
    }
    Ok(())
}

/// Many forks at once, and a name that all want goes to exactly one.
pub(super) fn threads_on_one_store(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let base = layer("base")?;
    {
        let vol = store.create(&volume("source")?, 1 << 20)?;
        write(&*vol, 4000, &[7; 9000])?;
        store.freeze(vol.name(), &base, Durability::Now)?;
    }
    let winners = AtomicU32::new(0);
    let threads = bench.options.threads.max(2);
    thread::scope(|scope| {
        let running = (0..threads)
            .map(|index| {
                let (store, base, winners) = (&store, &base, &winners);
                scope.spawn(move || {
                    for round in 0..8 {
                        let own = store.fork(base, &volume(&format!("f{index}-{round}"))?)?;
                        same(&*own, 4000, &[7; 9000])?;
                        write(&*own, 0, &index.to_le_bytes())?;
                        match store.fork(base, &volume(&format!("wanted{round}"))?) {
                            Ok(_) => winners.fetch_add(1, Ordering::Relaxed),
                            Err(e) if e.kind() == ErrorKind::Exists => 0,
                            Err(e) => return Err(e.into()),
                        };
                    }
                    Ok(())
                })
            })
            .collect();
        joined(running)
    })?;
    ensure(
        winners.load(Ordering::Relaxed) == 8,
        "a name was not given exactly once",
    )?;
    for index in 0..threads {
        for round in 0..8 {
            let name = volume(&format!("f{index}-{round}"))?;
            let vol = store.open(&name, Access::ReadOnly)?;
            let found = read(&*vol, 0, 4)?;
            ensure(
                found == index.to_le_bytes(),
                "a fork has another one's data",
            )?;
        }
    }
    Ok(())
}

/// The first failure of several threads.
fn joined(running: Vec<thread::ScopedJoinHandle<'_, Result<(), Failure>>>) -> Result<(), Failure> {
    let outcomes: Vec<_> = running
        .into_iter()
        .map(thread::ScopedJoinHandle::join)
        .collect();
    for outcome in outcomes {
        outcome.map_err(|_| Failure::new("a thread panicked"))??;
    }
    Ok(())
}
