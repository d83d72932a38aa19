//! A bounded buffer between the guest and a writer that may block.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How many bytes of output wait for the writer at most.
pub const OUTPUT_LIMIT: usize = 64 << 10;
/// How long a pause, or the end of the port, waits for a write that is under way.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);
/// How long the thread waits for more before it ends.
const LINGER: Duration = Duration::from_millis(200);

/// The guest's end. Dropping it gives the writer [`PATIENCE`] to take what is left.
pub(super) struct Output(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    buffer: Vec<u8>,
    /// Where the output goes; the thread takes it out while it writes.
    sink: Option<Box<dyn Write + Send>>,
    thread: bool,
    paused: bool,
    closed: bool,
    lost: u64,
}

impl State {
    fn lose(&mut self, bytes: usize) {
        self.lost = self
            .lost
            .saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    fn idle(&self) -> bool {
        self.sink.is_some()
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.lock();
        f.debug_struct("Output")
            .field("buffered", &state.buffer.len())
            .field("lost", &state.lost)
            .finish_non_exhaustive()
    }
}

impl Output {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                buffer: Vec::new(),
                sink: Some(sink),
                thread: false,
                paused: false,
                closed: false,
                lost: 0,
            }),
            changed: Condvar::new(),
        }))
    }

    pub(super) fn lost(&self) -> u64 {
        self.0.lock().lost
    }

    /// Waits until nobody writes, but not for ever.
    pub(super) fn pause(&self) {
        let mut state = self.0.lock();
        state.paused = true;
        self.0.wait_until(state, State::idle);
    }

    pub(super) fn resume(&self) {
        self.0.lock().paused = false;
        self.0.changed.notify_all();
    }
}

impl Write for Output {
    /// Takes all of `bytes`, or loses what there is no room for.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        let room = OUTPUT_LIMIT.saturating_sub(state.buffer.len());
        let taken = bytes.len().min(room);
        state.buffer.extend(bytes.iter().take(taken));
        state.lose(bytes.len().saturating_sub(taken));
        if state.thread {
            drop(state);
            self.0.changed.notify_all();
            return Ok(bytes.len());
        }
        let shared = Arc::clone(&self.0);
        let spawned = thread::Builder::new()
            .name("serial-output".into())
            .spawn(move || shared.run());
        match spawned {
            Ok(_) => state.thread = true,
            Err(error) => {
                // The bytes stay in the buffer; the next one tries again.
                tracing::warn!(%error, "no thread for the serial port's output");
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.paused = false;
        self.0.changed.notify_all();
        // Without a thread nothing is left to wait for.
        self.0
            .wait_until(state, |s| !s.thread || (s.buffer.is_empty() && s.idle()));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until(&self, state: MutexGuard<'_, State>, done: impl Fn(&State) -> bool) {
        let waited = self
            .changed
            .wait_timeout_while(state, PATIENCE, |s| !done(s));
        if let Ok((_, timeout)) = waited
            && timeout.timed_out()
        {
            tracing::debug!("the serial port's writer is blocked");
        }
    }

    /// The thread: writes what is there, ends when nothing has come for a while.
    fn run(&self) {
        let mut chunk = Vec::new();
        loop {
            let Some(mut sink) = self.next(&mut chunk) else {
                return;
            };
            let written = sink.write_all(&chunk).and_then(|()| sink.flush());
            let mut state = self.lock();
            state.sink = Some(sink);
            if let Err(error) = written {
                tracing::debug!(%error, "serial output is lost");
                state.lose(chunk.len());
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Waits for something to write, and takes it and the writer. None ends the thread.
    fn next(&self, chunk: &mut Vec<u8>) -> Option<Box<dyn Write + Send>> {
        chunk.clear();
        let nothing = |s: &mut State| (s.buffer.is_empty() || s.paused) && !s.closed;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), LINGER, nothing);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        while state.paused && !state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.buffer.is_empty() {
            state.thread = false;
            drop(state);
            self.changed.notify_all();
            return None;
        }
        std::mem::swap(&mut state.buffer, chunk);
        state.sink.take()
    }
}
