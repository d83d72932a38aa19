//! Guests in workers, with the agent as their first program.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command as HostCommand;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use offshoot::agent::{Agent, Command, Generation, Id, Identity, Settings, StepResult};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_devices::vmgenid::GenerationId;
use offshoot_storage::{Access, VolumeName, open_backend};
use offshoot_vmm::arch::cpuid::CpuProfile;
use offshoot_vmm::worker::{DriveFrom, Exit, MachinePlan, Program, Worker, WorkerBindings};
use offshoot_vmm::{DriveConfig, ErrorKind, ExitReason, ModelConfig, RamSize};

use crate::console::{Console, console};
use crate::disks::store_with_ext4;
use crate::{BZIMAGE, Failure, INITRD};

const BACKEND: &str = "qcow2";
const MEMORY_MIB: u64 = 160;
/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The most that a command of a scenario may print.
const OUTPUT: usize = 8 << 20;

/// The deadline of whatever is asked now.
pub(crate) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A scenario's directory: a store, sockets and snapshots.
pub(crate) struct Place {
    dir: PathBuf,
    /// What workers are started as.
    pub(crate) program: Program,
}

/// A guest, and how it is reached.
pub(crate) struct Sandbox {
    pub(crate) name: String,
    pub(crate) worker: Worker,
    /// Answers once the guest has taken this generation's identity.
    pub(crate) agent: Agent,
    pub(crate) lines: Console,
    /// How long it took to give the guest its identity.
    pub(crate) identified_in: Duration,
    generation: Generation,
}

impl Place {
    fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    /// Boots a guest whose drive is mounted at `/mnt`.
    pub(crate) fn boot(name: &str, cpus: u8) -> Result<(Self, Sandbox), Failure> {
        let dir = PathBuf::from("/run").join(name);
        let confined = Program::this().allowing(&dir);
        let mut place = Self {
            dir,
            program: confined.with_log(io::stdout().as_fd().try_clone_to_owned()?),
        };
        std::fs::create_dir_all(place.snapshots())?;
        drop(store_with_ext4(
            BACKEND,
            &place.disks(),
            &VolumeName::new("source")?,
        )?);
        let start = Instant::now();
        let booted = match place.try_boot(cpus) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                println!("not confined: {}", crate::sentence(&error));
                place.program = place.program.unconfined();
                place.try_boot(cpus)
            }
            booted => booted,
        };
        let mut source = booted?;
        source.identify()?;
        println!("the agent is there after {:?}", start.elapsed());
        Ok((place, source))
    }

    fn try_boot(&self, cpus: u8) -> Result<Sandbox, offshoot_vmm::Error> {
        let open = |path| File::open(path).expect("the outer guest's RAM disk has it");
        let cpu = CpuProfile {
            baseline: crate::CPU,
            ..CpuProfile::default()
        };
        let ram = RamSize::from_mib(MEMORY_MIB)?;
        let plan = MachinePlan::new(ram, open(BZIMAGE))
            .with_initrd(open(INITRD))
            .with_vcpus(cpus)
            .with_cpu(cpu)
            .with_command_line(format!("{} lab=agent", crate::COMMAND_LINE))
            .with_device("disk", ModelConfig::Drive(DriveConfig::default()))
            .with_device(
                "vsock",
                ModelConfig::Vsock(GuestCid::new(3).expect("no reserved one")),
            )
            .with_device("entropy", ModelConfig::ENTROPY);
        let from = DriveFrom::Volume("source".into());
        let (newborn, bindings) = self
            .prepare("source", from)
            .expect("pipes and random bytes");
        let worker = Worker::boot(&self.program, &plan, bindings, PATIENCE)?;
        Ok(newborn.with(worker))
    }

    /// Forks `source` into guests of these names. They have not taken their identities yet.
    pub(crate) fn fork(&self, source: &Worker, names: &[&str]) -> Result<Vec<Sandbox>, Failure> {
        let mut newborn = Vec::new();
        let mut bindings = Vec::new();
        for name in names {
            let (child, its) = self.prepare(name, DriveFrom::Fork((*name).into()))?;
            newborn.push(child);
            bindings.push(its);
        }
        let start = Instant::now();
        let children = source.fork(bindings, PATIENCE)?;
        println!(
            "forked into {} after {:?}, of which the source stood {:?}",
            names.join(", "),
            start.elapsed(),
            children.source_pause
        );
        let pairs = newborn.into_iter().zip(children.workers);
        Ok(pairs.map(|(child, worker)| child.with(worker)).collect())
    }

    /// A guest's bindings, and what they are seen by.
    fn prepare(&self, name: &str, from: DriveFrom) -> Result<(Newborn, WorkerBindings), Failure> {
        let generation: [u8; 16] = random()?;
        let socket = self.dir.join(format!("{name}.sock"));
        let (mut output, theirs) = io::pipe()?;
        let (mut sink, lines) = console(name);
        // Ends with the worker's end of the pipe.
        thread::spawn(move || io::copy(&mut output, &mut sink));
        let bindings = WorkerBindings::default()
            .with_drive("disk", BACKEND, self.disks(), from)
            .with_vsock("vsock", &socket, None)
            .with_serial(theirs.into())
            .with_generation(GenerationId::from_bytes(generation));
        let newborn = Newborn {
            name: name.into(),
            agent: Agent::at_vsock(socket).of_generation(Generation(generation)),
            lines,
            generation: Generation(generation),
        };
        Ok((newborn, bindings))
    }

    /// Fails unless the file system on a volume that nobody uses is whole, after its journal has
    /// been replayed where it may have to be.
    pub(crate) fn check_disk(&self, name: &str, replay: bool) -> Result<(), Failure> {
        let store = open_backend(BACKEND, &self.disks())?;
        let volume = store.open(&VolumeName::new(name)?, Access::ReadOnly)?;
        let mut content = vec![0; usize::try_from(volume.size())?];
        volume.read_vectored_at(&mut [IoSliceMut::new(&mut content)], 0)?;
        drop(volume);
        let image = self.dir.join("image");
        std::fs::write(&image, content)?;
        let e2fsck = |options: &[&str]| -> Result<_, Failure> {
            let output = HostCommand::new("/bin/e2fsck")
                .args(options)
                .arg(&image)
                .output()?;
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            println!(
                "{name}: e2fsck {}: {}, {said}",
                options.join(" "),
                output.status
            );
            Ok((output.status.code(), said))
        };
        if replay {
            e2fsck(&["-y", "-E", "journal_only"])?;
        }
        let (status, said) = e2fsck(&["-f", "-n"])?;
        std::fs::remove_file(&image)?;
        store.check(&VolumeName::new(name)?)?;
        if status == Some(0) && !said.contains("recovery") {
            Ok(())
        } else {
            Err(format!("the file system of {name} is not clean: {said}").into())
        }
    }

    /// Deletes everything.
    pub(crate) fn end(self) -> Result<(), Failure> {
        Ok(std::fs::remove_dir_all(&self.dir)?)
    }
}

/// A guest before its worker is there.
struct Newborn {
    name: String,
    agent: Agent,
    lines: Console,
    generation: Generation,
}

impl Newborn {
    fn with(self, worker: Worker) -> Sandbox {
        Sandbox {
            name: self.name,
            worker,
            agent: self.agent,
            lines: self.lines,
            identified_in: Duration::ZERO,
            generation: self.generation,
        }
    }
}

impl Sandbox {
    /// Gives the guest the identity of its generation; its host name is its own.
    pub(crate) fn identify(&mut self) -> Result<(), Failure> {
        let start = Instant::now();
        let settings = Settings {
            hostname: Some(self.name.clone().into_bytes()),
            machine_id: Some(Id(random()?)),
            ..Settings::default()
        };
        let identity = Identity {
            generation: self.generation,
            unix_ns: unix_ns()?,
            seed: random::<64>()?.to_vec(),
            settings,
            hook_limit_ms: 0,
        };
        let report = self.agent.identify(&identity, soon())?;
        self.identified_in = start.elapsed();
        println!(
            "{} is ready after {:?}; in the guest that took {} us",
            self.name, self.identified_in, report.micros
        );
        match report
            .steps
            .iter()
            .find(|step| step.result == StepResult::Failed)
        {
            None => Ok(()),
            Some(step) => Err(format!("{}: a step failed: {step:?}", self.name).into()),
        }
    }

    /// Runs a shell command that has to succeed, and returns what it printed.
    pub(crate) fn sh(&self, script: &str) -> Result<String, Failure> {
        let output = self
            .agent
            .run(&Command::shell(script), b"", OUTPUT, soon())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.exit.success() {
            Ok(text(&output.stdout))
        } else {
            let said = text(&output.stderr);
            Err(format!("{}: {script}: {:?}, {said}", self.name, output.exit).into())
        }
    }

    /// Fails when the guest's kernel has complained of anything.
    pub(crate) fn no_alarm(&mut self) -> Result<(), Failure> {
        self.lines.no_alarm()?;
        let log = self.sh("dmesg")?;
        match log.lines().find(|line| crate::console::is_alarm(line)) {
            None => Ok(()),
            Some(line) => Err(format!("{}: the kernel complains: {line}", self.name).into()),
        }
    }

    /// Has the guest switch itself off.
    pub(crate) fn power_off(self) -> Result<(), Failure> {
        self.agent
            .power(offshoot::agent::PowerAction::Off, soon())?;
        let exit = self.worker.wait(PATIENCE);
        if exit != Some(Exit::Guest(ExitReason::PowerOff)) {
            return Err(format!("{} ended with {exit:?}", self.name).into());
        }
        Ok(self.worker.stop(PATIENCE)?)
    }
}

/// What no two guests may have in common.
#[derive(Default)]
pub(crate) struct Identities(HashSet<String>);

impl Identities {
    /// Fails when the guest has something that one before has, too.
    pub(crate) fn add(&mut self, sandbox: &Sandbox) -> Result<(), Failure> {
        let hostname = sandbox.sh("hostname")?;
        if hostname.trim() != sandbox.name {
            return Err(format!("{} is called {hostname:?}", sandbox.name).into());
        }
        let all = sandbox.sh(
            "head -c 16 /dev/urandom | xxd -p; cat /proc/sys/kernel/random/uuid; \
             cat /etc/machine-id",
        )?;
        let lines: Vec<_> = all.lines().collect();
        if lines.len() != 3 {
            return Err(format!("{} says {all:?}", sandbox.name).into());
        }
        match lines
            .into_iter()
            .find(|line| !self.0.insert((*line).into()))
        {
            None => Ok(()),
            Some(line) => Err(format!("{} is not the first with {line}", sandbox.name).into()),
        }
    }
}

/// Random bytes of the host.
fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The host's wall clock.
pub(crate) fn unix_ns() -> Result<u64, Failure> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(u64::try_from(now.as_nanos())?)
}
