//! What a worker may reach of the file system: the directories that it was given, and no other.
//!
//! Landlock confines a thread and all that it starts, for good. The worker confines itself when it has
//! opened `/dev/kvm` and its stores, and before it looks at a kernel, a volume or a snapshot; its
//! children inherit it. With it comes `no_new_privs`. Everything else that a worker uses reaches it as
//! a descriptor.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, make_bitflags,
};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// The rights that are governed: those of Linux 6.2, truncation included. A kernel that knows fewer is
/// refused.
const RIGHTS: ABI = ABI::V3;

/// What a worker does nowhere: make devices, pipes and links, run programs.
const NEVER: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    Execute | MakeChar | MakeBlock | MakeFifo | MakeSym
});

/// Whether this process is confined.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// What to add to an error of this process, so that its reader knows where a refusal may come from.
pub(super) fn hint(error: &Error) -> Option<&'static str> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = next {
        let io = cause.downcast_ref::<io::Error>();
        if io.is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied) {
            return CONFINED.load(Ordering::Relaxed).then_some(
                "a worker reaches only the directories that it was given (Program::allowing)",
            );
        }
        next = cause.source();
    }
    None
}

/// Which directories a worker may use; `None` for all that its user may.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Jail(pub(super) Option<Vec<PathBuf>>);

impl Jail {
    /// Confines this process. `besides` are directories that its task names, `read` those of which it
    /// only reads.
    pub(super) fn enter<'a>(
        &'a self,
        besides: impl Iterator<Item = &'a Path>,
        read: Option<&'a Path>,
    ) -> Result<()> {
        let Some(directories) = &self.0 else {
            return Ok(());
        };
        let unsupported = |e: RulesetError| {
            Error::because(
                ErrorKind::Unsupported,
                "the worker cannot be confined: that takes Linux 6.2 with Landlock; ask for an unconfined one \
                 to do without",
                e,
            )
        };
        let mut ruleset: RulesetCreated = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(RIGHTS))
            .and_then(Ruleset::create)
            .map_err(unsupported)?;
        let all = AccessFs::from_all(RIGHTS) & !NEVER;
        // A snapshot that all its copies map must not be within reach of any of them.
        let only_read = AccessFs::ReadFile | AccessFs::ReadDir;
        let directories = directories.iter().map(PathBuf::as_path).chain(besides);
        let rules = directories
            .map(|directory| (directory, all))
            .chain(read.map(|directory| (directory, only_read)));
        for (directory, rights) in rules {
            let what = || {
                format!(
                    "the worker cannot be given the directory {}",
                    directory.display()
                )
            };
            let opened =
                PathFd::new(directory).map_err(|e| Error::because(ErrorKind::Config, what(), e))?;
            ruleset = ruleset
                .add_rule(PathBeneath::new(opened, rights))
                .map_err(unsupported)?;
        }
        let status = ruleset.restrict_self().map_err(unsupported)?;
        if status.ruleset == RulesetStatus::FullyEnforced {
            CONFINED.store(true, Ordering::Relaxed);
            Ok(())
        } else {
            Err(Error::new(
                ErrorKind::Unsupported,
                "the worker was confined in part only",
            ))
        }
    }
}
