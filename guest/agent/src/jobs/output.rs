//! What a command wrote, bounded: its newest bytes are kept for whoever attaches later, and as
//! long as somebody is attached nothing is dropped that he has not had. Then the command waits, as
//! it would for any reader of a pipe.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use offshoot_protocol::agent::{Exit, RawKind};

use crate::lock::{lock, wait};

/// What a piece of output costs beside its bytes. Without it a command that writes single bytes
/// to its two streams in turn would cost many times what it may.
const PIECE: usize = 64;
/// Pieces of one stream are joined up to this size, or to a part of what is kept: whole pieces
/// are dropped.
const JOINED: usize = 8 << 10;
const PARTS_KEPT: usize = 8;

#[derive(Debug)]
struct Piece {
    stream: RawKind,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<Piece>,
    cost: usize,
    /// Place of the first kept byte, both streams counted together.
    first: u64,
    /// Place after the last byte.
    next: u64,
    /// Attached readers and the place that each has reached.
    readers: HashMap<u64, u64>,
    last_reader: u64,
    /// The end of the command, and the place up to which output is its own.
    exit: Option<(Exit, u64)>,
}

/// A command's output.
#[derive(Debug)]
pub(crate) struct Output {
    state: Mutex<State>,
    changed: Condvar,
    kept: usize,
}

/// What comes next for a reader.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Bytes of a stream.
    Bytes(RawKind, Vec<u8>),
    /// The command has ended, and all its output was read.
    Exit(Exit),
    /// The reader was detached.
    Detached,
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

impl State {
    /// Drops the oldest pieces until what is kept is within bounds, or a reader needs them.
    fn trim(&mut self, kept: usize) {
        let needed = self.readers.values().copied().min().unwrap_or(u64::MAX);
        while self.cost > kept {
            let Some(piece) = self.pieces.front() else {
                break;
            };
            let end = self.first.saturating_add(length(&piece.bytes));
            if end > needed {
                break;
            }
            self.cost = self.cost.saturating_sub(piece.bytes.len() + PIECE);
            self.first = end;
            self.pieces.pop_front();
        }
    }

    fn append(&mut self, stream: RawKind, bytes: &[u8], joined: usize) {
        self.next = self.next.saturating_add(length(bytes));
        match self.pieces.back_mut() {
            Some(last) if last.stream == stream && last.bytes.len() + bytes.len() <= joined => {
                last.bytes.extend_from_slice(bytes);
                self.cost += bytes.len();
            }
            _ => {
                self.cost += bytes.len() + PIECE;
                let bytes = bytes.to_vec();
                self.pieces.push_back(Piece { stream, bytes });
            }
        }
    }

    /// The bytes at a place, as far as their piece goes.
    fn at(&self, place: u64) -> Option<(RawKind, &[u8])> {
        let mut start = self.first;
        for piece in &self.pieces {
            let end = start.saturating_add(length(&piece.bytes));
            if place < end {
                let skip = usize::try_from(place.saturating_sub(start)).ok()?;
                return Some((piece.stream, piece.bytes.get(skip..)?));
            }
            start = end;
        }
        None
    }
}

impl Output {
    /// Keeps about `kept` bytes.
    pub(crate) fn new(kept: usize) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            kept,
        }
    }

    /// Places of the first kept byte and after the last.
    pub(crate) fn span(&self) -> (u64, u64) {
        let state = lock(&self.state);
        (state.first, state.next)
    }

    /// The end of the command, once all its output is in.
    pub(crate) fn exit(&self) -> Option<Exit> {
        lock(&self.state).exit.map(|(exit, _)| exit)
    }

    /// Bytes that this output may hold.
    pub(crate) fn kept(&self) -> usize {
        self.kept
    }

    /// Adds output. Waits while an attached reader is that far behind; says false when the
    /// deadline passes, with the bytes not added.
    pub(crate) fn push(&self, stream: RawKind, bytes: &[u8], deadline: Option<Instant>) -> bool {
        let mut state = lock(&self.state);
        loop {
            state.trim(self.kept.saturating_sub(bytes.len()));
            if state.cost == 0 || state.cost + bytes.len() <= self.kept {
                state.append(stream, bytes, JOINED.min(self.kept / PARTS_KEPT));
                self.changed.notify_all();
                return true;
            }
            let (next, in_time) = wait(&self.changed, state, deadline);
            state = next;
            if !in_time {
                return false;
            }
        }
    }

    /// Detaches a reader, wherever it waits.
    pub(crate) fn detach(&self, id: u64) {
        lock(&self.state).readers.remove(&id);
        self.changed.notify_all();
    }

    /// The command has ended, and what it wrote is in.
    pub(crate) fn settle(&self, exit: Exit) {
        let mut state = lock(&self.state);
        let next = state.next;
        state.exit.get_or_insert((exit, next));
        self.changed.notify_all();
    }

    /// Waits until the command has ended.
    pub(crate) fn settled(&self) -> Exit {
        let mut state = lock(&self.state);
        loop {
            if let Some((exit, _)) = state.exit {
                return exit;
            }
            state = wait(&self.changed, state, None).0;
        }
    }

    /// Attaches a reader from a place on, or from the first kept byte if that is later.
    pub(crate) fn attach(&self, from: u64) -> Reader<'_> {
        let ticket = self.reserve(from);
        self.claim(ticket)
    }

    /// Holds a place for a reader, so that nothing from there on is dropped before he comes.
    pub(crate) fn reserve(&self, from: u64) -> Ticket {
        let mut state = lock(&self.state);
        let place = from.clamp(state.first, state.next);
        state.last_reader += 1;
        let id = state.last_reader;
        state.readers.insert(id, place);
        Ticket { id, place }
    }

    /// The reader that a place was held for.
    pub(crate) fn claim(&self, ticket: Ticket) -> Reader<'_> {
        Reader {
            output: self,
            id: ticket.id,
            place: ticket.place,
        }
    }
}

/// A place that is held for a reader.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: u64,
    place: u64,
}

/// An attached reader; detached when dropped.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    output: &'a Output,
    id: u64,
    place: u64,
}

impl Reader<'_> {
    /// Its number, to detach it by.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The place that it has reached.
    pub(crate) fn place(&self) -> u64 {
        self.place
    }

    /// Waits for what comes next, at most `most` bytes of it.
    pub(crate) fn next(&mut self, most: usize) -> Next {
        let mut state = lock(&self.output.state);
        loop {
            if !state.readers.contains_key(&self.id) {
                return Next::Detached;
            }
            let end = state.exit.filter(|(_, place)| self.place >= *place);
            if let Some((exit, _)) = end {
                return Next::Exit(exit);
            }
            if let Some((stream, bytes)) = state.at(self.place) {
                let bytes = bytes.get(..most).unwrap_or(bytes).to_vec();
                self.place = self.place.saturating_add(length(&bytes));
                state.readers.insert(self.id, self.place);
                self.output.changed.notify_all();
                return Next::Bytes(stream, bytes);
            }
            state = wait(&self.output.changed, state, None).0;
        }
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.output.detach(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use offshoot_protocol::agent::EndState;

    use super::*;

    const EXIT: Exit = Exit {
        state: EndState::Code,
        value: 3,
        timed_out: false,
    };

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(20))
    }

    #[test]
    fn the_newest_output_is_kept_without_a_reader() {
        let output = Output::new(10_000);
        for n in 0..100u8 {
            assert!(output.push(RawKind::Stdout, &[n; 1000], soon()));
        }
        output.settle(EXIT);
        let (first, next) = output.span();
        assert_eq!(next, 100_000);
        assert!((next - first) <= 10_000 && next - first >= 1000, "{first}");
        let mut reader = output.attach(0);
        assert_eq!(reader.place(), first);
        let mut read = Vec::new();
        while let Next::Bytes(stream, bytes) = reader.next(700) {
            assert_eq!(stream, RawKind::Stdout);
            read.extend(bytes);
        }
        assert_eq!(length(&read), next - first);
        assert_eq!(read.last(), Some(&99));
    }

    #[test]
    fn a_reader_holds_the_writer_back_and_loses_nothing() {
        let output = Output::new(4000);
        let mut reader = output.attach(0);
        let mut pushed = 0u64;
        while output.push(RawKind::Stderr, &[1; 500], soon()) {
            pushed += 500;
        }
        assert!((2000..=4000).contains(&pushed), "{pushed}");
        let mut read = 0;
        while read < 1000 {
            match reader.next(300) {
                Next::Bytes(RawKind::Stderr, bytes) => read += bytes.len(),
                other => panic!("{other:?}"),
            }
        }
        assert!(output.push(RawKind::Stderr, &[1; 500], soon()));
        drop(reader);
        for _ in 0..20 {
            assert!(
                output.push(RawKind::Stdout, &[1; 500], soon()),
                "nobody is attached"
            );
        }
    }

    #[test]
    fn single_bytes_to_both_streams_cost_what_they_should() {
        let output = Output::new(64 << 10);
        for _ in 0..100_000 {
            assert!(output.push(RawKind::Stdout, b"o", None));
            assert!(output.push(RawKind::Stderr, b"e", None));
        }
        let pieces = lock(&output.state).pieces.len();
        assert!(pieces <= 1024, "{pieces} pieces are kept");
    }

    #[test]
    fn the_exit_comes_after_what_the_command_wrote_and_before_what_others_add() {
        let output = Output::new(4000);
        let mut reader = output.attach(0);
        assert!(output.push(RawKind::Stdout, b"mine", None));
        output.settle(EXIT);
        assert!(output.push(RawKind::Stdout, b"theirs", None));
        // The piece was joined with what a background process wrote later.
        assert!(matches!(reader.next(4), Next::Bytes(..)));
        assert_eq!(reader.next(100), Next::Exit(EXIT));
        assert_eq!(output.exit(), Some(EXIT));
        assert_eq!(output.attach(u64::MAX).next(1), Next::Exit(EXIT));
    }
}
