//! Machines in processes of their own: this program as the worker, forked live.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use offshoot_devices::virtio::net::{Mac, NetConfig};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::protocol::{BlkOp, Crash, Outcome, Request, State};
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_snapshot_format::{RawSnapshot, Verify};
use offshoot_storage::{StorageBackend, VolumeName, open_backend};
use offshoot_vmm::worker::{DriveFrom, Exit, MachinePlan, Program, Worker, WorkerBindings};
use offshoot_vmm::{ErrorKind, ExitReason, Host, ModelConfig, RamSize, SaveOptions, Template};

const PATIENCE: Duration = Duration::from_secs(30);
const DISK: u64 = 4 << 20;
const MEMORY: u64 = 8 << 20;

/// A directory with a store, sockets and snapshots.
struct Place {
    dir: tempfile::TempDir,
    backend: &'static str,
}

type Pilot = PilotClient<UnixStream>;

impl Place {
    fn new(backend: &'static str) -> Option<Self> {
        if let Err(error) = Host::open() {
            skipped(&error.to_string());
            return None;
        }
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
            backend,
        };
        std::fs::create_dir(place.snapshots()).unwrap();
        Some(place)
    }

    fn program(&self) -> Program {
        Program::at(env!("CARGO_BIN_EXE_offshoot")).allowing(self.dir.path())
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("disks")
    }

    fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    fn open(&self) -> Arc<dyn StorageBackend> {
        open_backend(self.backend, &self.store()).unwrap()
    }

    fn bindings(&self, name: &str, from: DriveFrom) -> WorkerBindings {
        WorkerBindings::default()
            .with_drive("disk", self.backend, self.store(), from)
            .with_vsock("vsock", self.socket(name), None)
            .with_unplugged("net")
    }

    fn fork(&self, name: &str) -> WorkerBindings {
        self.bindings(name, DriveFrom::Fork(name.into()))
    }

    fn boot(&self, name: &str, vcpus: u8) -> Worker {
        let net = NetConfig {
            mac: Mac::new([0x52, 0x54, 0, 0, 0, 1]).unwrap(),
            mtu: None,
        };
        let plan = MachinePlan::new(RamSize::from_mib(64).unwrap(), kernel())
            .with_vcpus(vcpus)
            .with_device("disk", ModelConfig::Drive(Default::default()))
            .with_device("vsock", ModelConfig::Vsock(GuestCid::new(3).unwrap()))
            .with_device("net", ModelConfig::Net(net))
            .with_device("entropy", ModelConfig::ENTROPY);
        let from = DriveFrom::New(name.into(), NonZeroU64::new(DISK).unwrap());
        Worker::boot(&self.program(), &plan, self.bindings(name, from), PATIENCE).unwrap()
    }

    fn pilot(&self, name: &str) -> Pilot {
        PilotClient::connect(&self.socket(name), Instant::now() + PATIENCE).unwrap()
    }

    /// The volumes there are; nobody has any of them open.
    fn volumes(&self) -> Vec<String> {
        let store = self.open();
        let volumes = store.volumes().unwrap();
        for volume in &volumes {
            store
                .open(volume, offshoot_storage::Access::ReadWrite)
                .unwrap();
        }
        volumes.iter().map(ToString::to_string).collect()
    }
}

#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

fn kernel() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(PILOT_ELF).unwrap();
    file
}

fn blk(op: BlkOp, seed: u64) -> Request {
    Request::Blk {
        device: 0,
        op,
        offset: 0,
        len: DISK,
        seed,
        chunk: 65536,
        depth: 8,
    }
}

fn good(pilot: &mut Pilot, request: &Request) -> Outcome {
    let outcome = pilot.work(request).unwrap();
    assert_eq!(outcome.bad, 0, "{request:?}: {outcome:?}");
    outcome
}

fn write(pilot: &mut Pilot, seed: u64) {
    good(
        pilot,
        &Request::Fill {
            offset: 0,
            len: MEMORY,
            seed,
        },
    );
    good(pilot, &blk(BlkOp::Write, seed));
}

fn holds(pilot: &mut Pilot, seed: u64) {
    good(
        pilot,
        &Request::Verify {
            offset: 0,
            len: MEMORY,
            seed,
        },
    );
    good(pilot, &blk(BlkOp::Verify, seed));
}

fn continues(pilot: &mut Pilot, source: &State) {
    let state = pilot.state().unwrap();
    assert_eq!(state.boot_id, source.boot_id);
    assert!(state.counter >= source.counter);
    assert_ne!(state.generation, source.generation);
}

fn live_forks(backend: &'static str, vcpus: u8) {
    let Some(place) = Place::new(backend) else {
        return;
    };
    let source = place.boot("source", vcpus);
    let mut pilot = place.pilot("source");
    write(&mut pilot, 1);
    let before = pilot.state().unwrap();

    let children = source
        .fork(vec![place.fork("a"), place.fork("b")], PATIENCE)
        .unwrap();
    assert!(children.source_pause > Duration::ZERO);
    // The source goes on over its old connection.
    write(&mut pilot, 2);
    let mut pilots = [place.pilot("a"), place.pilot("b")];
    for (seed, pilot) in (10..).zip(&mut pilots) {
        continues(pilot, &before);
        holds(pilot, 1);
        write(pilot, seed);
    }
    // A grandchild, and a great-grandchild when its ancestors are gone.
    let [a, b] = &children.workers[..] else {
        panic!()
    };
    let mut grandchild = a.fork(vec![place.fork("aa")], PATIENCE).unwrap().workers;
    let mut workers = children.workers.iter();
    assert!(workers.all(|worker| worker.wait(Duration::ZERO).is_none()));
    let _ = b;
    holds(&mut pilots[1], 11);
    for child in children.workers {
        child.stop(PATIENCE).unwrap();
    }
    holds(&mut pilot, 2);
    drop(pilots);
    source.stop(PATIENCE).unwrap();
    let mut pilot = place.pilot("aa");
    holds(&mut pilot, 10);
    let last = grandchild
        .remove(0)
        .fork(vec![place.fork("aaa")], PATIENCE)
        .unwrap();
    let mut pilot = place.pilot("aaa");
    holds(&mut pilot, 10);
    write(&mut pilot, 12);
    holds(&mut pilot, 12);
    for worker in last.workers {
        worker.stop(PATIENCE).unwrap();
    }
}

#[test]
fn live_forks_continue_and_are_apart_on_copy() {
    live_forks("copy", 1);
}

#[test]
fn live_forks_continue_and_are_apart_on_qcow2_with_two_processors() {
    live_forks("qcow2", 2);
}

#[test]
fn a_snapshot_is_written_while_its_source_goes_on() {
    let Some(place) = Place::new("qcow2") else {
        return;
    };
    let source = place.boot("source", 1);
    let mut pilot = place.pilot("source");
    write(&mut pilot, 1);
    let before = pilot.state().unwrap();
    let options = SaveOptions::new().unwrap();
    let snapshotting = source
        .snapshot(&place.snapshots(), options, PATIENCE)
        .unwrap();
    write(&mut pilot, 2);
    let mut last = 0;
    let saved = snapshotting
        .wait(
            |done, total| {
                assert!(done > last && done <= total);
                last = done;
            },
            PATIENCE,
        )
        .unwrap();
    holds(&mut pilot, 2);

    // The snapshot is like any other: an engine in this process can use it, and so can a template.
    let host = Host::open().unwrap();
    let raw = RawSnapshot::open(&saved.path).unwrap();
    Template::load(&host, &raw, Verify::Eager).unwrap();
    let loaded = Worker::template(&place.program(), &saved.path, Verify::Eager, PATIENCE);
    let (template, info) = loaded.unwrap();
    assert_eq!(info.id, saved.id);
    assert_eq!(info.disks[0].layer, saved.layers[0].1.to_string());
    let copies = template
        .fork(vec![place.fork("a"), place.fork("b")], PATIENCE)
        .unwrap();
    assert_eq!(copies.source_pause, Duration::ZERO);
    for (seed, name) in [(20, "a"), (21, "b")] {
        let mut pilot = place.pilot(name);
        continues(&mut pilot, &before);
        holds(&mut pilot, 1);
        write(&mut pilot, seed);
        holds(&mut pilot, seed);
    }
    // Copies fork as well, also when their template is gone.
    drop(template);
    let again = copies.workers[0]
        .fork(vec![place.fork("c")], PATIENCE)
        .unwrap();
    holds(&mut place.pilot("c"), 20);
    drop((again, copies, source));
}

#[test]
fn a_fork_that_fails_leaves_nothing_and_its_source_runs_on() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let source = place.boot("source", 1);
    let mut pilot = place.pilot("source");
    write(&mut pilot, 1);
    // The second child's disk has the source's name.
    let wrong = place.bindings("b", DriveFrom::Fork("source".into()));
    let error = source
        .fork(vec![place.fork("a"), wrong, place.fork("c")], PATIENCE)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage, "{error:?}");
    // Without a binding, with one too many: all is told.
    let wrong = place
        .fork("a")
        .with_vsock("other", place.socket("other"), None);
    let error = source.fork(vec![wrong], PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bindings, "{error:?}");
    assert!(format!("{error:?}").contains("no vsock other"), "{error:?}");
    holds(&mut pilot, 1);
    let children = source.fork(vec![place.fork("a")], PATIENCE).unwrap();
    holds(&mut place.pilot("a"), 1);
    for child in children.workers {
        child.discard(PATIENCE).unwrap();
    }
    source.stop(PATIENCE).unwrap();
    assert_eq!(place.volumes(), ["source"]);
    assert!(place.open().layers().unwrap().is_empty());
    assert!(!place.socket("a").exists());
}

#[test]
fn ends_are_told_apart() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let source = place.boot("source", 1);
    let names = ["reset", "fault", "killed", "dropped"];
    let children = source
        .fork(names.map(|name| place.fork(name)).into(), PATIENCE)
        .unwrap();
    let [reset, fault, killed, dropped] = <[Worker; 4]>::try_from(children.workers).unwrap();
    place.pilot("reset").tell(&Request::Reboot {}).unwrap();
    assert_eq!(reset.wait(PATIENCE), Some(Exit::Guest(ExitReason::Reset)));
    place
        .pilot("fault")
        .tell(&Request::Crash {
            how: Crash::TripleFault,
        })
        .unwrap();
    assert_eq!(
        fault.wait(PATIENCE),
        Some(Exit::Guest(ExitReason::TripleFault))
    );
    assert_eq!(killed.wait(Duration::from_millis(20)), None);
    killed.kill().unwrap();
    assert_eq!(killed.wait(PATIENCE), Some(Exit::Gone { status: None }));
    let error = killed.pause(PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Ended);

    // A worker whose handle goes ends by itself, and lets go of its disk.
    let pid = dropped.pid();
    drop(dropped);
    let deadline = Instant::now() + PATIENCE;
    let name = VolumeName::new("dropped").unwrap();
    let store = place.open();
    while store
        .open(&name, offshoot_storage::Access::ReadWrite)
        .is_err()
    {
        assert!(Instant::now() < deadline, "process {pid} holds its disk");
        std::thread::sleep(Duration::from_millis(1));
    }
    source.kill().unwrap();
    let Some(Exit::Gone {
        status: Some(status),
    }) = source.wait(PATIENCE)
    else {
        panic!("its status is known")
    };
    assert_eq!(status, 9, "killed by signal 9");
}

#[test]
fn a_worker_pauses_and_goes_on_and_refuses_what_it_cannot() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let source = place.boot("source", 1);
    let mut pilot = place.pilot("source");
    write(&mut pilot, 1);
    source.pause(PATIENCE).unwrap();
    assert_eq!(
        source.pause(PATIENCE).unwrap_err().kind(),
        ErrorKind::Config
    );
    // A fork of a paused machine runs.
    let children = source.fork(vec![place.fork("a")], PATIENCE).unwrap();
    holds(&mut place.pilot("a"), 1);
    source.resume(PATIENCE).unwrap();
    assert_eq!(
        source.resume(PATIENCE).unwrap_err().kind(),
        ErrorKind::Config
    );
    holds(&mut pilot, 1);
    drop(children);

    let error =
        Worker::template(&place.program(), &place.snapshots(), Verify::None, PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadState, "{error:?}");
    let nowhere = Program::at("/nowhere/offshoot");
    let error = Worker::template(&nowhere, &place.snapshots(), Verify::None, PATIENCE).unwrap_err();
    assert!(
        format!("{error:?}").contains("/nowhere/offshoot"),
        "{error:?}"
    );
    // A program that is no worker.
    let error = Worker::template(
        &Program::at("/bin/true"),
        &place.snapshots(),
        Verify::None,
        PATIENCE,
    );
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Ended);
}

/// The source works its disk and memory all the time; every child finds a consistent whole.
#[test]
fn a_busy_source_is_forked_again_and_again() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let source = place.boot("source", 2);
    let mut pilot = place.pilot("source");
    write(&mut pilot, 1);
    let dirty = Request::Dirty {
        offset: 0,
        len: MEMORY,
        rate: 20_000,
    };
    pilot.order(&dirty).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                // The same content, so that a child's disk is whole at any moment.
                good(&mut pilot, &blk(BlkOp::Write, 1));
                good(&mut pilot, &blk(BlkOp::Verify, 1));
                rounds += 1;
            }
            rounds
        });
        for number in 0..60 {
            let name = format!("child{number}");
            let children = source.fork(vec![place.fork(&name)], PATIENCE).unwrap();
            let mut child = place.pilot(&name);
            holds(&mut child, 1);
            drop(child);
            for worker in children.workers {
                worker.discard(PATIENCE).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(busy.join().unwrap() > 5);
    });
    source.stop(PATIENCE).unwrap();
    assert_eq!(place.volumes(), ["source"]);
    assert!(place.open().layers().unwrap().is_empty());
}

/// Forks of forks, each generation's source gone before the next: nothing grows that limits depth.
#[test]
fn a_lineage_goes_deep() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let mut worker = place.boot("g0", 1);
    write(&mut place.pilot("g0"), 1);
    let mut fds = Vec::new();
    for generation in 1..=40 {
        let name = format!("g{generation}");
        let mut children = worker.fork(vec![place.fork(&name)], PATIENCE).unwrap();
        worker.discard(PATIENCE).unwrap();
        worker = children.workers.remove(0);
        let open = std::fs::read_dir(format!("/proc/{}/fd", worker.pid()))
            .unwrap()
            .count();
        fds.push(open);
    }
    let mut pilot = place.pilot("g40");
    holds(&mut pilot, 1);
    assert!(fds[39] <= fds[1], "descriptors grow with depth: {fds:?}");
    worker.stop(PATIENCE).unwrap();
    assert_eq!(place.volumes(), ["g40"]);
}

fn outside_of_reach(error: &offshoot_vmm::Error) {
    let text = format!("{error:?}");
    assert!(text.contains("Permission denied"), "{text}");
    assert!(text.contains("Program::allowing"), "{text}");
}

#[test]
fn a_worker_reaches_its_directories_only() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let elsewhere = tempfile::tempdir().unwrap();
    let source = place.boot("source", 1);
    let mut pilot = place.pilot("source");
    write(&mut pilot, 1);
    // A snapshot, a disk and a socket in a directory that the worker was not given.
    let options = SaveOptions::new().unwrap();
    let writing = source
        .snapshot(elsewhere.path(), options, PATIENCE)
        .unwrap();
    let error = writing.wait(|_, _| (), PATIENCE).unwrap_err();
    outside_of_reach(&error);
    let outside = WorkerBindings::default()
        .with_drive(
            "disk",
            "copy",
            elsewhere.path().join("disks"),
            DriveFrom::Fork("a".into()),
        )
        .with_vsock("vsock", place.socket("a"), None)
        .with_unplugged("net");
    let error = source.fork(vec![outside], PATIENCE).unwrap_err();
    outside_of_reach(&error);
    let socket = elsewhere.path().join("a.sock");
    let outside = WorkerBindings::default()
        .with_drive("disk", "copy", place.store(), DriveFrom::Fork("a".into()))
        .with_vsock("vsock", socket, None)
        .with_unplugged("net");
    let error = source.fork(vec![outside], PATIENCE).unwrap_err();
    outside_of_reach(&error);
    holds(&mut pilot, 1);
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    let status = std::fs::read_to_string(format!("/proc/{}/status", source.pid())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    drop(pilot);
    source.stop(PATIENCE).unwrap();
    assert_eq!(place.volumes(), ["source"]);
    assert!(place.open().layers().unwrap().is_empty());
}

#[test]
fn a_start_that_fails_half_way_takes_back_what_it_made() {
    let Some(place) = Place::new("copy") else {
        return;
    };
    let source = place.boot("source", 1);
    let drive = || ModelConfig::Drive(Default::default());
    let plan = MachinePlan::new(RamSize::from_mib(64).unwrap(), kernel())
        .with_device("first", drive())
        .with_device("second", drive());
    let new = |name: &str| DriveFrom::New(name.into(), NonZeroU64::new(DISK).unwrap());
    let bindings = WorkerBindings::default()
        .with_drive("first", "copy", place.store(), new("made"))
        .with_drive("second", "copy", place.store(), new("source"));
    let error = Worker::boot(&place.program(), &plan, bindings, PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage, "{error:?}");
    // Nothing of the embedder's environment is with a worker.
    let environment = std::fs::read_to_string(format!("/proc/{}/environ", source.pid())).unwrap();
    let mut variables = environment.split('\0').filter(|line| !line.is_empty());
    assert!(
        variables.all(|line| line.starts_with("LD_LIBRARY_PATH=")),
        "{environment}"
    );
    source.stop(PATIENCE).unwrap();
    assert_eq!(place.volumes(), ["source"]);
}
