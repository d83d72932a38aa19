//! A vCPU and its thread.
//!
//! The thread is parked (holding no lock) or runs the guest. The vCPU's descriptor is behind a
//! lock that the thread holds while it runs the guest, so that its state can be read and set
//! from outside exactly while it is parked. `KVM_RUN` is only ever called by the thread: KVM waits
//! for a grace period when the caller changes.
//!
//! # Rules of the unsafe code here
//! One field of `kvm_run` that kvm-ioctls does not pass on is read, right after the exit that
//! filled it and before anything else touches the vCPU.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::exits::{ExitReason, Exits, FirstExit, KvmError, Registers};
use crate::sync::lock;
use crate::threads;

/// What all vCPU threads of a machine share.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
    pub(crate) exits: Arc<Exits>,
    pub(crate) first_exit: Arc<FirstExit>,
}

/// A vCPU with its thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// `state.want != Want::Run`, for the thread to see without the lock.
    leave: AtomicBool,
}

#[derive(Debug)]
struct State {
    want: Want,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Park,
    Run,
    Quit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Parked,
    Running,
    Gone,
}

impl Control {
    fn set(&self, want: Want) {
        let mut state = lock(&self.state);
        if state.want != Want::Quit {
            state.want = want;
            self.leave.store(want != Want::Run, Ordering::Release);
            self.changed.notify_all();
        }
    }
}

impl Vcpu {
    /// Starts the thread of a vCPU whose state has been set. It is parked.
    pub(crate) fn new(id: u8, fd: VcpuFd, board: Arc<Board>) -> Result<Self> {
        let fd = Arc::new(Mutex::new(fd));
        let control = Arc::new(Control {
            state: Mutex::new(State {
                want: Want::Park,
                phase: Phase::Parked,
            }),
            changed: Condvar::new(),
            leave: AtomicBool::new(true),
        });
        let runner = Runner {
            id,
            fd: Arc::clone(&fd),
            control: Arc::clone(&control),
            board,
            guest_ended: false,
        };
        let thread = threads::spawn(format!("vcpu{id}"), move || runner.run())
            .context("cannot start a vCPU's thread")?;
        Ok(Self {
            fd,
            control,
            thread: Some(thread),
        })
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) {
        self.control.set(Want::Run);
    }

    /// Asks the thread to park. Follow with [`wait_parked`](Self::wait_parked), after all vCPUs
    /// have been asked.
    pub(crate) fn ask_to_park(&self) {
        self.control.set(Want::Park);
        if let Some(thread) = &self.thread {
            threads::kick(thread);
        }
    }

    /// Waits until the thread is parked: its last exit has been handled and completed, and it
    /// holds no lock.
    pub(crate) fn wait_parked(&self) -> Result<()> {
        let mut state = lock(&self.control.state);
        loop {
            match state.phase {
                Phase::Parked => return Ok(()),
                Phase::Gone => {
                    return Err(Error::new(ErrorKind::Ended, "a vCPU's thread has died"));
                }
                Phase::Running => {
                    state = self
                        .control
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// The vCPU, to read or set its state while it is parked.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&VcpuFd) -> T) -> T {
        f(&lock(&self.fd))
    }

    /// Ends the thread. The descriptor is closed with the last `Vcpu` or thread.
    pub(crate) fn quit(&mut self) {
        self.control.set(Want::Quit);
        if let Some(thread) = self.thread.take() {
            threads::kick(&thread);
            // A thread that panicked has said so through `Exits`.
            let _ = thread.join();
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.quit();
    }
}

/// The thread's side.
struct Runner {
    id: u8,
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    board: Arc<Board>,
    guest_ended: bool,
}

/// Says that the thread is gone, however it ends.
struct Gone {
    control: Arc<Control>,
    exits: Arc<Exits>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        lock(&self.control.state).phase = Phase::Gone;
        self.control.changed.notify_all();
        if std::thread::panicking() {
            self.exits.post(ExitReason::ThreadLost);
        }
    }
}

impl Runner {
    fn run(mut self) {
        let _gone = Gone {
            control: Arc::clone(&self.control),
            exits: Arc::clone(&self.board.exits),
        };
        while self.park_until_wanted() {
            if self.guest_ended {
                // Nothing to run any more; wait for the next wish.
                self.wait_while_wanted();
            } else {
                self.run_guest();
            }
        }
    }

    /// Parks; returns whether the guest is to run (or the thread is to end).
    fn park_until_wanted(&self) -> bool {
        let mut state = lock(&self.control.state);
        state.phase = Phase::Parked;
        self.control.changed.notify_all();
        loop {
            match state.want {
                Want::Run => {
                    state.phase = Phase::Running;
                    return true;
                }
                Want::Quit => return false,
                Want::Park => {
                    state = self
                        .control
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn wait_while_wanted(&self) {
        let state = lock(&self.control.state);
        let _state = self
            .control
            .changed
            .wait_while(state, |state| state.want == Want::Run)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Runs the guest until the thread is to leave or the guest has ended.
    fn run_guest(&mut self) {
        let fd = Arc::clone(&self.fd);
        let mut vcpu = lock(&fd);
        while !self.control.leave.load(Ordering::Acquire) {
            if let Step::Ended(reason) = self.step(&mut vcpu) {
                return self.end(&mut vcpu, reason);
            }
        }
        // KVM finishes the last exit (a port read's value reaches its register, the instruction
        // pointer moves on) at the start of the next run: enter once more without running. A
        // string instruction may exit again from there.
        vcpu.set_kvm_immediate_exit(1);
        loop {
            match self.step(&mut vcpu) {
                Step::Handled => {}
                Step::Interrupted => break,
                Step::Ended(reason) => {
                    self.end(&mut vcpu, reason);
                    break;
                }
            }
        }
        vcpu.set_kvm_immediate_exit(0);
        threads::take_kicks();
    }

    fn end(&mut self, vcpu: &mut VcpuFd, reason: ExitReason) {
        vcpu.set_kvm_immediate_exit(0);
        self.guest_ended = true;
        self.board.exits.post(reason);
    }

    /// One run of the guest and the handling of its exit.
    fn step(&self, vcpu: &mut VcpuFd) -> Step {
        let run: *const kvm_run = vcpu.get_kvm_run();
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => {
                threads::take_kicks();
                return Step::Interrupted;
            }
            // A vCPU that waited for its start was woken and is to be entered again.
            Err(error) if error.errno() == libc::EAGAIN => return Step::Handled,
            Err(error) => {
                #[expect(clippy::cast_sign_loss, reason = "error numbers are positive")]
                let code = error.errno() as u64;
                return self.kvm_error(vcpu, "KVM_RUN failed", code);
            }
        };
        self.board.first_exit.note();
        match exit {
            VcpuExit::IoOut(port, data) => {
                for unit in data.chunks(io_unit(run)) {
                    self.board.pio.write(u64::from(port), unit);
                }
            }
            VcpuExit::IoIn(port, data) => {
                for unit in data.chunks_mut(io_unit(run)) {
                    self.board.pio.read(u64::from(port), unit);
                }
            }
            VcpuExit::MmioRead(address, data) => self.board.mmio.read(address, data),
            VcpuExit::MmioWrite(address, data) => self.board.mmio.write(address, data),
            // Only with an interrupt controller outside the kernel; entering again is right.
            VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Shutdown => return Step::Ended(ExitReason::TripleFault),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
                return Step::Ended(ExitReason::PowerOff);
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => {
                return Step::Ended(ExitReason::Reset);
            }
            VcpuExit::SystemEvent(event, _) => {
                let what = if event == KVM_SYSTEM_EVENT_CRASH {
                    "the guest reported a crash"
                } else {
                    "an unknown system event"
                };
                return self.kvm_error(vcpu, what, u64::from(event));
            }
            VcpuExit::FailEntry(reason, _) => {
                return self.kvm_error(vcpu, "the processor refused to enter the guest", reason);
            }
            VcpuExit::InternalError => {
                // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, which fills this part of the
                // union; `run` stays mapped with the vCPU, which we hold exclusively.
                let suberror = unsafe { (*run).__bindgen_anon_1.internal.suberror };
                return self.kvm_error(vcpu, internal_error(suberror), u64::from(suberror));
            }
            VcpuExit::Unsupported(number) => {
                return self.kvm_error(vcpu, "an exit that is not known here", u64::from(number));
            }
            other => {
                tracing::error!(exit = ?other, "an exit that nothing here asks for");
                return self.kvm_error(vcpu, "an exit that nothing here asks for", 0);
            }
        }
        Step::Handled
    }

    fn kvm_error(&self, vcpu: &VcpuFd, what: &'static str, code: u64) -> Step {
        let mut registers = Registers::default();
        if let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) {
            registers = Registers {
                rip: regs.rip,
                rsp: regs.rsp,
                rflags: regs.rflags,
                rax: regs.rax,
                cr0: sregs.cr0,
                cr2: sregs.cr2,
                cr3: sregs.cr3,
                cr4: sregs.cr4,
                cs: sregs.cs.selector,
            };
        }
        Step::Ended(ExitReason::KvmError(Box::new(KvmError {
            vcpu: self.id,
            what: what.into(),
            code,
            registers,
        })))
    }
}

enum Step {
    Handled,
    Interrupted,
    Ended(ExitReason),
}

fn internal_error(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction that it cannot emulate",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while it delivered an event",
        _ => "an internal error",
    }
}

/// The width of one access of a port I/O exit: string instructions pass several at once.
fn io_unit(run: *const kvm_run) -> usize {
    // SAFETY: the exit just taken was KVM_EXIT_IO, which fills this part of the union; `run`
    // stays mapped with the vCPU, which the caller holds exclusively.
    let size = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}
