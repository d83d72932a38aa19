//! From nothing to a guest that speaks.

use std::io::Write;
use std::time::Instant;

use clap::Args;
use offshoot_storage::VolumeName;

use super::{Bed, GuestArgs, Metric, times};
use crate::failure::Failure;

/// Boot: call to the first serial byte, and to an answer over vsock.
///
/// The call makes the disk's volume, too.
#[derive(Debug, Args)]
pub(crate) struct Boot {
    #[command(flatten)]
    guest: GuestArgs,
}

impl Boot {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        self.guest.on_each_backend("boot", out, measure)
    }
}

fn measure(bed: &Bed<'_>) -> Result<Vec<Metric>, Failure> {
    let (mut first_byte, mut vsock_reply) = (Vec::new(), Vec::new());
    for number in 0..bed.samples() {
        let name = format!("boot-{number}");
        let called = Instant::now();
        let guest = bed.boot(&name)?;
        first_byte.push(guest.first_byte()? - called);
        guest.client()?.state()?;
        vsock_reply.push(called.elapsed());
        guest.end();
        bed.store.delete(&VolumeName::new(&name)?)?;
    }
    Ok(vec![
        times("first_byte", &first_byte)?,
        times("vsock_reply", &vsock_reply)?,
    ])
}
