//! `offshoot bench`: what things cost here.

mod boot;
mod create;
mod density;
mod disk_fork;
mod live_fork;
mod measure;
mod memory;
mod restore;
mod snapshot;
mod workers;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use offshoot_pilot::PilotClient;
use offshoot_pilot::protocol::{Mode, Request};
use offshoot_storage::{StorageBackend, VolumeName};
use offshoot_vmm::{DriveBinding, Host, RamSize};

use crate::failure::{Context, Failure};
use crate::guest::{Cable, Guest, Plan};
use crate::place::{Place, PlaceArgs};
use measure::{Figures, Line, Times};

/// What a guest's disk holds in a bench of machines, in bytes.
const DISK_BYTES: u64 = 64 << 20;
/// What a btrfs of the bench's own may grow to, in bytes: it is sparse.
const LOOP_BYTES: u64 = 32 << 30;

/// Measure what things cost on this host.
///
/// Guests are the pilot with a disk, a network card, a vsock and an entropy device. Build with --release.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    which: Which,
}

#[derive(Debug, Subcommand)]
enum Which {
    Boot(boot::Boot),
    Restore(restore::Restore),
    Snapshot(snapshot::Snapshot),
    LiveFork(live_fork::LiveFork),
    Create(create::Create),
    Density(density::Density),
    DiskFork(disk_fork::DiskFork),
}

impl Bench {
    pub(crate) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        match &self.which {
            Which::Boot(bench) => bench.run(out),
            Which::Restore(bench) => bench.run(out),
            Which::Snapshot(bench) => bench.run(out),
            Which::LiveFork(bench) => bench.run(out),
            Which::Create(bench) => bench.run(out),
            Which::Density(bench) => bench.run(out),
            Which::DiskFork(bench) => bench.run(out),
        }
    }
}

/// How a figure is reported.
#[derive(Debug, Clone, Args)]
struct ReportArgs {
    /// Print one JSON object a metric.
    #[arg(long)]
    json: bool,
}

/// What the benches of machines have in common.
#[derive(Debug, Clone, Args)]
struct GuestArgs {
    /// How many samples to take.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: u32,
    /// The guest's RAM in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(32..=4_194_304))]
    ram: u64,
    /// The guest's vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    cpus: u8,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

impl GuestArgs {
    fn plan(&self) -> Result<Plan, Failure> {
        Ok(Plan {
            ram: RamSize::from_mib(self.ram)?,
            vcpus: self.cpus,
        })
    }

    /// Measures on every backend that is wanted.
    fn on_each_backend(
        &self,
        bench: &'static str,
        out: &mut impl Write,
        measure: impl Fn(&Bed<'_>) -> Result<Vec<Metric>, Failure>,
    ) -> Result<(), Failure> {
        let host = Host::open()?;
        let place = self.place.prepare(LOOP_BYTES)?;
        for name in place.backends() {
            let bed = Bed {
                args: self,
                host: &host,
                place: &place,
                store: place.store(name)?,
                name,
            };
            let metrics = measure(&bed).context(|| format!("the bench failed on {name}"))?;
            for (metric, figures) in metrics {
                let line = Line {
                    bench,
                    metric,
                    backend: Some(name.clone()),
                    ram_mib: Some(self.ram),
                    figures,
                };
                self.report.print(out, &line)?;
            }
        }
        Ok(())
    }
}

impl ReportArgs {
    fn print(&self, out: &mut impl Write, line: &Line) -> Result<(), Failure> {
        let printed = if self.json {
            serde_json::to_writer(&mut *out, line)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            writeln!(out, "{line}")
        };
        printed.and_then(|()| out.flush()).map_err(Failure::output)
    }
}

/// A metric's name and what it came to.
type Metric = (&'static str, Figures);

/// The metric of a time.
fn times(metric: &'static str, samples: &[Duration]) -> Result<Metric, Failure> {
    let times = Times::of(samples).ok_or_else(|| Failure::new("there are no samples"))?;
    Ok((metric, Figures::Times(times)))
}

/// Where machines are measured: a host, a store and its directory.
struct Bed<'a> {
    args: &'a GuestArgs,
    host: &'a Arc<Host>,
    place: &'a Place,
    store: Arc<dyn StorageBackend>,
    name: &'a str,
}

impl Bed<'_> {
    /// Boots a guest with a disk of its own. Its name is not taken yet.
    fn boot(&self, name: &str) -> Result<Guest, Failure> {
        let volume = self.store.create(&VolumeName::new(name)?, DISK_BYTES)?;
        let disk = DriveBinding::volume(Arc::clone(&self.store), volume);
        Guest::boot(
            self.host,
            self.args.plan()?,
            disk,
            self.socket(name),
            Cable::Silent,
        )
    }

    fn socket(&self, name: &str) -> std::path::PathBuf {
        self.place
            .socket(format_args!("{}-{name}", self.name.replace(':', "-")))
    }

    /// Has a guest fill its memory and a quarter of its disk, and idle in `mode` afterwards.
    fn settle(&self, mut client: PilotClient<UnixStream>, mode: Mode) -> Result<(), Failure> {
        client.work(&Request::Fill {
            offset: 0,
            len: u64::MAX,
            seed: 1,
        })?;
        client.work(&Request::Blk {
            device: 0,
            op: offshoot_pilot::protocol::BlkOp::Write,
            offset: 0,
            len: DISK_BYTES / 4,
            seed: 1,
            chunk: 64 << 10,
            depth: 8,
        })?;
        client.order(&Request::SetMode { mode })?;
        Ok(())
    }

    /// How many samples to take.
    fn samples(&self) -> u32 {
        self.args.n
    }
}
