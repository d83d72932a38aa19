//! Layers and forks: independence, deletion, space.

use super::pattern::{is_whole, layer, same, volume, write};
use super::{Bench, Failure, ensure, refused};
use crate::{Access, Durability, ErrorKind, StorageBackend};

const SIZE: usize = 256 << 10;
const MIB: u64 = 1 << 20;

/// A write is seen by nobody else, whatever the distance.
pub(super) fn forks_of_forks(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let depth = store.capabilities().max_chain.map_or(12, |max| max.min(12));
    let mut rng = bench.rng();
    let mut expected = rng.bytes(SIZE);
    let mut current = store.create(&volume("v0")?, SIZE as u64)?;
    write(&*current, 0, &expected)?;
    let mut lineage = Vec::new();
    for step in 1..depth {
        let frozen = layer(&format!("l{step}"))?;
        store.freeze(current.name(), &frozen, Durability::Deferred)?;
        let child = store.fork(&frozen, &volume(&format!("v{step}"))?)?;
        is_whole(&*child, &expected).map_err(|f| f.during(format_args!("fork {step}")))?;
        let mut parents = expected.clone();
        for (vol, content) in [(&current, &mut parents), (&child, &mut expected)] {
            let (at, bytes) = (rng.index(SIZE - 9000), rng.bytes(9000));
            write(&**vol, at as u64, &bytes)?;
            content.splice(at..at + bytes.len(), bytes);
        }
        is_whole(&*current, &parents)?;
        lineage.push((std::mem::replace(&mut current, child), parents));
    }
    lineage.push((current, expected));
    for (vol, content) in &lineage {
        is_whole(&**vol, content).map_err(|f| f.during(vol.name()))?;
        vol.flush()?;
    }
    // And again with everything closed and opened anew.
    let names: Vec<_> = lineage
        .into_iter()
        .map(|(vol, content)| (vol.name().clone(), content))
        .collect();
    let store = bench.open()?;
    for (name, content) in &names {
        store.check(name)?;
        let vol = store.open(name, Access::ReadWrite)?;
        is_whole(&*vol, content).map_err(|f| f.during(format_args!("{name} reopened")))?;
    }
    Ok(())
}

/// Nothing that somebody still reads goes; what is gone leaves its name free.
pub(super) fn deletion(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let (source, fork, base) = (volume("source")?, volume("fork")?, layer("base")?);
    let content = bench.rng().bytes(SIZE);
    let open = store.create(&source, SIZE as u64)?;
    write(&*open, 0, &content)?;
    store.freeze(&source, &base, Durability::Now)?;
    refused(
        store.delete(&source),
        ErrorKind::InUse,
        "deleting an open volume",
    )?;
    drop(open);
    drop(store.fork(&base, &fork)?);
    store.delete(&source)?;
    ensure(
        store.volumes()? == std::slice::from_ref(&fork),
        "a deleted volume is listed",
    )?;
    is_whole(&*store.open(&fork, Access::ReadOnly)?, &content)?;

    let gone = match store.delete_layer(&base) {
        Ok(()) => true,
        Err(e) if e.kind() == ErrorKind::InUse => false,
        Err(e) => return Err(e.into()),
    };
    ensure(
        store.layers()?.is_empty() == gone,
        "what delete_layer said and what layers lists differ",
    )?;
    is_whole(&*store.open(&fork, Access::ReadOnly)?, &content)
        .map_err(|f| f.during("after delete_layer"))?;
    is_whole(&*bench.open()?.open(&fork, Access::ReadWrite)?, &content)
        .map_err(|f| f.during("after delete_layer and reopening"))?;
    store.delete(&fork)?;
    if !gone {
        store.delete_layer(&base)?;
    }
    ensure(
        store.volumes()?.is_empty() && store.layers()?.is_empty(),
        "the store is not empty in the end",
    )?;
    refused(
        store.fork(&base, &fork),
        ErrorKind::NotFound,
        "a fork of a deleted layer",
    )?;
    drop(store.create(&source, SIZE as u64)?);
    let fresh = store.open(&source, Access::ReadOnly)?;
    is_whole(&*fresh, &vec![0; SIZE]).map_err(|f| f.during("a name used again"))
}

/// A flattened volume needs no layer.
pub(super) fn flattening(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let depth = store.capabilities().max_chain.map_or(4, |max| max.min(4));
    let mut rng = bench.rng();
    let mut content = rng.bytes(SIZE);
    let name = volume("v")?;
    let vol = store.create(&name, SIZE as u64)?;
    write(&*vol, 0, &content)?;
    let mut layers = Vec::new();
    for step in 1..depth {
        let frozen = layer(&format!("l{step}"))?;
        store.freeze(&name, &frozen, Durability::Now)?;
        layers.push(frozen);
        vol.write_zeroes(4096, 70_000, true)?;
        content[4096..74_096].fill(0);
        let (at, bytes) = (rng.index(SIZE - 3000), rng.bytes(3000));
        write(&*vol, at as u64, &bytes)?;
        content.splice(at..at + bytes.len(), bytes);
    }
    refused(
        store.flatten(&name),
        ErrorKind::InUse,
        "flattening an open volume",
    )?;
    drop(vol);
    store.flatten(&name)?;
    for frozen in layers.iter().rev() {
        store.delete_layer(frozen)?;
    }
    store.check(&name)?;
    is_whole(&*store.open(&name, Access::ReadWrite)?, &content)
}

/// The figures move as the content does.
pub(super) fn usage(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let name = volume("v")?;
    let vol = store.create(&name, 64 * MIB)?;
    let empty = store.usage(&name)?;
    ensure(empty.size == 64 * MIB, "the size is not the volume's")?;
    ensure(
        empty.own < 8 * MIB,
        format_args!("an empty volume takes {} bytes", empty.own),
    )?;
    fill(&*vol, 0, 8 * MIB)?;
    let full = store.usage(&name)?;
    ensure(
        full.own >= 8 * MIB && full.own < 24 * MIB,
        format_args!("a volume with 8 MiB of content takes {} bytes", full.own),
    )?;
    if store.capabilities().reclaims_discard {
        vol.discard(0, 8 * MIB)?;
        vol.flush()?;
        let discarded = store.usage(&name)?;
        ensure(
            discarded.own < 4 * MIB,
            format_args!("a discarded volume still takes {} bytes", discarded.own),
        )?;
    }
    Ok(())
}

/// What the backend says of itself is so.
pub(super) fn capabilities(bench: &Bench<'_>) -> Result<(), Failure> {
    const CONTENT: u64 = 32 * MIB;
    let store = bench.open()?;
    let caps = store.capabilities();
    let base = layer("base")?;
    {
        let vol = store.create(&volume("source")?, 1024 * MIB)?;
        fill(&*vol, 100 * MIB, CONTENT)?;
        store.freeze(vol.name(), &base, Durability::Now)?;
    }
    let name = volume("fork")?;
    let fork = store.fork(&base, &name)?;
    fork.flush()?;
    let usage = store.usage(&name)?;
    if caps.shares_blocks {
        ensure(
            usage.own < CONTENT / 8,
            format_args!(
                "a fork that shares its blocks has {} bytes of its own",
                usage.own
            ),
        )?;
        fill(&*fork, 100 * MIB, CONTENT / 2)?;
        let usage = store.usage(&name)?;
        ensure(
            usage.own >= CONTENT / 2,
            format_args!(
                "{} rewritten bytes are only {} of its own",
                CONTENT / 2,
                usage.own
            ),
        )?;
    } else {
        ensure(
            usage.own >= CONTENT,
            format_args!(
                "a fork that shares nothing has only {} bytes of its own",
                usage.own
            ),
        )?;
    }
    drop(fork);
    match caps.max_chain {
        Some(longest) => chain_ends(&*store, longest),
        None => Ok(()),
    }
}

/// The longest chain can be made, a longer one is refused, and flattening helps.
fn chain_ends(store: &dyn StorageBackend, longest: u32) -> Result<(), Failure> {
    let name = volume("chained")?;
    let vol = store.create(&name, 64 << 10)?;
    let mut length = 0;
    let refusal = loop {
        write(&*vol, u64::from(length) % 1024, &[1])?;
        match store.freeze(
            &name,
            &layer(&format!("chain{length}"))?,
            Durability::Deferred,
        ) {
            Ok(()) => length += 1,
            Err(e) => break e,
        }
        ensure(length <= longest, "the chain is longer than the longest")?;
    };
    refused::<()>(Err(refusal), ErrorKind::ChainTooLong, "one layer more")?;
    ensure(
        length + 2 >= longest,
        format_args!("a chain of {length} is refused, {longest} are promised"),
    )?;
    same(&*vol, 0, &[1])?;
    drop(vol);
    store.flatten(&name)?;
    Ok(store.freeze(&name, &layer("after")?, Durability::Now)?)
}

/// Fills a range with something that no file system stores as a hole or compresses away.
fn fill(vol: &dyn crate::Volume, offset: u64, len: u64) -> Result<(), Failure> {
    let mut rng = super::Rng::new(offset ^ len);
    let mut chunk = vec![0; 1 << 20];
    for at in (offset..offset + len).step_by(1 << 20) {
        rng.fill(&mut chunk);
        write(vol, at, &chunk)?;
    }
    Ok(vol.flush()?)
}
