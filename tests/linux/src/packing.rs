//! What the guests boot with.

use std::path::Path;
use std::process::Command;

use crate::cpio::Archive;
use crate::debian::{self, Kernel};
use crate::programs::Programs;
use crate::{Error, io_error, libraries, vmlinux};

/// What the outer guest needs to have a `/dev/kvm`.
const OUTER_MODULES: &[&str] = &["kvm-amd"];
/// What the inner guest's devices need.
const INNER_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio-rng",
    "vmw_vsock_virtio_transport",
    "pvpanic-mmio",
    "ext4",
];
const CONSOLE: (u32, u32) = (5, 1);
/// The size of the inner guest's disk: small, for it travels in the outer guest's RAM disk.
const DISK_MIB: u32 = 16;

/// The outer guest's initial RAM disk: kernel and RAM disk of the inner guest, our programs, and
/// an ext4 image. Scratch files go to `dir`.
pub(crate) fn outer(kernel: &Kernel, programs: &Programs, dir: &Path) -> Result<Vec<u8>, Error> {
    let bzimage = std::fs::read(&kernel.image).map_err(io_error("cannot read the kernel"))?;
    let mut outer = linux(
        kernel,
        OUTER_MODULES,
        include_bytes!("../guests/outer-init"),
    )?;
    program(&mut outer, "offshoot", &programs.offshoot)?;
    program(&mut outer, "lab-inside", &programs.inside)?;
    program(&mut outer, "e2fsck", &debian::e2fsck()?)?;
    outer.file("guest/vmlinux", 0o644, &vmlinux::extract(&bzimage)?);
    outer.file("guest/bzImage", 0o644, &bzimage);
    outer.file("guest/initrd", 0o644, &inner(kernel, programs)?);
    outer.file("guest/ext4", 0o644, &ext4(dir, programs)?);
    Ok(outer.finish())
}

fn inner(kernel: &Kernel, programs: &Programs) -> Result<Vec<u8>, Error> {
    let mut inner = linux(
        kernel,
        INNER_MODULES,
        include_bytes!("../guests/inner-init"),
    )?;
    program(&mut inner, "lab-guest", &programs.guest)?;
    inner.file("bin/offshoot-agent", 0o755, offshoot_agent_image::AGENT_ELF);
    Ok(inner.finish())
}

/// A system of busybox, modules in loading order, and its first program.
fn linux(kernel: &Kernel, modules: &[&str], init: &[u8]) -> Result<Archive, Error> {
    let mut archive = Archive::default();
    for directory in ["dev", "mnt", "proc", "run", "sys"] {
        archive.directory(directory);
    }
    archive.device("dev/console", CONSOLE);
    archive.file("bin/busybox", 0o755, &debian::busybox()?);
    archive.file("init", 0o755, init);
    let mut order = String::new();
    for (name, content) in kernel.modules(modules)? {
        let path = format!("modules/{name}");
        archive.file(&path, 0o644, &content);
        order += &format!("/{path}\n");
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive)
}

/// Adds a program with its libraries.
fn program(archive: &mut Archive, name: &str, path: &Path) -> Result<(), Error> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(io_error(format_args!("cannot read {}", path.display())))
    };
    archive.file(&format!("bin/{name}"), 0o755, &read(path)?);
    for library in libraries::of(path)? {
        let content = read(&library)?;
        let inside = library.to_string_lossy();
        archive.file_once(inside.trim_start_matches('/'), 0o755, &content);
    }
    Ok(())
}

/// A file system with a program that counts its boots.
fn ext4(dir: &Path, programs: &Programs) -> Result<Vec<u8>, Error> {
    let root = dir.join("root");
    let copy = |from: &Path, to: &str| {
        let to = root.join(to.trim_start_matches('/'));
        let done = to
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::copy(from, &to).map(drop));
        done.map_err(io_error(format_args!("cannot copy {}", from.display())))
    };
    copy(&programs.guest, "bin/lab-guest")?;
    for library in libraries::of(&programs.guest)? {
        copy(&library, &library.to_string_lossy())?;
    }
    for directory in ["dev", "proc"] {
        std::fs::create_dir_all(root.join(directory))
            .map_err(io_error("cannot make a directory of the disk"))?;
    }
    let image = dir.join("ext4");
    let output = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&root, &image])
        .arg(format!("{DISK_MIB}M"))
        .output()
        .map_err(|_| Error::Missing("mke2fs is not installed (Debian package e2fsprogs)".into()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::Program(format!("mke2fs failed:\n{said}")));
    }
    std::fs::read(&image).map_err(io_error("cannot read the ext4 image"))
}
