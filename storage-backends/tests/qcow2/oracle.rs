//! `qemu-img`, and a byte vector.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::MutexGuard;

use offshoot_storage::Volume;

/// A directory for one test, with a store in it.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    /// One test at a time.
    _alone: MutexGuard<'static, ()>,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            _alone: crate::support::alone(),
        }
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        self.store().join(format!("volumes/{name}.qcow2"))
    }
}

/// Whether `qemu-img` is here; says so once in each test when it is not.
pub(crate) fn qemu_img_missing() -> bool {
    let missing = Command::new("qemu-img").arg("--version").output().is_err();
    if missing {
        println!("skipped: qemu-img is not installed");
    }
    missing
}

/// Runs `qemu-img` and returns what it printed; fails the test when it fails.
pub(crate) fn qemu_img(args: &[&str]) -> String {
    let (ok, text) = try_qemu_img(args);
    assert!(ok, "qemu-img {args:?}: {text}");
    text
}

pub(crate) fn try_qemu_img(args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (
        out.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// No errors and no leaks, as QEMU sees it. The image is flushed and may still be open.
pub(crate) fn check(image: &Path) {
    qemu_img(&["check", "-q", "-U", "-f", "qcow2", image.to_str().unwrap()]);
}

/// The image's content, as QEMU sees it, is `model`.
pub(crate) fn compare(place: &Place, image: &Path, model: &[u8]) {
    let raw = place.file("model.raw");
    std::fs::write(&raw, model).unwrap();
    qemu_img(&[
        "compare",
        "-q",
        "-U",
        "-f",
        "qcow2",
        "-F",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
}

/// The volume's content is `model`, read through the backend.
pub(crate) fn same(volume: &dyn Volume, model: &[u8]) {
    assert_eq!(volume.size(), model.len() as u64);
    let content = read(volume, 0, model.len());
    let differs = content.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(
        differs,
        None,
        "{} differs from the model at this offset",
        volume.name()
    );
}

pub(crate) fn read(volume: &dyn Volume, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    volume
        .read_vectored_at(&mut [std::io::IoSliceMut::new(&mut buf)], offset)
        .unwrap();
    buf
}

pub(crate) fn write(volume: &dyn Volume, offset: u64, data: &[u8]) {
    volume
        .write_vectored_at(&[std::io::IoSlice::new(data)], offset)
        .unwrap();
}

/// xorshift64*: the same sequence for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
