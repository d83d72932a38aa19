//! Messages between the host and the agent in a Linux guest. `docs/agent.md` has the whole of it.
//!
//! One connection carries one operation: `Hello`, one [`Request`], and what belongs to it. Many
//! operations at once are many connections, so a stream that nobody reads holds up only itself,
//! by the flow control of its own socket, and closing a connection is how an operation is given
//! up. Each message and field is declared once, in [`request`] and [`reply`].

mod declare;
pub mod frame;
pub mod reply;
pub mod request;
#[cfg(test)]
mod tests;
mod value;

pub use frame::{Header, RawKind};
pub use reply::{
    Disk, EndState, Entry, EntryKind, ErrorCode, Exit, JobInfo, Memory, Metrics, Refusal, Reply,
    Report, Step, StepKind, StepResult,
};
pub use request::{
    Address, EnvVar, Exec, Identity, Lifetime, Link, PowerAction, Request, Route, Settings, User,
    WindowSize, WriteMode,
};
pub use value::{ByteString, Generation, JobId};

/// The newest version of the messages that this crate speaks.
pub const VERSION: u16 = 1;
/// The oldest version that it still speaks.
pub const OLDEST_VERSION: u16 = 1;

/// vsock port of the agent. Below 1024: in the guest only a privileged process can take it.
pub const PORT: u32 = 1001;

/// The smallest seed that is credited as entropy, in bytes.
pub const MIN_SEED: usize = 32;
/// The largest seed that an identity may carry, in bytes.
pub const MAX_SEED: usize = 512;
/// Output that is kept of a command unless it asks for another amount, in bytes.
pub const DEFAULT_OUTPUT_KEPT: u32 = 256 << 10;
/// The most output that is kept of one command, in bytes.
pub const MAX_OUTPUT_KEPT: u32 = 4 << 20;
/// How long all hooks together may run unless an identity says otherwise, in milliseconds.
pub const DEFAULT_HOOK_LIMIT_MS: u32 = 10_000;
