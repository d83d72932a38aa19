//! The shared libraries of a program.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, io_error};

/// The libraries that a program loads, its loader among them; none when it is static.
pub(crate) fn of(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .map_err(io_error("cannot run ldd"))?;
    // It fails for a static program, and says so on standard error.
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        let what = format!("{} needs a library: {line}", program.display());
        return Err(Error::Program(what));
    }
    Ok(parse(&text))
}

/// Lines like `libc.so.6 => /lib/libc.so.6 (0x7f…)` and `/lib64/ld-linux-x86-64.so.2 (0x7f…)`.
fn parse(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            let (path, _) = path.split_once(" (")?;
            path.starts_with('/').then(|| path.into())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vdso_is_no_file() {
        let text =
            "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so (0x3)\n";
        assert_eq!(
            parse(text),
            [Path::new("/lib/libc.so.6"), Path::new("/lib64/ld.so")]
        );
        assert!(parse("\tstatically linked\n").is_empty());
    }
}
