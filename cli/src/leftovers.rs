//! What a command has made and must not leave behind, also when it is told to stop.

use std::path::PathBuf;
use std::process::Command;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::failure::{Context, Failure};

/// Directories, and a file system that is mounted in one of them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leftovers {
    pub(crate) mounted: Option<PathBuf>,
    pub(crate) directories: Vec<PathBuf>,
}

impl Leftovers {
    /// From now on removes them when the process is interrupted, terminated or hung up, and then ends
    /// as it would have without.
    pub(crate) fn remove_when_stopped(self) -> Result<(), Failure> {
        let what = || "cannot listen to signals".to_owned();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context(what)?;
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    self.remove();
                    // Does not return where it works.
                    let _ = emulate_default_handler(signal);
                }
            })
            .context(what)?;
        Ok(())
    }

    fn remove(&self) {
        if let Some(mounted) = &self.mounted {
            // Guests still have files of it open.
            let done = Command::new("umount").arg("--lazy").arg(mounted).status();
            if !done.is_ok_and(|status| status.success()) {
                eprintln!("offshoot: {} stays mounted", mounted.display());
                return;
            }
        }
        for directory in &self.directories {
            if let Err(error) = std::fs::remove_dir_all(directory) {
                eprintln!("offshoot: {} stays: {error}", directory.display());
            }
        }
    }
}
