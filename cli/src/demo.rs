//! `offshoot demo`: the whole story of a sandbox on every storage backend, with proofs.

mod proof;
mod table;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use offshoot_pilot::PilotClient;
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{LayerName, StorageBackend, VolumeName};
use offshoot_vmm::{DriveBinding, Host, RamSize, SaveOptions, Template};

use crate::failure::{Context, Failure};
use crate::guest::{Cable, DISK, Guest, Plan};
use crate::place::{Place, PlaceArgs, allocated};
use proof::{Area, Past};
use table::Table;

/// The disk of a guest, in bytes.
const DISK_BYTES: u64 = 64 << 20;
/// What a btrfs of the demo's own may grow to, in bytes, besides the copies' disks: it is sparse.
const LOOP_BYTES: u64 = 8 << 30;

/// Boot a guest, snapshot it, start copies of it on every storage backend, and prove them independent.
///
/// The guest has a disk, a network card and a vsock. It fills memory and disk, talks over network and vsock,
/// and is written into a snapshot. Each copy proves that it continued exactly where the source was, and
/// writes data of its own; at the end nobody sees anybody else's. Exit status 0 says that all of it held.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// How many copies to start of each snapshot.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    forks: u32,
    /// The guest's RAM in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(32..=4_194_304))]
    ram: u64,
    /// The guest's vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    cpus: u8,
    #[command(flatten)]
    place: PlaceArgs,
}

impl Demo {
    pub(crate) fn run(&self, out: &mut impl Write) -> Result<(), Failure> {
        let host = Host::open()?;
        let plan = Plan {
            ram: RamSize::from_mib(self.ram)?,
            vcpus: self.cpus,
        };
        // Every backend's copies may write all of their disks.
        let disks = u64::from(self.forks) * DISK_BYTES * 3;
        let place = self.place.prepare(LOOP_BYTES + disks)?;
        let print = |out: &mut dyn Write, line: &str| {
            writeln!(out, "{line}")
                .and_then(|()| out.flush())
                .map_err(Failure::output)
        };
        let mut table = Table::new();
        for name in place.backends() {
            let story = Story {
                host: &host,
                place: &place,
                store: place.store(name)?,
                name,
                plan,
                forks: self.forks,
            };
            let column = story
                .tell()
                .context(|| format!("the demo failed on {name}"))?;
            print(
                out,
                &format!(
                    "{name}: a guest of {} MiB and {} copies of it: each continued exactly, and none sees another's data",
                    self.ram, self.forks
                ),
            )?;
            table.add(name, column);
        }
        print(out, "")?;
        table.print(out).map_err(|e: io::Error| Failure::output(e))
    }
}

/// One backend's run.
struct Story<'a> {
    host: &'a Arc<Host>,
    place: &'a Place,
    store: Arc<dyn StorageBackend>,
    name: &'a str,
    plan: Plan,
    forks: u32,
}

/// What a step is called, and how long it took or how much it was.
type Column = Vec<(&'static str, String)>;

/// A living copy.
struct Copy {
    number: u32,
    client: PilotClient<UnixStream>,
    guest: Guest,
}

impl Story<'_> {
    fn tell(&self) -> Result<Column, Failure> {
        let mut column = Column::new();
        let volume = self.store.create(&volume("source")?, DISK_BYTES)?;
        let disk = DriveBinding::volume(Arc::clone(&self.store), volume);

        let called = Instant::now();
        let mut source = Guest::boot(
            self.host,
            self.plan,
            disk,
            self.socket("source"),
            Cable::Echo,
        )?;
        let first_byte = source.first_byte()?;
        let mut client = source.client()?;
        let past = Past::of(&mut client)?;
        column.push(("boot to the first serial byte", time(first_byte - called)));
        column.push(("boot to an answer over vsock", time(called.elapsed())));

        let began = Instant::now();
        let area = Area::of(&past);
        proof::write(&mut client, area, proof::SOURCE)?;
        proof::exchange(&mut client, source.vsock())?;
        column.push(("guest writes memory and disk, talks", time(began.elapsed())));
        let past = Past::of(&mut client)?;

        let snapshots = self.place.snapshots(self.name)?;
        let began = Instant::now();
        let paused = source.running.pause()?;
        let saved = paused.save(&snapshots, SaveOptions::new()?)?;
        paused.resume()?;
        column.push(("snapshot (the source is paused)", time(began.elapsed())));
        column.push(("snapshot on disk", size(allocated(&saved.path)?)));
        // The source goes its own way: no copy may see that.
        proof::write(&mut client, area, proof::SOURCE_LATER)?;

        let began = Instant::now();
        let snapshot = RawSnapshot::open(&saved.path)?;
        let template = Template::load(self.host, &snapshot, Verify::Eager)?;
        column.push((
            "snapshot loaded, every digest checked",
            time(began.elapsed()),
        ));

        let layer = saved
            .layers
            .iter()
            .find(|(id, _)| id == DISK)
            .map(|(_, layer)| layer);
        let layer = layer.ok_or_else(|| Failure::new("the snapshot does not name its disk"))?;
        let mut copies = Vec::new();
        let mut disks = Vec::new();
        let mut answers = Vec::new();
        for number in 1..=self.forks {
            let called = Instant::now();
            let mut copy = self.start(&template, layer, number, &mut disks)?;
            let now = Past::of(&mut copy.client)?;
            answers.push(called.elapsed());
            let what = || format!("copy {number} did not continue where its source was");
            now.continues(&past).context(what)?;
            proof::holds(&mut copy.client, area, proof::SOURCE).context(what)?;
            proof::exchange(&mut copy.client, copy.guest.vsock()).context(what)?;
            proof::write(&mut copy.client, area.first_half(), seed(number)).context(what)?;
            copies.push((copy, now));
        }
        column.push(("copy: disk forked (median)", time(median(&mut disks))));
        column.push((
            "copy: call to an answer over vsock (median)",
            time(median(&mut answers)),
        ));

        // All are alive now, and each has written: whose data does each see?
        let began = Instant::now();
        for (copy, now) in &mut copies {
            let what = format!("copy {} does not see what it wrote", copy.number);
            proof::holds(&mut copy.client, area.first_half(), seed(copy.number))
                .and_then(|()| proof::holds(&mut copy.client, area.second_half(), proof::SOURCE))
                .context(|| what)?;
            now.is_unlike(&past)?;
        }
        proof::all_differ(copies.iter().map(|(_, now)| now))?;
        proof::holds(&mut client, area, proof::SOURCE_LATER)
            .context(|| "the source does not see what it wrote".into())?;
        column.push(("independence of all proven", time(began.elapsed())));

        drop(client);
        source.end();
        for (Copy { guest, .. }, _) in copies {
            guest.end();
        }
        Ok(column)
    }

    fn start(
        &self,
        template: &Template,
        layer: &LayerName,
        number: u32,
        disks: &mut Vec<Duration>,
    ) -> Result<Copy, Failure> {
        let what = || format!("cannot start copy {number}");
        let began = Instant::now();
        let volume = self
            .store
            .fork(layer, &volume(&format!("copy-{number}"))?)
            .context(what)?;
        disks.push(began.elapsed());
        let disk = DriveBinding::volume(Arc::clone(&self.store), volume);
        let socket = self.socket(&format!("copy-{number}"));
        let guest = Guest::copy(template, disk, socket, Cable::Echo).context(what)?;
        Ok(Copy {
            number,
            client: guest.client().context(what)?,
            guest,
        })
    }

    fn socket(&self, name: &str) -> std::path::PathBuf {
        self.place
            .socket(format_args!("{}-{name}", self.name.replace(':', "-")))
    }
}

fn volume(name: &str) -> Result<VolumeName, Failure> {
    Ok(VolumeName::new(name)?)
}

fn seed(copy: u32) -> u64 {
    1000 + u64::from(copy)
}

fn median(samples: &mut [Duration]) -> Duration {
    samples.sort();
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

fn time(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn size(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
