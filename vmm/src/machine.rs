//! A machine and the stages of its life.
//!
//! ```text
//!           boot, build                start                    pause
//!  config ──────────────► Machine ─────────────► Running ◄──────────────► Paused<'_>
//!  state                 (paused)  ◄─────────────            drop, resume     │ capture
//!                                     into_paused                             ▼ MachineState
//! ```
//!
//! # Pausing, in order
//! | step | why here |
//! |---|---|
//! | vCPUs leave the guest, their last exit completed | from here on nothing new is asked of a device, and no register window changes |
//! | the device loop parks | no device handles an event while it is looked at, and nobody holds a device's lock |
//! | devices quiesce | requests in flight reach their used rings: the memory is final after this |
//! | interrupts | a line that was raised may still be on its way inside KVM; what is pending stands in each transport's interrupt status, and is raised (again) in whatever goes on from here |
//!
//! # Resuming, in order
//! | step | why here |
//! |---|---|
//! | devices resume and raise what is pending | their interrupts must find the guest as it left |
//! | the device loop runs | |
//! | guests' clocks are told of the stop | so that a guest's watchdog does not take the pause for a hang |
//! | vCPUs run | last: everything they can reach is there |

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use offshoot_devices::vmgenid::VmGenId;
use vmm_sys_util::eventfd::EventFd;

use crate::bindings::{Bindings, DriveBinding};
use crate::device_loop::DeviceLoop;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::exits::{ExitReason, Exits, FirstExit};
use crate::kvm::{Host, Vm};
use crate::legacy::Legacy;
use crate::memory::Memory;
use crate::slots::Slot;
use crate::state::PlatformState;
use crate::threads;
use crate::vcpu::Vcpu;

/// All that a machine consists of, whatever its stage.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) host: Arc<Host>,
    pub(crate) platform: PlatformState,
    pub(crate) cpuids: Vec<CpuId>,
    pub(crate) msr_indices: Vec<u32>,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) device_loop: DeviceLoop,
    pub(crate) slots: Vec<Slot>,
    pub(crate) bindings: Bindings,
    pub(crate) legacy: Legacy,
    pub(crate) generation: Generation,
    pub(crate) power_button: EventFd,
    pub(crate) vm: Arc<Vm>,
    pub(crate) exits: Arc<Exits>,
    pub(crate) first_exit: Arc<FirstExit>,
    /// A step of a resume failed: the machine cannot run any more.
    pub(crate) broken: bool,
    /// Dropped last: tells the reaper that the rest is gone. See [`Core::end`].
    pub(crate) last: Option<Sender<()>>,
}

/// The generation id and the line that tells of its change.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) id: VmGenId,
    /// Kept so that the line stays connected.
    pub(crate) _changed: EventFd,
}

impl Core {
    /// The pause, as the table above has it.
    fn pause(&mut self) -> Result<()> {
        self.vcpus.iter().for_each(Vcpu::ask_to_park);
        let parked = self
            .vcpus
            .iter()
            .try_for_each(Vcpu::wait_parked)
            .and_then(|()| self.device_loop.park());
        let quiesced = parked.and_then(|()| {
            self.legacy.quiesce();
            self.slots.iter().try_for_each(Slot::quiesce)
        });
        if quiesced.is_err() && self.exits.reason() != Some(ExitReason::ThreadLost) {
            // What did stop goes on: a machine that cannot be paused runs.
            self.resume()?;
        }
        quiesced
    }

    /// The resume, as the table above has it.
    fn resume(&mut self) -> Result<()> {
        if self.broken {
            return Err(Error::new(
                ErrorKind::Ended,
                "a device of the machine could not go on; the machine cannot run any more",
            ));
        }
        let slots = self.slots.iter().try_for_each(Slot::resume);
        if let Err(error) = slots.and_then(|()| self.legacy.resume()) {
            self.broken = true;
            return Err(error);
        }
        self.device_loop.run();
        for vcpu in &self.vcpus {
            // Refused when the guest does not use kvmclock: then there is nothing to tell.
            let _ = vcpu.with(kvm_ioctls::VcpuFd::kvmclock_ctrl);
        }
        self.first_exit.arm();
        self.vcpus.iter().for_each(Vcpu::resume);
        Ok(())
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        self.vm.memory()
    }

    /// Ends threads and devices, here; and closes KVM's descriptors and unmaps the memory, which
    /// takes tens of milliseconds, on a thread of their own.
    fn end(&mut self) -> Cleanup {
        for vcpu in &self.vcpus {
            vcpu.ask_to_park();
        }
        self.device_loop.quit();
        let mut vcpus = std::mem::take(&mut self.vcpus);
        vcpus.iter_mut().for_each(Vcpu::quit);
        self.slots.clear();
        self.bindings = Bindings::default();
        let (last, rest_is_gone): (Sender<()>, Receiver<()>) = mpsc::channel();
        let vm = Arc::clone(&self.vm);
        let reaper = threads::spawn("reaper".into(), move || {
            // Ends with an error, by design: nothing is sent, the sender goes with the machine.
            let _ = rest_is_gone.recv();
            drop(vcpus);
            drop(vm);
        });
        match reaper {
            Ok(thread) => {
                self.last = Some(last);
                Cleanup(Some(thread))
            }
            // No thread to be had: the closure, and with it everything, was dropped here.
            Err(_) => Cleanup(None),
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.last.is_none() {
            drop(self.end());
        }
    }
}

/// The closing of a stopped machine's KVM descriptors, which takes tens of milliseconds and which
/// nobody needs to wait for. Dropping this does not wait.
#[derive(Debug)]
#[must_use = "wait for it, or drop it so as not to wait"]
pub struct Cleanup(Option<JoinHandle<()>>);

impl Cleanup {
    /// Waits until all of the machine's descriptors and memory are gone.
    pub fn wait(mut self) {
        if let Some(thread) = self.0.take() {
            // Nothing there panics but a destructor of ours, and then it is gone, too.
            let _ = thread.join();
        }
    }
}

/// A machine that does not run: just booted or built, or taken out of running. Dropping it ends
/// it.
#[derive(Debug)]
pub struct Machine {
    pub(crate) core: Box<Core>,
}

/// A machine whose guest runs, until it is paused or ends itself. Dropping it ends it.
#[derive(Debug)]
pub struct Running {
    core: Box<Core>,
}

/// A pause of a machine: the proof that nothing of it moves. A running machine goes on when this
/// is dropped.
#[derive(Debug)]
pub struct Paused<'a> {
    pub(crate) core: &'a mut Core,
    resume: bool,
}

impl Machine {
    /// Lets the guest run.
    ///
    /// # Errors
    /// When a device cannot start; the machine is gone then.
    pub fn start(mut self) -> Result<Running> {
        self.core.resume()?;
        Ok(Running { core: self.core })
    }

    /// The machine as what it is: paused.
    pub fn paused(&mut self) -> Paused<'_> {
        Paused {
            core: &mut self.core,
            resume: false,
        }
    }

    /// Ends the machine. Its devices have let go of their bindings on return.
    pub fn stop(mut self) -> Cleanup {
        self.core.end()
    }
}

impl Running {
    /// Stops the guest until the pause is dropped.
    ///
    /// # Errors
    /// When a device could not come to rest; the guest then runs on.
    pub fn pause(&mut self) -> Result<Paused<'_>> {
        self.core.pause()?;
        Ok(Paused {
            core: &mut self.core,
            resume: true,
        })
    }

    /// Has everything that the guest has written to its drives reach the disk, while it runs on. Done
    /// right before a pause in which drives are frozen, it leaves less to be done in the pause; nothing
    /// else depends on it.
    ///
    /// # Errors
    /// When a drive's storage fails.
    pub fn flush_drives(&self) -> Result<()> {
        for (id, drive) in &self.core.bindings.drives {
            let volume = &drive.host.volume;
            if !volume.is_read_only() {
                volume
                    .flush()
                    .map_err(|e| Error::io(format!("cannot flush drive {id}"), e))?;
            }
        }
        Ok(())
    }

    /// Stops the guest until it is started again.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause); the machine then runs on, and is handed back.
    pub fn into_paused(mut self) -> std::result::Result<Machine, (Self, Error)> {
        match self.core.pause() {
            Ok(()) => Ok(Machine { core: self.core }),
            Err(error) => Err((self, error)),
        }
    }

    /// Where the end of the guest is told.
    #[must_use]
    pub fn exits(&self) -> &Arc<Exits> {
        &self.core.exits
    }

    /// Waits until the guest has ended, for at most `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<ExitReason> {
        self.core.exits.wait(timeout)
    }

    /// When an instruction of the guest first caused an exit after the last start or resume.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.core.first_exit.at()
    }

    /// Sends bytes to the guest's serial port. Returns how many it has taken; it takes more when
    /// the guest has read some.
    #[must_use]
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.core.legacy.input(bytes)
    }

    /// Presses the power button: asks the guest to switch itself off.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&self) -> Result<()> {
        self.core
            .power_button
            .write(1)
            .context("cannot press the power button")
    }

    /// Ends the machine, whatever the guest is doing. Its devices have let go of their bindings on
    /// return.
    pub fn stop(mut self) -> Cleanup {
        self.core.end()
    }
}

impl Paused<'_> {
    /// Lets the guest go on.
    ///
    /// # Errors
    /// When a device cannot go on; the machine is then of no more use.
    pub fn resume(mut self) -> Result<()> {
        self.resume = false;
        self.core.resume()
    }

    /// The memory; nothing of the machine changes it during the pause.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        self.core.memory()
    }

    /// The bindings of a drive.
    #[must_use]
    pub fn drive(&self, id: &str) -> Option<&DriveBinding> {
        self.core.bindings.drives.get(id)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if self.resume
            && let Err(error) = self.core.resume()
        {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a paused machine cannot go on"
            );
            self.core.exits.post(ExitReason::ThreadLost);
        }
    }
}
