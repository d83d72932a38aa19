//! The thread that runs the devices' event handlers.
//!
//! It can be parked between two rounds of events. A parked loop is inside no device and holds no
//! lock, so whoever parked it may take the devices' state, or fork the process.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::exits::{ExitReason, Exits};
use crate::sync::lock;
use crate::threads;

/// Something that handles events, shared with whoever else uses the device.
pub(crate) type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The loop and its thread.
pub(crate) struct DeviceLoop {
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for DeviceLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceLoop").finish_non_exhaustive()
    }
}

struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Brings the thread to the gate.
    bell: EventFd,
    /// Whether there is any reason to look at `state`.
    closed: AtomicBool,
}

struct State {
    want: Want,
    parked: bool,
    gone: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Park,
    Quit,
}

/// Wakes the loop; what to do then stands behind the gate.
struct Bell(Arc<Gate>);

impl MutEventSubscriber for Bell {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // Nothing to read means that an earlier round took it.
        let _ = self.0.bell.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0.bell, EventSet::IN)) {
            tracing::error!(%error, "the device loop cannot be woken");
        }
    }
}

impl DeviceLoop {
    /// Starts the loop over `subscribers`, parked.
    pub(crate) fn new(subscribers: Vec<Subscriber>, exits: Arc<Exits>) -> Result<Self> {
        const WHAT: &str = "cannot start the device loop";
        let gate = Arc::new(Gate {
            state: Mutex::new(State {
                want: Want::Park,
                parked: false,
                gone: false,
            }),
            changed: Condvar::new(),
            bell: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).context(WHAT)?,
            closed: AtomicBool::new(true),
        });
        let mut manager: EventManager<Subscriber> =
            EventManager::new().map_err(|e| Error::because(ErrorKind::System, WHAT, e))?;
        let bell: Subscriber = Arc::new(Mutex::new(Bell(Arc::clone(&gate))));
        for subscriber in std::iter::once(bell).chain(subscribers) {
            manager.add_subscriber(subscriber);
        }
        let runner = Arc::clone(&gate);
        let thread = threads::spawn("devices".into(), move || {
            let _gone = Gone {
                gate: Arc::clone(&runner),
                exits,
            };
            while runner.pass() {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "the device loop cannot wait for events");
                    return;
                }
            }
        })
        .context(WHAT)?;
        Ok(Self {
            gate,
            thread: Some(thread),
        })
    }

    /// Parks the loop and waits until it is.
    pub(crate) fn park(&self) -> Result<()> {
        self.gate.set(Want::Park);
        let mut state = lock(&self.gate.state);
        while !state.parked {
            if state.gone {
                return Err(Error::new(ErrorKind::Ended, "the device loop has died"));
            }
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Lets the loop run.
    pub(crate) fn run(&self) {
        self.gate.set(Want::Run);
    }

    /// Ends the thread.
    pub(crate) fn quit(&mut self) {
        self.gate.set(Want::Quit);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so through `Exits`.
            let _ = thread.join();
        }
    }
}

impl Drop for DeviceLoop {
    fn drop(&mut self) {
        self.quit();
    }
}

impl Gate {
    fn set(&self, want: Want) {
        let mut state = lock(&self.state);
        if state.want == Want::Quit {
            return;
        }
        state.want = want;
        if want == Want::Run {
            // The thread has not left the gate yet, and must not be taken for parked any more.
            state.parked = false;
        }
        self.closed.store(want != Want::Run, Ordering::Release);
        self.changed.notify_all();
        drop(state);
        // Full means that it rings already.
        let _ = self.bell.write(1);
    }

    /// Waits while the gate is closed; returns whether to go on.
    fn pass(&self) -> bool {
        if !self.closed.load(Ordering::Acquire) {
            return true;
        }
        let mut state = lock(&self.state);
        loop {
            match state.want {
                Want::Run => {
                    state.parked = false;
                    return true;
                }
                Want::Quit => return false,
                Want::Park => {
                    state.parked = true;
                    self.changed.notify_all();
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// Says that the thread is gone, however it ends.
struct Gone {
    gate: Arc<Gate>,
    exits: Arc<Exits>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        let asked = {
            let mut state = lock(&self.gate.state);
            state.gone = true;
            state.want == Want::Quit
        };
        self.gate.changed.notify_all();
        if !asked {
            self.exits.post(ExitReason::ThreadLost);
        }
    }
}

/// Wraps an I/O error of a device's set-up.
pub(crate) fn eventfd(context: &'static str) -> Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e: io::Error| Error::io(context, e))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    use super::*;

    struct Counter {
        event: Arc<EventFd>,
        count: Arc<AtomicUsize>,
    }

    impl MutEventSubscriber for Counter {
        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.event.read().unwrap();
            self.count.fetch_add(1, Ordering::SeqCst);
        }
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(self.event.as_ref(), EventSet::IN))
                .unwrap();
        }
    }

    fn wait_for(count: &AtomicUsize, value: usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while count.load(Ordering::SeqCst) < value {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    }

    #[test]
    fn events_wait_while_the_loop_is_parked() {
        let event = Arc::new(eventfd("test").unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        let counter: Subscriber = Arc::new(Mutex::new(Counter {
            event: event.clone(),
            count: count.clone(),
        }));
        let devices = DeviceLoop::new(vec![counter], Exits::new().unwrap()).unwrap();
        event.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(count.load(Ordering::SeqCst), 0, "it starts parked");
        for round in 1..200 {
            devices.run();
            wait_for(&count, round);
            devices.park().unwrap();
            event.write(1).unwrap();
            std::thread::sleep(Duration::from_micros(100));
            assert_eq!(count.load(Ordering::SeqCst), round);
            devices.run();
            devices.park().unwrap();
        }
    }
}
