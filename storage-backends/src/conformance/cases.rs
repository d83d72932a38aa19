//! One volume, one thread.

use std::io::{self, IoSlice, IoSliceMut};

use super::pattern::{is_whole, layer, read, same, volume, write};
use super::{Bench, Failure, ensure, refused};
use crate::{Access, Durability, Error, ErrorKind, MAX_SIZE, SECTOR, Volume};

const KIB: usize = 1024;

/// Sizes are sectors; a new volume is all zero up to its last byte.
pub(super) fn sizes(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    for size in [
        0,
        1,
        511,
        513,
        4095,
        MAX_SIZE + 1,
        MAX_SIZE + SECTOR,
        u64::MAX,
    ] {
        let made = store.create(&volume("bad")?, size);
        refused(made, ErrorKind::Invalid, format_args!("a size of {size}"))?;
        ensure(store.volumes()?.is_empty(), "a refused volume is listed")?;
    }
    for (index, size) in [512_usize, 4096, 64 * KIB, 64 * KIB + 512, 1024 * KIB - 512]
        .into_iter()
        .enumerate()
    {
        let made = store.create(&volume(&format!("v{index}"))?, size as u64)?;
        ensure(!made.is_read_only(), "a new volume is read-only")?;
        is_whole(&*made, &vec![0; size])?;
    }
    // Far larger than the disk it lies on, and beyond 32 bits of sectors.
    let huge = store.create(&volume("huge")?, 3 << 40)?;
    write(&*huge, (3 << 40) - 1000, &[7; 1000])?;
    same(&*huge, (3 << 40) - 1512, &[0; 512])?;
    same(&*huge, (3 << 40) - 1000, &[7; 1000])
}

/// What is not there is not found, what is there is not made again, and a refusal changes nothing.
pub(super) fn names(bench: &Bench<'_>) -> Result<(), Failure> {
    let store = bench.open()?;
    let (a, b, l, m) = (volume("a")?, volume("b.raw")?, layer("a")?, layer("L-2")?);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        refused(store.open(&a, access), ErrorKind::NotFound, "open")?;
    }
    let missing = ErrorKind::NotFound;
    refused(store.freeze(&a, &l, Durability::Now), missing, "freeze")?;
    refused(store.sync_layer(&l), missing, "sync_layer")?;
    refused(store.fork(&l, &a), missing, "fork")?;
    refused(store.open_layer(&l), missing, "open_layer")?;
    refused(store.flatten(&a), missing, "flatten")?;
    refused(store.delete(&a), missing, "delete")?;
    refused(store.delete_layer(&l), missing, "delete_layer")?;
    refused(store.usage(&a), missing, "usage")?;
    refused(store.check(&a), missing, "check")?;
    ensure(
        store.volumes()?.is_empty() && store.layers()?.is_empty(),
        "refusals left something behind",
    )?;

    let first = store.create(&a, 64 << 10)?;
    write(&*first, 0, &[1; 100])?;
    refused(
        store.create(&a, 128 << 10),
        ErrorKind::Exists,
        "a second create",
    )?;
    // A volume and a layer may have the same name.
    store.freeze(&a, &l, Durability::Now)?;
    write(&*first, 0, &[2; 100])?;
    let again = store.freeze(&a, &l, Durability::Now);
    refused(again, ErrorKind::Exists, "a second freeze")?;
    refused(
        store.fork(&l, &a),
        ErrorKind::Exists,
        "a fork onto a volume",
    )?;
    same(&*first, 0, &[2; 100])?;
    same(&*store.open_layer(&l)?, 0, &[1; 100])?;
    drop(store.fork(&l, &b)?);
    store.freeze(&b, &m, Durability::Deferred)?;
    store.sync_layer(&m)?;
    ensure(
        store.volumes()? == [a.clone(), b.clone()],
        "volumes are not listed",
    )?;
    ensure(store.layers()? == [m, l], "layers are not listed in order")?;
    ensure(first.name() == &a, "an open volume has another name")?;
    store.check(&a)?;
    store.check(&b)?;
    Ok(())
}

/// Any offset, any length, any number of slices; out of range is refused and changes nothing.
pub(super) fn reads_and_writes(bench: &Bench<'_>) -> Result<(), Failure> {
    const SIZE: usize = 300 * KIB + 512;
    let store = bench.open()?;
    let vol = store.create(&volume("v")?, SIZE as u64)?;
    let mut expected = vec![0; SIZE];
    let mut rng = bench.rng();
    for (offset, len) in [
        (0, 1),
        (511, 2),
        (4095, 4098),
        (65_535, 2),
        (65_536 - 700, 140_000),
        (SIZE - 1, 1),
        (SIZE - 513, 513),
    ] {
        let bytes = rng.bytes(len);
        write(&*vol, offset as u64, &bytes)?;
        expected.splice(offset..offset + len, bytes);
        is_whole(&*vol, &expected)?;
    }
    vectored(&*vol, &mut expected, &mut rng)?;
    out_of_range(&*vol, &expected)
}

/// More slices than one system call takes, empty ones among them and in front.
fn vectored(vol: &dyn Volume, expected: &mut Vec<u8>, rng: &mut super::Rng) -> Result<(), Failure> {
    let lens: Vec<usize> = (0..3000)
        .map(|i| if i < 1100 { 0 } else { i % 7 })
        .collect();
    let total = lens.iter().sum();
    let bytes = rng.bytes(total);
    let mut slices = Vec::new();
    let mut rest = &bytes[..];
    for len in &lens {
        let (slice, more) = rest.split_at(*len);
        slices.push(IoSlice::new(slice));
        rest = more;
    }
    vol.write_vectored_at(&slices, 12_345)?;
    expected.splice(12_345..12_345 + total, bytes.iter().copied());
    is_whole(vol, expected)?;

    let mut buffers: Vec<Vec<u8>> = lens.iter().map(|len| vec![0xa5; *len]).collect();
    let mut slices: Vec<_> = buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
    vol.read_vectored_at(&mut slices, 12_345)?;
    ensure(
        slices.iter().zip(&lens).all(|(s, len)| s.len() == *len),
        "a read changed the caller's slices",
    )?;
    ensure(buffers.concat() == bytes, "a vectored read differs")?;
    vol.read_vectored_at(&mut [], 0)?;
    Ok(vol.write_vectored_at(&[], 0)?)
}

fn out_of_range(vol: &dyn Volume, expected: &[u8]) -> Result<(), Failure> {
    let size = vol.size();
    for (offset, len) in [
        (size, 1),
        (size - 1, 2),
        (size + 512, 1),
        (u64::MAX, 2),
        (0, size + 1),
    ] {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let results = [
            (
                "write",
                vol.write_vectored_at(&[IoSlice::new(&bytes)], offset),
            ),
            (
                "read",
                vol.read_vectored_at(&mut [IoSliceMut::new(&mut bytes)], offset),
            ),
            ("discard", vol.discard(offset, len)),
            ("write_zeroes", vol.write_zeroes(offset, len, false)),
            (
                "write_zeroes with unmap",
                vol.write_zeroes(offset, len, true),
            ),
        ];
        for (what, result) in results {
            ensure(
                matches!(&result, Err(e) if e.kind() == io::ErrorKind::InvalidInput),
                format_args!("{what} of {len} at {offset} gave {result:?}, not InvalidInput"),
            )?;
        }
    }
    vol.discard(size, 0)?;
    is_whole(vol, expected)
}

/// Discarded and zeroed ranges read as zeroes, their neighbours as before.
pub(super) fn zeroes(bench: &Bench<'_>) -> Result<(), Failure> {
    const SIZE: usize = 512 * KIB;
    type Operation = fn(&dyn Volume, u64, u64) -> io::Result<()>;
    let operations: [(&str, Operation); 3] = [
        ("discard", |v, offset, len| v.discard(offset, len)),
        ("zero", |v, offset, len| v.write_zeroes(offset, len, false)),
        ("unmap", |v, offset, len| v.write_zeroes(offset, len, true)),
    ];
    let store = bench.open()?;
    let mut rng = bench.rng();
    for (name, zero) in operations {
        let base = store.create(&volume(&format!("{name}-base"))?, SIZE as u64)?;
        let mut expected = rng.bytes(SIZE);
        write(&*base, 0, &expected)?;
        let frozen = layer(name)?;
        store.freeze(base.name(), &frozen, Durability::Now)?;
        let whole = expected.clone();
        // Once where the data is the volume's own, once where it is a layer's.
        let fork = store.fork(&frozen, &volume(&format!("{name}-fork"))?)?;
        for (offset, len) in [
            (0, 512),
            (1000, 1),
            (4096, 4096),
            (65_536 + 100, 65_536 * 2),
            (SIZE - 5000, 5000),
            (300_000, 0),
        ] {
            for vol in [&base, &fork] {
                zero(&**vol, offset as u64, len as u64)?;
            }
            expected[offset..offset + len].fill(0);
        }
        for vol in [&base, &fork] {
            is_whole(&**vol, &expected).map_err(|f| f.during(name))?;
            write(&**vol, 65_000, &[9; 2000])?;
        }
        expected[65_000..67_000].fill(9);
        for vol in [&base, &fork] {
            is_whole(&**vol, &expected).map_err(|f| f.during(name))?;
        }
        is_whole(&*store.open_layer(&frozen)?, &whole).map_err(|f| f.during("the layer"))?;
        zero(&*fork, 0, SIZE as u64)?;
        is_whole(&*fork, &vec![0; SIZE]).map_err(|f| f.during(name))?;
    }
    Ok(())
}

/// A volume filled at its creation is there whole, or not at all.
pub(super) fn filled_creation(bench: &Bench<'_>) -> Result<(), Failure> {
    const SIZE: u64 = 200 << 10;
    let store = bench.open()?;
    let name = volume("filled")?;
    let mut halfway = |vol: &dyn Volume| {
        vol.write_vectored_at(&[IoSlice::new(&[1; 5000])], 0)
            .map_err(|e| Error::io("write", "it", e))?;
        Err(Error::new(ErrorKind::Cancelled, "fill", "it"))
    };
    let made = store.create_filled(&name, SIZE, &mut halfway);
    refused(made, ErrorKind::Cancelled, "a failing fill")?;
    ensure(store.volumes()?.is_empty(), "a failed fill left a volume")?;
    refused(
        store.open(&name, Access::ReadOnly),
        ErrorKind::NotFound,
        "open",
    )?;

    let content = bench.rng().bytes(150 << 10);
    let mut fill = |vol: &dyn Volume| {
        vol.write_vectored_at(&[IoSlice::new(&content)], 1000)
            .map_err(|e| Error::io("write", "it", e))
    };
    let vol = store.create_filled(&name, SIZE, &mut fill)?;
    same(&*vol, 1000, &content)?;
    let again = store.create_filled(&name, SIZE, &mut |_| Ok(()));
    refused(again, ErrorKind::Exists, "a second filled creation")?;
    write(&*vol, 0, &[3; 10])?;
    drop(vol);
    let store = bench.open()?;
    let vol = store.open(&name, Access::ReadWrite)?;
    same(&*vol, 0, &[3; 10])?;
    same(&*vol, 1000, &content)
}

/// What was written is there when the store is opened again, flushed or not; a reader changes
/// nothing.
pub(super) fn reopening(bench: &Bench<'_>) -> Result<(), Failure> {
    const SIZE: usize = 1 << 20;
    let name = volume("v")?;
    let mut rng = bench.rng();
    let mut expected = vec![0; SIZE];
    drop(bench.open()?.create(&name, SIZE as u64)?);
    for round in 0..6 {
        let store = bench.open()?;
        let vol = store.open(&name, Access::ReadWrite)?;
        is_whole(&*vol, &expected).map_err(|f| f.during(format_args!("round {round}")))?;
        let (at, bytes) = (rng.index(SIZE - 100_000), rng.bytes(100_000));
        write(&*vol, at as u64, &bytes)?;
        expected.splice(at..at + bytes.len(), bytes);
        if round % 2 == 0 {
            vol.flush()?;
        }
        drop(vol);
        store.check(&name)?;
        let reader = store.open(&name, Access::ReadOnly)?;
        read_only(&*reader)?;
        is_whole(&*reader, &expected)?;
    }
    Ok(())
}

fn read_only(vol: &dyn Volume) -> Result<(), Failure> {
    ensure(vol.is_read_only(), "a reader is not read-only")?;
    let results = [
        ("write", vol.write_vectored_at(&[IoSlice::new(&[1])], 0)),
        ("discard", vol.discard(0, 512)),
        ("write_zeroes", vol.write_zeroes(0, 512, true)),
    ];
    for (what, result) in results {
        ensure(
            matches!(&result, Err(e) if e.kind() == io::ErrorKind::PermissionDenied),
            format_args!("{what} by a reader gave {result:?}, not PermissionDenied"),
        )?;
    }
    vol.flush()
        .map_err(|e| Failure::from(e).during("a reader's flush"))
}

/// A freeze keeps the moment, and the handles go on.
pub(super) fn freezing_an_open_volume(bench: &Bench<'_>) -> Result<(), Failure> {
    const SIZE: usize = 256 * KIB + 512;
    let store = bench.open()?;
    let name = volume("v")?;
    let vol = store.create(&name, SIZE as u64)?;
    let other = vol.clone();
    let mut rng = bench.rng();
    let mut moments = Vec::new();
    let mut now = vec![0; SIZE];
    for round in 0..5 {
        let (at, bytes) = (rng.index(SIZE - 70_000), rng.bytes(70_000));
        write(&*other, at as u64, &bytes)?;
        now.splice(at..at + bytes.len(), bytes);
        let frozen = layer(&format!("moment{round}"))?;
        let durability = [Durability::Now, Durability::Deferred][round % 2];
        store.freeze(&name, &frozen, durability)?;
        moments.push((frozen, now.clone()));
        is_whole(&*vol, &now)?;
        if let Some(file) = vol.raw_file() {
            use std::os::unix::fs::FileExt;
            file.write_all_at(&[0xfe; 512], 512)?;
            now[512..1024].fill(0xfe);
            same(&*vol, 512, &[0xfe; 512])?;
        }
    }
    for (frozen, content) in &moments {
        let reader = store.open_layer(frozen)?;
        ensure(
            reader.name().as_str() == frozen.as_str(),
            "a layer's handle has another name",
        )?;
        read_only(&*reader)?;
        is_whole(&*reader, content).map_err(|f| f.during(frozen))?;
    }
    drop((vol, other));
    // Closed volumes freeze as well.
    let last = layer("last")?;
    store.freeze(&name, &last, Durability::Now)?;
    is_whole(&*bench.open()?.open_layer(&last)?, &now)?;
    let reopened = read(&*store.open(&name, Access::ReadOnly)?, 0, SIZE)?;
    ensure(reopened == now, "the volume is not what it was")
}
