//! Which file system a file is on.

use std::fmt;
use std::fs::File;
use std::io;

use rustix::fs::fstatfs;

/// A file system, as statfs(2) tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileSystem {
    /// Copy-on-write, clones ranges.
    Btrfs,
    /// Clones ranges when made with `reflink=1`.
    Xfs,
    /// ext2, ext3 and ext4 have one magic number.
    Ext4,
    /// In memory.
    Tmpfs,
    /// Any other, by its magic number.
    Other(u32),
}

impl FileSystem {
    /// That of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        // The magic numbers are 32 bits wide, the field is wider on some machines.
        let magic = u32::try_from(fstatfs(file)?.f_type & 0xffff_ffff).unwrap_or(0);
        Ok(match magic {
            0x9123_683e => Self::Btrfs,
            0x5846_5342 => Self::Xfs,
            0xef53 => Self::Ext4,
            0x0102_1994 => Self::Tmpfs,
            other => Self::Other(other),
        })
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::Btrfs => "btrfs",
            Self::Xfs => "XFS",
            Self::Ext4 => "ext4",
            Self::Tmpfs => "tmpfs",
            Self::Other(0x794c_7630) => "overlayfs",
            Self::Other(0x6969) => "NFS",
            Self::Other(0x6573_5546) => "FUSE",
            Self::Other(0xf2f5_2010) => "F2FS",
            Self::Other(0x4d44) => "FAT",
            Self::Other(0x2011_bab0) => "exFAT",
            Self::Other(0x2fc1_2fc1) => "ZFS",
            Self::Other(0xca45_1a4e) => "bcachefs",
            Self::Other(0x0102_1997) => "9p",
            Self::Other(0xe0f5_e1e2) => "EROFS",
            Self::Other(0x7371_7368) => "squashfs",
            Self::Other(magic) => return write!(f, "of type {magic:#x}"),
        };
        f.write_str(name)
    }
}
