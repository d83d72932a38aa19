use super::*;

const MIB: u64 = 1 << 20;

fn region(guest_start: u64, length: u64) -> Region {
    Region {
        guest_start,
        length,
    }
}

#[test]
fn chunks_do_not_span_regions() {
    let layout = MemoryLayout::new(&[
        region(0, MIB + 4096),
        region(4 << 30, 2 * MIB),
        region(8 << 30, 4096),
    ])
    .unwrap();
    assert_eq!(layout.image_len(), 3 * MIB + 8192);
    let chunks: Vec<_> = layout
        .chunks()
        .map(|c| (c.index, c.guest_start, c.file_offset, c.length))
        .collect();
    assert_eq!(
        chunks,
        [
            (0, 0, 0, MIB),
            (1, MIB, MIB, 4096),
            (2, 4 << 30, MIB + 4096, MIB),
            (3, (4 << 30) + MIB, 2 * MIB + 4096, MIB),
            (4, 8 << 30, 3 * MIB + 4096, 4096),
        ]
    );
    assert_eq!(layout.chunk(5), None);
    assert_eq!(layout.chunk(u64::MAX), None);
}

#[test]
fn layouts_that_break_a_rule_are_refused() {
    let ok = [region(0, MIB)];
    let cases: &[(u32, u32, &[Region])] = &[
        (0, 1 << 20, &ok),
        (2048, 1 << 20, &ok),
        (131_072, 1 << 20, &ok),
        (5000, 1 << 20, &ok),
        (8192, 4096, &ok),
        (4096, 3 << 20, &ok),
        (4096, 128 << 20, &ok),
        (4096, 1 << 20, &[]),
        (4096, 1 << 20, &[region(0, 0)]),
        (4096, 1 << 20, &[region(1, 4096)]),
        (4096, 1 << 20, &[region(0, 4095)]),
        (4096, 1 << 20, &[region(0, 8192), region(4096, 4096)]),
        (4096, 1 << 20, &[region(8192, 4096), region(0, 4096)]),
        (4096, 1 << 20, &[region(0, 4096), region(0, 4096)]),
        (4096, 1 << 20, &[region(u64::MAX - 4095, 4096)]),
        (4096, 1 << 20, &[region(0, (1 << 40) + 4096)]),
        (4096, 4096, &[region(0, (1 << 32) + 4096)]),
        (4096, 1 << 20, &[region(0, 4096); 257]),
    ];
    for (page, chunk, regions) in cases {
        let error = MemoryLayout::with_sizes(*page, *chunk, regions).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{page} {chunk}");
    }
}

#[test]
fn digests_are_found_by_rank() {
    let count = 21u8;
    let layout =
        MemoryLayout::with_sizes(4096, 4096, &[region(0, u64::from(count) * 4096)]).unwrap();
    let digests: Vec<_> = (0..count)
        .map(|i| {
            if i % 3 == 0 || (8..16).contains(&i) {
                ChunkDigest::Zero
            } else {
                ChunkDigest::Blake3(Digest([i; 32]))
            }
        })
        .collect();
    let map = MemoryMap::new(layout.clone(), digests.iter().copied()).unwrap();
    for (i, digest) in (0..).zip(&digests) {
        assert_eq!(map.digest(i), Some(*digest), "{i}");
    }
    assert_eq!(map.digest(count.into()), None);
    assert_eq!(MemoryMap::from_wire(map.to_wire()), Ok(map.clone()));

    assert!(MemoryMap::new(layout.clone(), digests[1..].iter().copied()).is_err());
    let mut unused_bit = map.to_wire();
    *unused_bit.zero_chunks.0.last_mut().unwrap() |= 0x80;
    assert!(MemoryMap::from_wire(unused_bit).is_err());
    let mut one_less = map.to_wire();
    one_less.digests.0.truncate(one_less.digests.0.len() - 32);
    assert!(MemoryMap::from_wire(one_less).is_err());
    let mut not_whole = map.to_wire();
    not_whole.digests.0.push(0);
    assert!(MemoryMap::from_wire(not_whole).is_err());
    let mut short_bits = map.to_wire();
    short_bits.zero_chunks.0.pop();
    assert!(MemoryMap::from_wire(short_bits).is_err());
}
