//! What embedder and worker say to each other.

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;

use offshoot_snapshot_format::{Disk, Metadata, SnapshotId};
use serde::{Deserialize, Serialize};

use super::jail::{self, Jail};
use super::plan::{BindingSpec, FrozenLayer, MachineSpec, Stored};
use crate::error::{Error, ErrorKind};
use crate::exits::ExitReason;

/// Sent by the embedder. Each has one reply, in order, with its tag.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) tag: u32,
    pub(super) ask: Ask,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Boots and starts a machine. Descriptors: kernel, initrd if any, those of the bindings.
    Boot(Box<MachineSpec>, BindingSpec, Jail),
    /// Becomes a template of a snapshot, which is never run and can be forked.
    Load {
        snapshot: PathBuf,
        verify: bool,
        jail: Jail,
    },
    /// Forks. Descriptors: for each child its channel, then those of its bindings.
    Fork {
        /// Names the layers that the drives are frozen to.
        name: String,
        children: Vec<BindingSpec>,
    },
    /// Forks a writer. Descriptor: its channel.
    Snapshot {
        store: PathBuf,
        id: SnapshotId,
        metadata: Metadata,
    },
    /// Deletes volumes, and layers that nothing depends on; those that something does stay.
    Drop {
        volumes: Vec<Stored>,
        layers: Vec<Stored>,
    },
    Pause,
    Resume,
    PressPowerButton,
    Status,
    /// Ends the machine and the process; with `discard` the volumes that were made for it go, too.
    Stop {
        discard: bool,
    },
}

/// Sent by a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Told {
    /// The answer to the request of this tag.
    Reply(u32, Result<Answer, WireError>),
    /// A forked child has made the volumes of its bindings, which are to be deleted should it die now.
    Made,
    /// A forked child's next message: whether its machine runs.
    Born(Result<Birth, WireError>),
    /// The guest has ended.
    Exited(ExitReason),
    /// A process that this worker forked has ended.
    ChildEnded {
        pid: i32,
        /// As `waitpid` gives it.
        status: i32,
    },
    /// A writer has come so far, in bytes.
    Progress { done: u64, total: u64 },
    /// A writer has published its snapshot, or not.
    Written(Result<Published, WireError>),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Started(Birth),
    Loaded(Origin),
    Forked(Forked),
    Status(Status),
}

/// A machine that runs in a worker.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Birth {
    pub(super) pid: i32,
}

/// The snapshot that a template was loaded from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Origin {
    pub(super) id: SnapshotId,
    pub(super) metadata: Metadata,
    pub(super) disks: Vec<Disk>,
}

/// What a fork came to in the source.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Forked {
    /// For how long the guest was stopped, in nanoseconds; 0 for a template.
    pub(super) pause_ns: u64,
    /// The children, in order: the process, or why there is none.
    pub(super) children: Vec<Result<i32, WireError>>,
    /// The layers that the drives were frozen to.
    pub(super) layers: Vec<FrozenLayer>,
}

/// A published snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Published {
    pub(super) layers: Vec<(String, String)>,
}

/// How a worker's machine is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Status {
    pub(super) running: bool,
    /// When an instruction of the guest first caused an exit after its start or last resume, as
    /// nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) first_exit_ns: Option<u64>,
}

/// An error as it is sent: its kind, its sentence and its causes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WireError {
    kind: ErrorKind,
    sentence: String,
    causes: Vec<String>,
}

/// The longest sentence that is sent or believed.
const MAX_SENTENCE: usize = 1024;
/// The most causes.
const MAX_CAUSES: usize = 9;

fn bounded(text: &str) -> String {
    text.chars().take(MAX_SENTENCE).collect()
}

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        let mut causes = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next.filter(|_| causes.len() + 1 < MAX_CAUSES) {
            causes.push(bounded(&cause.to_string()));
            next = cause.source();
        }
        causes.extend(jail::hint(error).map(str::to_owned));
        Self {
            kind: error.kind(),
            sentence: bounded(&error.to_string()),
            causes,
        }
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        let causes = error.causes.into_iter().take(MAX_CAUSES).rev();
        let cause = causes.fold(None, |cause, sentence| {
            Some(Box::new(Cause {
                sentence: bounded(&sentence),
                cause,
            }))
        });
        match cause {
            Some(cause) => Self::because(error.kind, bounded(&error.sentence), cause),
            None => Self::new(error.kind, bounded(&error.sentence)),
        }
    }
}

/// A cause that was told by a worker.
#[derive(Debug)]
struct Cause {
    sentence: String,
    cause: Option<Box<Cause>>,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_kind_and_causes_over_the_wire() {
        let cause = std::io::Error::other("the disk is on fire");
        let error = Error::because(ErrorKind::Storage, "cannot open drive root", cause);
        let sent = postcard::to_stdvec(&WireError::from(&error)).unwrap();
        let back: Error = postcard::from_bytes::<WireError>(&sent).unwrap().into();
        assert_eq!(back.kind(), ErrorKind::Storage);
        assert_eq!(format!("{back:?}"), format!("{error:?}"));
    }
}
