//! The kernel under test and its modules, as Debian's packages install them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::{Error, io_error};

const BOOT: &str = "/boot";
const PREFIX: &str = "vmlinuz-";
const SUFFIX: &str = "-cloud-amd64";

/// A kernel that is installed here.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// Where its modules are.
    modules: PathBuf,
    /// What each module needs, both as paths beneath `modules`.
    needs: BTreeMap<String, Vec<String>>,
}

impl Kernel {
    /// The newest cloud kernel.
    pub(crate) fn find() -> Result<Self, Error> {
        let missing = |what: &str| {
            let package = "linux-image-cloud-amd64";
            Error::Missing(format!("{what} (Debian package {package})"))
        };
        let mut versions: Vec<_> = std::fs::read_dir(BOOT)
            .map_err(|_| missing("there is no /boot with a cloud kernel"))?
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                let version = name.strip_prefix(PREFIX)?;
                version.ends_with(SUFFIX).then(|| version.to_owned())
            })
            .collect();
        versions.sort_by_key(|version| numbers(version));
        let version = versions
            .pop()
            .ok_or_else(|| missing("no cloud kernel is installed"))?;
        let modules = Path::new("/lib/modules").join(&version);
        let list = modules.join("modules.dep");
        let list = std::fs::read_to_string(&list)
            .map_err(io_error(format_args!("cannot read {}", list.display())))?;
        Ok(Self {
            image: Path::new(BOOT).join(format!("{PREFIX}{version}")),
            modules,
            needs: parse(&list),
        })
    }

    /// These modules and all that they need, in an order in which they can be loaded: names and
    /// contents. A name that is no module's is built into the kernel.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let mut paths: Vec<&str> = Vec::new();
        for name in names {
            let file = format!("{name}.ko");
            let wanted = |path: &&String| Path::new(path).file_name() == Some(OsStr::new(&file));
            if let Some((path, needs)) = self.needs.iter().find(|(path, _)| wanted(path)) {
                // What is needed first stands last in the list.
                let order = needs.iter().rev().chain([path]).map(String::as_str);
                for path in order {
                    if !paths.contains(&path) {
                        paths.push(path);
                    }
                }
            }
        }
        paths
            .into_iter()
            .map(|path| {
                let content = std::fs::read(self.modules.join(path))
                    .map_err(io_error(format_args!("cannot read the module {path}")))?;
                let name = path.rsplit('/').next().unwrap_or(path);
                Ok((name.into(), content))
            })
            .collect()
    }
}

/// The numbers in a version, to compare by.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// `modules.dep`: a line a module, its path, a colon, and the paths of what it needs.
fn parse(list: &str) -> BTreeMap<String, Vec<String>> {
    list.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| {
            let needs = needs.split_whitespace().map(String::from).collect();
            (path.into(), needs)
        })
        .collect()
}

/// The static busybox.
pub(crate) fn busybox() -> Result<Vec<u8>, Error> {
    let path = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .ok_or_else(|| Error::Missing("busybox is not installed (busybox-static)".into()))?;
    let busybox = std::fs::read(path).map_err(io_error("cannot read busybox"))?;
    if crate::libraries::of(Path::new(path))?.is_empty() {
        Ok(busybox)
    } else {
        let what = "busybox is linked dynamically (Debian package busybox-static has the other)";
        Err(Error::Missing(what.into()))
    }
}

/// The checker of ext4 file systems.
pub(crate) fn e2fsck() -> Result<PathBuf, Error> {
    ["/sbin/e2fsck", "/usr/sbin/e2fsck"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .ok_or_else(|| Error::Missing("e2fsck is not installed (e2fsprogs)".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_sort_behind_older_ones() {
        let mut versions = ["6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.10.0-60"];
        versions.sort_by_key(|version| numbers(version));
        assert_eq!(versions[2], "6.1.0-56-cloud-amd64");
        assert_eq!(versions[0], "5.10.0-60");
    }

    #[test]
    fn modules_dep_is_a_line_a_module() {
        let list = parse("kernel/a.ko: kernel/b.ko kernel/c.ko\nkernel/c.ko:\n");
        assert_eq!(list["kernel/a.ko"], ["kernel/b.ko", "kernel/c.ko"]);
        assert!(list["kernel/c.ko"].is_empty());
    }
}
