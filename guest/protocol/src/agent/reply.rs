//! What the agent answers.

use alloc::vec::Vec;
use core::fmt;

use super::declare::{owned, owned_messages};
use super::value::{ByteString, Generation, JobId};
use crate::declare::choices;

choices! {
    /// Why the agent refuses.
    ErrorCode {
        /// The message could not be read, or does not belong here.
        #[default]
        Malformed = 1 "malformed",
        /// No version in common.
        Version = 2 "version",
        /// The connection did not start with `Hello`.
        NoHello = 3 "no-hello",
        /// The agent has another generation than the one meant: it waits for its identity.
        NotReady = 4 "not-ready",
        /// A value is outside its range.
        Invalid = 5 "invalid",
        /// As much as may be at a time is going on already.
        Busy = 6 "busy",
        /// There is no such command.
        NoJob = 7 "no-job",
        /// There is no such user.
        NoUser = 8 "no-user",
        /// The command has ended already, or not yet.
        WrongState = 9 "wrong-state",
        /// The guest's kernel refused; `errno` says why.
        Os = 10 "os",
    }
}

choices! {
    /// What a directory entry is.
    EntryKind {
        /// None of the others.
        #[default]
        Other = 0 "other",
        /// A regular file.
        File = 1 "file",
        /// A directory.
        Directory = 2 "directory",
        /// A symbolic link.
        Symlink = 3 "symlink",
    }
}

choices! {
    /// The parts of taking an identity, in their order.
    StepKind {
        /// The seed into the kernel's entropy pool, and new random numbers from it.
        #[default]
        Entropy = 1 "entropy",
        /// The wall clock.
        Clock = 2 "clock",
        /// The host name.
        Hostname = 3 "hostname",
        /// The machine id.
        MachineId = 4 "machine-id",
        /// The environment defaults.
        Environment = 5 "environment",
        /// One network interface.
        Link = 6 "link",
        /// The name servers.
        Resolvers = 7 "resolvers",
        /// The old connections dropped, the port opened anew.
        Listen = 8 "listen",
        /// One hook.
        Hook = 9 "hook",
    }
}

choices! {
    /// How a step ended.
    StepResult {
        /// Done.
        #[default]
        Done = 0 "done",
        /// There was nothing to do.
        Nothing = 1 "nothing",
        /// It failed, and the next ones were done all the same.
        Failed = 2 "failed",
    }
}

choices! {
    /// How a command ended.
    EndState {
        /// By itself; the value is its exit code.
        #[default]
        Code = 1 "code",
        /// By a signal; the value is its number.
        Signal = 2 "signal",
    }
}

owned! {
    /// The end of a command.
    #[derive(Copy, Hash)]
    Exit {
        /// How.
        state: EndState,
        /// Exit code or signal number.
        value: i32,
        /// Its time limit had passed.
        timed_out: bool,
    }
}

owned! {
    /// A part of taking an identity.
    Step {
        /// Which.
        kind: StepKind,
        /// Of which interface or hook.
        subject: ByteString,
        /// How it ended.
        result: StepResult,
        /// Error number of a failure; 0 when there is none.
        errno: i32,
        /// What exactly failed.
        detail: ByteString,
        /// How long it took.
        micros: u64,
    }
}

owned! {
    /// What was done to take an identity.
    Report {
        /// The agent's generation now.
        generation: Generation,
        /// The steps in the order in which they were done.
        steps: Vec<Step>,
        /// How long all took.
        micros: u64,
    }
}

owned! {
    /// A command that the agent knows.
    JobInfo {
        /// Its number.
        job: JobId,
        /// Its first process.
        pid: u32,
        /// Program and arguments, shortened to 256 bytes.
        title: ByteString,
        /// When it was started, in nanoseconds since 1970.
        started_unix_ns: u64,
        /// Has a terminal.
        terminal: bool,
        /// What becomes of it without its client.
        lifetime: super::Lifetime,
        /// First byte of its output that is still kept.
        first: u64,
        /// Bytes of output that there were so far.
        next: u64,
        /// Its end; none while it runs.
        exit: Option<Exit>,
    }
}

owned! {
    /// Memory, in bytes.
    #[derive(Copy, Default)]
    Memory {
        /// All.
        total: u64,
        /// What a new program could have.
        available: u64,
        /// Used by nothing.
        free: u64,
        /// Files held in memory.
        cached: u64,
        /// All swap space.
        swap_total: u64,
        /// Unused swap space.
        swap_free: u64,
    }
}

owned! {
    /// A file system.
    Disk {
        /// The path that was asked for.
        path: ByteString,
        /// Bytes.
        size: u64,
        /// Bytes free for unprivileged users.
        available: u64,
        /// Files that it can hold.
        files: u64,
        /// … and still can.
        files_free: u64,
    }
}

owned! {
    /// Figures of the guest.
    Metrics {
        /// Milliseconds since the guest's boot.
        uptime_ms: u64,
        /// The guest's wall clock, in nanoseconds since 1970.
        unix_ns: u64,
        /// Memory.
        memory: Memory,
        /// Load averages over 1, 5 and 15 minutes, in thousandths.
        load_milli: Vec<u32>,
        /// Processors that are online.
        cpus: u32,
        /// Processes and threads.
        tasks: u32,
        /// Processes and threads that run or want to.
        running: u32,
        /// Commands that the agent runs.
        jobs: u32,
        /// File systems.
        disks: Vec<Disk>,
    }
}

owned! {
    /// A file or directory.
    Entry {
        /// Its name in its directory.
        name: ByteString,
        /// What it is.
        kind: EntryKind,
        /// Permission bits, set-id and sticky included.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Bytes.
        size: u64,
        /// When it was last changed: nanoseconds since 1970, times before counted as 0.
        modified_unix_ns: u64,
        /// Where a symbolic link points to; empty otherwise.
        target: ByteString,
    }
}

owned! {
    /// A refusal.
    Refusal {
        /// Why.
        code: ErrorCode,
        /// Linux' error number where the kernel refused, else 0.
        errno: i32,
        /// What was being done, for people.
        detail: ByteString,
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.code.fmt(f)?;
        if self.errno != 0 {
            write!(f, ", error {}", self.errno)?;
        }
        if !self.detail.is_empty() {
            f.write_str(": ")?;
            // An agent is not believed: what it says is text, and no terminal is steered by it.
            for chunk in self.detail.utf8_chunks() {
                for letter in chunk.valid().chars().filter(|letter| !letter.is_control()) {
                    write!(f, "{letter}")?;
                }
            }
        }
        Ok(())
    }
}

impl core::error::Error for Refusal {}

owned_messages! {
    /// What the agent answers.
    Reply {
        /// The version is settled.
        Hello = 129 {
            /// The version of all that follows.
            version: u16,
            /// The generation that the agent has.
            generation: Generation,
        }
        /// The identity or the settings are taken.
        Ready = 130 {
            /// What was done.
            report: Report,
        }
        /// Figures.
        Metrics = 131 {
            /// The figures.
            metrics: Metrics,
        }
        /// It is done, and there is nothing to tell.
        Done = 132 {}
        /// The command runs.
        Started = 133 {
            /// Its number.
            job: JobId,
            /// Its first process, which is also its process group.
            pid: u32,
        }
        /// The command is joined.
        Attached = 134 {
            /// What is known of it.
            info: JobInfo,
            /// The place in its output that follows: later than asked for when what lay before it
            /// is no longer kept.
            from: u64,
        }
        /// The command has ended, and all it wrote itself has been sent.
        Exited = 135 {
            /// How.
            exit: Exit,
        }
        /// The commands.
        Jobs = 136 {
            /// All of them.
            jobs: Vec<JobInfo>,
        }
        /// The file is open.
        Opened = 137 {
            /// Its size in bytes; 0 when it is new, or has none.
            size: u64,
        }
        /// The file is written.
        Finished = 138 {
            /// Bytes received.
            bytes: u64,
        }
        /// A file or directory.
        Stat = 139 {
            /// What it is.
            entry: Entry,
        }
        /// Some of a directory's entries.
        Entries = 140 {
            /// They.
            entries: Vec<Entry>,
        }
        /// It was not done.
        Refused = 255 {
            /// Why.
            refusal: Refusal,
        }
    }
}
