//! Initial RAM disks: archives in cpio's "newc" format (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;

const MAGIC: &str = "070701";
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

/// An archive in the making. Everything in it belongs to root.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    /// Files that were added by [`Archive::file_once`].
    shared: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a file, and the directories that lead to it. `path` has no leading slash.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | mode, (0, 0), content);
    }

    /// Adds a file that may be there already, with the same content.
    pub(crate) fn file_once(&mut self, path: &str, mode: u32, content: &[u8]) {
        if self.shared.insert(path.into()) {
            self.file(path, mode, content);
        }
    }

    /// Adds a directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.parents(path);
        if self.directories.insert(path.into()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        }
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, path: &str, number: (u32, u32)) {
        self.parents(path);
        self.entry(path, CHARACTER | 0o600, number, &[]);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.entry(TRAILER, 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            if self.directories.insert(parent.into()) {
                self.entry(parent, DIRECTORY | 0o755, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let length = |bytes: usize| u32::try_from(bytes).expect("a file of the lab is small");
        let fields = [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // time of modification
            length(content.len()),
            0, // the device that the archive's file was on
            0,
            major,
            minor,
            length(path.len() + 1),
            0, // checksum: none in this format
        ];
        self.bytes.extend(MAGIC.bytes());
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_of_110_bytes_a_name_and_the_content_each_padded_to_4() {
        let mut archive = Archive::default();
        archive.file("a/b", 0o644, b"hello");
        archive.file("a/c", 0o755, b"");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let names = |name: &str| text.matches(name).count();
        assert_eq!(names("070701"), 4, "the directory comes once, the end last");
        // "a": 110 + 2 bytes; "a/b": 110 + 4 padded to 116, then 5 padded to 8.
        assert_eq!(&bytes[112..118], b"070701");
        assert_eq!(&text[118..126], "00000002", "inode");
        assert_eq!(&text[126..134], "000081a4", "mode");
        assert_eq!(&text[166..174], "00000005", "size");
        assert_eq!(&text[222..225], "a/b");
        assert_eq!(&text[228..233], "hello");
        assert_eq!(&bytes[236..242], b"070701");
        assert!(bytes.len().is_multiple_of(4));
    }
}
