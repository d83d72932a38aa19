//! The guest's own part in becoming another: executables in `/etc/offshoot/fork.d`.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use offshoot_protocol::agent::{EndState, ErrorCode, Identity, Refusal, StepKind};

use super::Steps;
use crate::failure::{Doing, refusal};
use crate::{Agent, sys};

const DIRECTORY: &str = "/etc/offshoot/fork.d";
/// More than these are not hooks any more, and would not fit the report.
const MOST: usize = 256;

/// The hooks in the order of their names. Like `run-parts`, only executables whose names are
/// letters, digits, `_`, `-` and `.`, none in front: editors' leftovers are not run.
fn find(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let is_hook = |path: &PathBuf| {
        let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
        let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.".contains(byte);
        let runs = |about: fs::Metadata| about.is_file() && about.permissions().mode() & 0o111 != 0;
        !name.starts_with(b".") && name.iter().all(good) && fs::metadata(path).is_ok_and(runs)
    };
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut hooks: Vec<_> = paths.filter(is_hook).collect();
    hooks.sort();
    hooks.truncate(MOST);
    hooks
}

/// Runs all hooks; what is running at the deadline is killed, and what comes after is not run.
pub(super) fn run(agent: &Agent, identity: &Identity, deadline: Instant, steps: &mut Steps) {
    for hook in find(Path::new(DIRECTORY)) {
        let name = hook.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
        steps.step(StepKind::Hook, name, || {
            run_one(agent, identity, &hook, deadline)?;
            Ok(true)
        });
    }
}

fn run_one(
    agent: &Agent,
    identity: &Identity,
    hook: &Path,
    deadline: Instant,
) -> Result<(), Refusal> {
    let late = || Err(io::Error::from(io::ErrorKind::TimedOut));
    if Instant::now() >= deadline {
        return late().doing("not run: the hooks' time is up");
    }
    let mut command = Command::new(hook);
    command
        .env_clear()
        .envs(agent.environment.all())
        .env("OFFSHOOT_GENERATION", identity.generation.to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        // What hooks say is for the console.
        .stdout(io::stderr());
    sys::set_apart(&mut command, false, None);
    let (_, child) = agent
        .children
        .spawn(&mut command)
        .doing("starting the hook")?;
    let end = child.wait(Some(deadline));
    if end.is_none() {
        let _ = agent.children.signal(&child, libc::SIGKILL, true);
        child.wait(Some(Instant::now() + Duration::from_secs(1)));
        return late().doing("killed: the hooks' time is up");
    }
    match end {
        Some((EndState::Code, 0)) | None => Ok(()),
        Some((EndState::Signal, signal)) => Err(refusal(
            ErrorCode::Os,
            &format!("killed by signal {signal}"),
        )),
        Some((_, code)) => Err(refusal(ErrorCode::Os, &format!("exit code {code}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_executables_with_plain_names_are_hooks_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a.sh", 0o700),
            ("30-c", 0o644),
            ("40-d~", 0o755),
            (".50-e", 0o755),
        ] {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(dir.path().join("60-f")).unwrap();
        let names: Vec<_> = find(dir.path())
            .iter()
            .map(|path| path.file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["10-a.sh", "20-b"]);
        assert!(find(Path::new("/no/such/directory")).is_empty());
    }
}
