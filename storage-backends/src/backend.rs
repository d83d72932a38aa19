//! The plug itself.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{Error, LayerName, Volume, VolumeName};

/// How a volume is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For one writer; refused while anybody else has the volume open.
    ReadWrite,
    /// For any number of readers; refused while somebody has it open for writing.
    ReadOnly,
}

/// What a backend can truthfully do on the directory it was opened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// A fork shares unchanged blocks with its layer.
    pub shares_blocks: bool,
    /// The cost of a fork does not grow with the volume's size or content.
    pub constant_time_fork: bool,
    /// Discarded space goes back to the store.
    pub reclaims_discard: bool,
    /// The longest chain of layers, when there is a limit.
    pub max_chain: Option<u32>,
}

/// The space that a volume takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// What the guest sees: the volume's size.
    pub size: u64,
    /// Space that would come back if the volume alone were deleted.
    pub own: u64,
    /// Space of the blocks it shares with layers, as far as the backend can tell.
    pub shared: Option<u64>,
}

/// A place that keeps volumes and layers, and how it copies them.
///
/// # Contract
/// - Every call may come from any thread, several at once. Nothing here is called while a fork(2)
///   of the process is under way, and a backend holds no lock between calls.
/// - A call that returns an error leaves every volume and layer as it was and nothing half-made
///   behind; so does a process that dies within a call, once the store is opened again.
/// - What was asked for is done or refused with an error that names the reason: never a silent
///   fall-back to a slower way.
/// - Order for a disk snapshot: the device stops submitting and drains, [`freeze`](Self::freeze),
///   the device goes on. The volume's handles stay valid and writable over a freeze.
pub trait StorageBackend: Send + Sync + Debug {
    /// The backend's kind, as configured and as recorded in snapshots ("copy", "qcow2", …).
    fn name(&self) -> &'static str;

    /// What this backend can do in its directory.
    fn capabilities(&self) -> Capabilities;

    /// Makes a volume of `size` bytes, all zero, and opens it read-write. It survives a power cut
    /// once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind) when the name is taken.
    fn create(&self, name: &VolumeName, size: u64) -> Result<Arc<dyn Volume>, Error>;

    /// Opens a volume.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when [`Access`] says so; `Damaged` when it fails the backend's checks.
    fn open(&self, name: &VolumeName, access: Access) -> Result<Arc<dyn Volume>, Error>;

    /// Keeps the volume's present content as a new immutable layer. The caller has no write in
    /// flight; what was written before the call is in the layer, which survives a power cut once
    /// this returns. The volume goes on with the same content, open or not.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `InUse` (open for writing elsewhere), `ChainTooLong`, `StorageFull`.
    fn freeze(&self, volume: &VolumeName, layer: &LayerName) -> Result<(), Error>;

    /// Makes a new volume with the layer's content and opens it read-write.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `ChainTooLong`, `StorageFull`.
    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Result<Arc<dyn Volume>, Error>;

    /// Opens a layer for reading.
    ///
    /// # Errors
    /// `NotFound`, `Damaged`.
    fn open_layer(&self, layer: &LayerName) -> Result<Arc<dyn Volume>, Error>;

    /// Makes a volume independent of every layer, keeping its content. It must not be open.
    ///
    /// # Errors
    /// `NotFound`, `InUse`, `StorageFull`.
    fn flatten(&self, volume: &VolumeName) -> Result<(), Error>;

    /// Deletes a volume that nobody has open.
    ///
    /// # Errors
    /// `NotFound`, `InUse`.
    fn delete(&self, volume: &VolumeName) -> Result<(), Error>;

    /// Deletes a layer. Refused while volumes or layers depend on its data.
    ///
    /// # Errors
    /// `NotFound`, `InUse`.
    fn delete_layer(&self, layer: &LayerName) -> Result<(), Error>;

    /// The volumes there are, sorted.
    ///
    /// # Errors
    /// When the directory cannot be read.
    fn volumes(&self) -> Result<Vec<VolumeName>, Error>;

    /// The layers there are, sorted.
    ///
    /// # Errors
    /// When the directory cannot be read.
    fn layers(&self) -> Result<Vec<LayerName>, Error>;

    /// How much space a volume takes.
    ///
    /// # Errors
    /// `NotFound`.
    fn usage(&self, volume: &VolumeName) -> Result<Usage, Error>;

    /// Reads the metadata of a volume and of all that it depends on, and reports what is wrong.
    ///
    /// # Errors
    /// `Damaged` with the first finding; `NotFound`.
    fn check(&self, volume: &VolumeName) -> Result<(), Error>;
}
