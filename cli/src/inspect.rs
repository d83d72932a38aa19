//! `offshoot inspect`: what a snapshot holds.

mod text;
mod view;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use offshoot_snapshot_format::{Manifest, read_header, read_manifest};

use crate::failure::{Context, Failure};
use view::View;

/// Show what a snapshot holds: header, requirements, sections, memory map, disks and digests.
///
/// The manifest is checked in full, the memory image is not read: that is what `offshoot verify` is for.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The snapshot's directory.
    snapshot: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Print the digest of every chunk of memory (JSON always has them).
    #[arg(long)]
    digests: bool,
}

impl Inspect {
    pub(crate) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        let manifest = self.read()?;
        let view = View::new(&manifest);
        let printed = if self.json {
            serde_json::to_writer_pretty(&mut *out, &view)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            text::print(&view, self.digests, out)
        };
        printed.and_then(|()| out.flush()).map_err(Failure::output)
    }

    fn read(&self) -> Result<Manifest, Failure> {
        let path = self.snapshot.display();
        // The header comes first: of a version that this build does not read, it is all that can be said.
        let header = read_header(&self.snapshot).context(|| format!("cannot inspect {path}"))?;
        header.check_readable().context(|| {
            let (id, created) = (header.id, header.created);
            format!("cannot inspect {path} ({id}, made {created})")
        })?;
        read_manifest(&self.snapshot).context(|| format!("cannot inspect {path}"))
    }
}
