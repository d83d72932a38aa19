//! Writing a snapshot: everything in a hidden directory, published by one rename.

mod memory;
mod partial;

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, RenameFlags};
use rustix::io::Errno;

pub use memory::{MemoryWriter, WrittenMemory};
use partial::Partial;
pub use partial::{CleanReport, clean_partial};

use crate::dir::{create_file, open_dir};
use crate::{
    Disk, Error, ErrorKind, MANIFEST_FILE, MEMORY_FILE, ManifestParts, MemoryLayout, Metadata,
    Place, Requirements, Section, SnapshotId, Timestamp,
};

/// What a snapshot holds besides its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotContent {
    /// When the source was paused.
    pub created: Timestamp,
    /// What a host must offer.
    pub requirements: Requirements,
    /// The frozen disks.
    pub disks: Vec<Disk>,
    /// About the snapshot.
    pub metadata: Metadata,
    /// The machine's own sections.
    pub sections: Vec<Section>,
}

/// A snapshot that is being written. Until [`publish`](Self::publish) it is a hidden directory that
/// no reader takes for a snapshot; dropping the writer removes it, and after a crash [`clean_partial`] does.
///
/// The process that made the writer owns the hidden directory: in a child that inherited the writer by `fork(2)`, dropping it
/// removes nothing.
#[derive(Debug)]
pub struct SnapshotWriter {
    id: SnapshotId,
    parent: File,
    parent_path: PathBuf,
    partial: Partial,
    memory_begun: bool,
}

impl SnapshotWriter {
    /// Starts a snapshot that will be the directory `<parent>/<id>`.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when it is there already, or what the operating system said.
    pub fn create(parent: &Path, id: SnapshotId) -> Result<Self, Error> {
        let dir = open_dir(parent)?;
        match rustix::fs::statat(&dir, id.to_string(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Err(exists()),
            Err(e) => return Err(Error::io(Place::Directory, "cannot examine it", e)),
        }
        let partial = Partial::create(&dir, id)?;
        Ok(Self {
            id,
            parent: dir,
            parent_path: parent.to_path_buf(),
            partial,
            memory_begun: false,
        })
    }

    /// The id of the snapshot that is being written.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Starts the memory image. What it gives is to be filled and then handed to [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when it was started before, or what the operating system said.
    pub fn memory_image(&mut self, layout: MemoryLayout) -> Result<MemoryWriter, Error> {
        if self.memory_begun {
            let detail = "the image was started before";
            return Err(Error::new(ErrorKind::Misuse, Place::Memory, detail));
        }
        let file = create_file(self.partial.dir(), MEMORY_FILE, Place::Memory)?;
        self.memory_begun = true;
        file.set_len(layout.image_len())
            .map_err(|e| Error::io(Place::Memory, "cannot set its size", e))?;
        Ok(MemoryWriter::new(self.id, layout, file))
    }

    /// Makes everything durable and then gives the snapshot its name. Returns its directory.
    ///
    /// # Errors
    /// Whatever the error, there is no snapshot then and nothing is left behind: [`ErrorKind::Exists`] when one of this
    /// id appeared meanwhile, [`ErrorKind::StorageFull`], the reader's error when `content` breaks a rule of the
    /// format, [`ErrorKind::Misuse`] when `memory` belongs to another writer, or what the operating system said.
    pub fn publish(
        mut self,
        memory: WrittenMemory,
        content: SnapshotContent,
    ) -> Result<PathBuf, Error> {
        let (owner, map, image) = memory.into_parts();
        if owner != self.id || !self.memory_begun {
            let detail = "the image belongs to another snapshot";
            return Err(Error::new(ErrorKind::Misuse, Place::Memory, detail));
        }
        let parts = ManifestParts {
            id: self.id,
            created: content.created,
            requirements: content.requirements,
            memory: map,
            disks: content.disks,
            metadata: content.metadata,
            sections: content.sections,
        };
        let bytes = parts.encode()?;
        seal(&image, Place::Memory)?;
        let mut manifest = create_file(self.partial.dir(), MANIFEST_FILE, Place::Manifest)?;
        manifest
            .write_all(&bytes)
            .map_err(|e| Error::io(Place::Manifest, "cannot write it", e))?;
        seal(&manifest, Place::Manifest)?;
        sync(self.partial.dir(), Place::Directory)?;

        let name = self.id.to_string();
        self.rename(&name)?;
        if let Err(error) = sync(&self.parent, Place::Directory) {
            // An error means that there is no snapshot: take the name away again, and drop what it named.
            if let Err(e) =
                rustix::fs::renameat(&self.parent, &name, &self.parent, self.partial.name())
            {
                return Err(Error::io(
                    Place::Directory,
                    "the snapshot has its name but may not survive a power cut, and the name cannot be taken back",
                    e,
                ));
            }
            self.partial.own_again();
            return Err(error);
        }
        Ok(self.parent_path.join(name))
    }

    /// Renames the hidden directory to `name`, which must not be there.
    fn rename(&mut self, name: &str) -> Result<(), Error> {
        let from = self.partial.name();
        let renamed = match rustix::fs::renameat_with(
            &self.parent,
            from,
            &self.parent,
            name,
            RenameFlags::NOREPLACE,
        ) {
            // The file system does not know the flag. A plain rename never replaces a directory that is not empty,
            // and a snapshot is not.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::renameat(&self.parent, from, &self.parent, name)
            }
            renamed => renamed,
        };
        match renamed {
            Ok(()) => {
                self.partial.disown();
                Ok(())
            }
            Err(Errno::EXIST | Errno::NOTEMPTY) => Err(exists()),
            Err(e) => Err(Error::io(Place::Directory, "cannot give it its name", e)),
        }
    }
}

fn exists() -> Error {
    let detail = "a snapshot of this id is already there";
    Error::new(ErrorKind::Exists, Place::Directory, detail)
}

/// Makes a finished file read-only for its owner, and durable.
fn seal(file: &File, place: Place) -> Result<(), Error> {
    file.set_permissions(Permissions::from_mode(0o400))
        .map_err(|e| Error::io(place, "cannot make it read-only", e))?;
    sync(file, place)
}

fn sync(file: &File, place: Place) -> Result<(), Error> {
    file.sync_all()
        .map_err(|e| Error::io(place, "cannot make it durable", e))
}
