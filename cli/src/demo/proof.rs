//! What the demo asks of its guests, and what it proves by the answers.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use offshoot_pilot::protocol::{BlkOp, ECHO_PORT, Mac, Outcome, Reply, Request, State, pattern};
use offshoot_pilot::{PilotClient, connect_vsock};

use crate::failure::{Context, Failure};
use crate::guest::PATIENCE;

/// The data that a snapshot is taken of.
pub(super) const SOURCE: u64 = 1;
/// What the source writes over it afterwards.
pub(super) const SOURCE_LATER: u64 = 2;

type Client = PilotClient<UnixStream>;

/// The most memory and disk that is written, in bytes.
const MOST: u64 = 32 << 20;

/// The same range of a guest's own memory and of its disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Area {
    offset: u64,
    len: u64,
}

impl Area {
    /// As much as every guest like this one can hold.
    pub(super) fn of(guest: &Past) -> Self {
        // Whole blocks of 64 KiB on both sides of the middle.
        let len = (guest.state.owned / 2).min(MOST) / (128 << 10) * (128 << 10);
        Self { offset: 0, len }
    }

    pub(super) fn first_half(self) -> Self {
        Self {
            len: self.len / 2,
            ..self
        }
    }

    pub(super) fn second_half(self) -> Self {
        Self {
            offset: self.len / 2,
            len: self.len / 2,
        }
    }
}

fn blk(op: BlkOp, area: Area, seed: u64) -> Request {
    Request::Blk {
        device: 0,
        op,
        offset: area.offset,
        len: area.len,
        seed,
        chunk: 64 << 10,
        depth: 8,
    }
}

/// Has the guest write the pattern of `seed` to its memory and its disk.
pub(super) fn write(client: &mut Client, area: Area, seed: u64) -> Result<(), Failure> {
    let Area { offset, len } = area;
    check(
        "filling memory",
        client.work(&Request::Fill { offset, len, seed })?,
    )?;
    check(
        "writing the disk",
        client.work(&blk(BlkOp::Write, area, seed))?,
    )?;
    check(
        "flushing the disk",
        client.work(&blk(BlkOp::Flush, area, 0))?,
    )
}

/// Has the guest compare its memory and its disk with the pattern of `seed`.
pub(super) fn holds(client: &mut Client, area: Area, seed: u64) -> Result<(), Failure> {
    let Area { offset, len } = area;
    check(
        "memory",
        client.work(&Request::Verify { offset, len, seed })?,
    )?;
    check("the disk", client.work(&blk(BlkOp::Verify, area, seed))?)
}

/// Has the guest talk over its network card, and sends it something over a new vsock connection
/// that it must send back.
pub(super) fn exchange(client: &mut Client, vsock: &Path) -> Result<(), Failure> {
    const WORDS: usize = 1 << 13;
    let ping = Request::NetPing {
        device: 0,
        frames: 8,
        len: 1000,
        peer: Mac([0xff; 6]),
    };
    check("the network", client.work(&ping)?)?;
    let mut stream = connect_vsock(vsock, ECHO_PORT, Instant::now() + PATIENCE)?;
    let mut sent = vec![0; 8 * WORDS];
    pattern::fill(&mut sent, SOURCE, 0);
    let mut back = Vec::new();
    let what = || "the guest does not send back what it is sent over vsock".to_owned();
    stream
        .write_all(&sent)
        .and_then(|()| stream.shutdown(Shutdown::Write))
        .and_then(|()| stream.read_to_end(&mut back))
        .context(what)?;
    if sent == back {
        Ok(())
    } else {
        Err(Failure::new(what()))
    }
}

fn check(what: &str, outcome: Outcome) -> Result<(), Failure> {
    if outcome.bad == 0 {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{what}: {} words of {} bytes are not what they should be, the first at {:#x}",
        outcome.bad, outcome.bytes, outcome.first_bad
    )))
}

/// A guest's account of itself.
#[derive(Debug)]
pub(super) struct Past {
    state: State,
    /// From its entropy device.
    random: Vec<u8>,
}

impl Past {
    pub(super) fn of(client: &mut Client) -> Result<Self, Failure> {
        let state = client.state()?;
        let random = match client.ask(&Request::Random { len: 32 })? {
            Reply::Random { bytes } => bytes.0.as_slice().to_vec(),
            _ => {
                return Err(Failure::new(
                    "the guest answers something else than random bytes",
                ));
            }
        };
        Ok(Self { state, random })
    }

    /// Whether this guest has come out of `source`, at that moment or later.
    pub(super) fn continues(&self, source: &Self) -> Result<(), Failure> {
        let (now, then) = (&self.state, &source.state);
        let lost = |what: &str| Err(Failure::new(format!("{what} is not its source's")));
        if now.boot_id != then.boot_id {
            return lost("its boot id");
        }
        if now.counter < then.counter || now.requests < then.requests {
            return lost("its counter");
        }
        let vcpus = now.vcpus.as_slice().iter().zip(then.vcpus.as_slice());
        if now.vcpus.as_slice().len() != then.vcpus.as_slice().len()
            || vcpus.clone().any(|(now, then)| now < then)
        {
            return lost("the counter of one of its vCPUs");
        }
        if now.devices.as_slice() != then.devices.as_slice() {
            return lost("the list of its devices");
        }
        Ok(())
    }

    /// Whether this guest can tell that it is not `source`.
    pub(super) fn is_unlike(&self, source: &Self) -> Result<(), Failure> {
        if self.state.generation == source.state.generation {
            return Err(Failure::new("a copy has its source's generation id"));
        }
        if self.state.resets <= source.state.resets {
            return Err(Failure::new(
                "a copy was not told that its vsock connections are gone",
            ));
        }
        Ok(())
    }
}

/// Whether every guest has an identity of its own.
pub(super) fn all_differ<'a>(guests: impl Iterator<Item = &'a Past>) -> Result<(), Failure> {
    let (mut generations, mut randoms) = (BTreeSet::new(), BTreeSet::new());
    for guest in guests {
        if !generations.insert(guest.state.generation.0) {
            return Err(Failure::new("two copies have one generation id"));
        }
        if !randoms.insert(&guest.random) {
            return Err(Failure::new("two copies got the same random bytes"));
        }
    }
    Ok(())
}
