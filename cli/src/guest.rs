//! The pilot guest with a disk, a network card and a vsock, as the demo and the bench run it.

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use offshoot_devices::virtio::net::{Mac, NetConfig, Stream};
use offshoot_devices::virtio::vsock::GuestCid;
use offshoot_pilot::{PILOT_ELF, PilotClient};
use offshoot_vmm::boot::{BootSource, Image};
use offshoot_vmm::{
    Bindings, DriveBinding, DriveConfig, ExitReason, Host, Machine, MachineConfig, ModelConfig,
    NetHost, NetPeer, RamSize, Running, Template, VsockHost,
};

use crate::failure::{Context, Failure};

/// The id of the drive.
pub(crate) const DISK: &str = "disk";
const NET: &str = "net";
const VSOCK: &str = "vsock";
/// How long a guest may take for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How a pilot is to be booted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) ram: RamSize,
    pub(crate) vcpus: u8,
}

/// A running pilot and the host's ends of its devices.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) running: Running,
    pub(crate) console: Console,
    vsock: PathBuf,
    /// Held, so that the link stays up.
    _cable: Option<UnixStream>,
}

/// What a pilot's network card is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cable {
    /// A peer that sends every frame back.
    Echo,
    /// A peer that is silent.
    Silent,
}

/// What a pilot is bound to on the host.
struct Ends {
    bindings: Bindings,
    console: Console,
    cable: Option<UnixStream>,
}

impl Ends {
    fn new(disk: DriveBinding, vsock: &Path, cable: Cable) -> Result<Self, Failure> {
        let (ours, theirs) = UnixStream::pair().context(|| "cannot make a network cable".into())?;
        let console = Console::default();
        let bindings = Bindings::default()
            .with_drive(DISK, disk)
            .with_vsock(VSOCK, VsockHost::at(vsock))
            .with_net(
                NET,
                NetHost::to(NetPeer::Open(Box::new(Stream::new(theirs)?))),
            )
            .with_serial(console.clone());
        let cable = match cable {
            Cable::Silent => Some(ours),
            Cable::Echo => {
                std::thread::Builder::new()
                    .name("net-echo".into())
                    .spawn(move || send_frames_back(ours))
                    .context(|| "cannot start the network peer".into())?;
                None
            }
        };
        Ok(Self {
            bindings,
            console,
            cable,
        })
    }
}

/// Until the card is gone.
fn send_frames_back(mut socket: UnixStream) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(count @ 1..) = socket.read(&mut bytes) {
        if socket
            .write_all(bytes.get(..count).unwrap_or_default())
            .is_err()
        {
            break;
        }
    }
}

impl Guest {
    /// Boots a pilot.
    pub(crate) fn boot(
        host: &Arc<Host>,
        plan: Plan,
        disk: DriveBinding,
        vsock: PathBuf,
        cable: Cable,
    ) -> Result<Self, Failure> {
        let kernel = Image::Bytes(Cow::Borrowed(PILOT_ELF));
        let net = NetConfig {
            mac: Mac::new([0x52, 0x54, 0, 0, 0, 1])?,
            mtu: None,
        };
        let mut config = MachineConfig::new(plan.ram, BootSource::new(kernel))
            .with_device(DISK, ModelConfig::Drive(DriveConfig::default()))
            .with_device(NET, ModelConfig::Net(net))
            .with_device(VSOCK, ModelConfig::Vsock(GuestCid::new(3)?))
            .with_device("entropy", ModelConfig::ENTROPY);
        config.vcpus = plan.vcpus;
        let ends = Ends::new(disk, &vsock, cable)?;
        let machine = Machine::boot(host, &config, ends.bindings)?;
        Ok(Self {
            running: machine.start()?,
            console: ends.console,
            vsock,
            _cable: ends.cable,
        })
    }

    /// Starts a copy of a pilot.
    pub(crate) fn copy(
        template: &Template,
        disk: DriveBinding,
        vsock: PathBuf,
        cable: Cable,
    ) -> Result<Self, Failure> {
        let ends = Ends::new(disk, &vsock, cable)?;
        Ok(Self {
            running: template.fork(ends.bindings)?.start()?,
            console: ends.console,
            vsock,
            _cable: ends.cable,
        })
    }

    /// Connects to the guest's command port.
    pub(crate) fn client(&self) -> Result<PilotClient<UnixStream>, Failure> {
        PilotClient::connect(&self.vsock, Instant::now() + PATIENCE).context(|| self.obituary())
    }

    /// Ends it, and waits until nothing of it is left.
    pub(crate) fn end(self) {
        self.running.stop().wait();
    }

    /// The path of its vsock on the host.
    pub(crate) fn vsock(&self) -> &Path {
        &self.vsock
    }

    /// Waits until an instruction of the guest has caused an exit: when that was.
    pub(crate) fn first_exit(&self) -> Result<Instant, Failure> {
        let what = "the guest has not run an instruction that the host sees";
        self.wait_for(what, || self.running.first_exit())
    }

    /// Waits for the first byte on the serial line: when that was.
    pub(crate) fn first_byte(&self) -> Result<Instant, Failure> {
        self.wait_for("the guest has not said anything", || {
            self.console.first_byte()
        })
    }

    fn wait_for<T>(&self, what: &str, look: impl Fn() -> Option<T>) -> Result<T, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            if Instant::now() >= deadline || self.running.exits().reason().is_some() {
                return Err(Failure::new(what).context(self.obituary()));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// What became of the guest, for the report of a failure.
    fn obituary(&self) -> String {
        let state = match self.running.exits().reason() {
            None => "the guest runs and does not answer".to_owned(),
            Some(ExitReason::PowerOff) => "the guest has switched itself off".to_owned(),
            Some(reason) => format!("the guest is gone: {reason}"),
        };
        let said = self.console.text();
        match said.trim() {
            "" => format!("{state}; its serial line is empty"),
            said => format!("{state}; its serial line says: {said}"),
        }
    }
}

/// What a guest says on its serial line, and when it began to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Said>>);

#[derive(Debug, Default)]
struct Said {
    bytes: Vec<u8>,
    first: Option<Instant>,
}

/// The most that is kept of what a guest says.
const MAX_SAID: usize = 64 << 10;

impl Console {
    fn first_byte(&self) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).first
    }

    fn text(&self) -> String {
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&said.bytes).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.first.get_or_insert_with(Instant::now);
        let room = MAX_SAID.saturating_sub(said.bytes.len());
        said.bytes.extend(bytes.iter().take(room));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
