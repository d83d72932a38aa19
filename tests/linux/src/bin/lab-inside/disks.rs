//! Linux on drives.

use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use offshoot_storage::{StorageBackend, VolumeName, open_backend};

use crate::command::run;
use crate::{BZIMAGE, EXT4, Failure};

/// A store at `dir` whose volume `name` holds the ext4 file system.
pub(crate) fn store_with_ext4(
    kind: &str,
    dir: &Path,
    name: &VolumeName,
) -> Result<Arc<dyn StorageBackend>, Failure> {
    let image = std::fs::read(EXT4)?;
    let store = open_backend(kind, dir)?;
    let size = u64::try_from(image.len())?;
    store.create_filled(name, size, &mut |volume| {
        volume
            .write_vectored_at(&[IoSlice::new(&image)], 0)
            .map_err(|e| offshoot_storage::Error::io("fill the volume", name, e))
    })?;
    Ok(store)
}

/// The guest counts its boots in a file on its root file system, makes that durable and crashes:
/// the next boot finds it.
pub(crate) fn ext4_root_survives(kind: &str) -> Result<(), Failure> {
    let dir = format!("/run/{kind}");
    let root = VolumeName::new("root")?;
    let store = store_with_ext4(kind, Path::new(&dir), &root)?;
    let drive = ["--store", &dir, "--backend", kind, "--drive", "root"];
    for boot in 1..=2 {
        run(BZIMAGE, "root", &drive)?
            .ended(11, "panicked")?
            .printed(&format!("lab: boot {boot} of this disk"))?;
    }
    store.check(&root)?;
    drop(store);
    std::fs::remove_dir_all(dir)?;
    Ok(())
}
