//! `offshoot verify`: whether a snapshot is what its writer wrote.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use offshoot_snapshot_format::{Digest, Error, RawSnapshot, SnapshotId, Verify as Policy};
use serde::Serialize;

use crate::failure::{Context, Failure};

/// Check a snapshot: its manifest, and every chunk of its memory against its digest.
///
/// Its disks belong to a storage backend and are not looked at.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The snapshot's directory.
    snapshot: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What was proven.
#[derive(Debug, Serialize)]
struct Proven {
    id: SnapshotId,
    manifest_digest: Digest,
    memory_bytes: u64,
    chunks: u64,
    zero_chunks: u64,
}

impl Verify {
    pub(crate) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        let path = self.snapshot.display();
        let proven = self.prove().context(|| format!("{path} does not verify"))?;
        let printed = if self.json {
            serde_json::to_writer(&mut *out, &proven)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            writeln!(
                out,
                "{} is whole: {} bytes of memory in {} chunks, {} of them zero; manifest digest {}",
                proven.id,
                proven.memory_bytes,
                proven.chunks,
                proven.zero_chunks,
                proven.manifest_digest
            )
        };
        printed.and_then(|()| out.flush()).map_err(Failure::output)
    }

    fn prove(&self) -> Result<Proven, Error> {
        let snapshot = RawSnapshot::open(&self.snapshot)?;
        let map = snapshot.manifest().memory_map();
        let layout = map.layout();
        // Draws on standard error, and nothing if that is not a terminal.
        let bar = ProgressBar::new(layout.image_len()).with_style(style());
        let proven = snapshot.memory().prove(Policy::Eager, |progress| {
            bar.set_position(progress.done);
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        proven?;
        Ok(Proven {
            id: snapshot.manifest().id(),
            manifest_digest: snapshot.manifest().digest(),
            memory_bytes: layout.image_len(),
            chunks: layout.chunk_count(),
            zero_chunks: layout.chunk_count() - map.data_chunks(),
        })
    }
}

fn style() -> ProgressStyle {
    let template = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
