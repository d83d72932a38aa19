//! The plug itself.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
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

/// When a new layer must be safe from a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Before the call returns.
    Now,
    /// Not before [`StorageBackend::sync_layer`] has returned: the call itself only fixes the
    /// content, so that a paused machine does not wait for a disk. A power cut in between leaves
    /// the layer whole or absent.
    Deferred,
}

/// What the time that a fork takes grows with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ForkCost {
    /// Nothing: any volume forks in the same time.
    Constant,
    /// The number of pieces that the content lies in, not its size.
    Extents,
    /// The bytes that the volume holds.
    Bytes,
}

/// What a backend can truthfully do on the directory it was opened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// A fork shares unchanged blocks with its layer.
    pub shares_blocks: bool,
    /// What a fork's time grows with.
    pub fork_cost: ForkCost,
    /// Discarded space goes back to the store.
    pub reclaims_discard: bool,
    /// The longest chain of layers, when there is a limit.
    pub max_chain: Option<u32>,
}

impl Capabilities {
    /// The capabilities of a backend that shares nothing, reclaims nothing and has no limit to its
    /// chains; set the fields that are better. (A backend of another crate starts here, because
    /// later versions may add fields.)
    #[must_use]
    pub const fn plain() -> Self {
        Self {
            shares_blocks: false,
            fork_cost: ForkCost::Bytes,
            reclaims_discard: false,
            max_chain: None,
        }
    }
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
///   of the process is under way, and a backend holds no lock of the process between calls.
/// - A call that returns an error leaves every volume and layer as it was and nothing half-made
///   behind; so does a process that dies within a call, once the store is opened again.
/// - What was asked for is done or refused with an error that names the reason: never a silent
///   fall-back to a slower way.
/// - A size is a multiple of [`SECTOR`](crate::SECTOR), at least one and at most
///   [`MAX_SIZE`](crate::MAX_SIZE); any other is [`ErrorKind::Invalid`](crate::ErrorKind).
/// - While a volume is open for writing, nobody else opens, freezes, flattens or deletes it, in
///   this process or another: `InUse`. The lock belongs to the open handle and goes with the last
///   copy of its descriptor. After a fork(2) parent and child both hold it until both have dropped
///   the handle; neither ever unlocks explicitly, so a child that drops its copy takes nothing
///   from its parent.
/// - Order for a disk snapshot: the device stops submitting and drains, [`freeze`](Self::freeze),
///   the device goes on, [`sync_layer`](Self::sync_layer), then whatever names the layer is
///   published. The volume's handles stay valid and writable over a freeze. What was written but
///   not flushed has to reach the disk within the freeze on some backends: a caller who counts
///   milliseconds flushes before it stops the device.
pub trait StorageBackend: Send + Sync + Debug {
    /// The backend's kind, as configured and as recorded in snapshots ("copy", "qcow2", …).
    fn name(&self) -> &'static str;

    /// What this backend can do in its directory.
    fn capabilities(&self) -> Capabilities;

    /// Makes a volume of `size` bytes, all zero, and opens it read-write. It survives a power cut
    /// once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind) when the name is taken; `Invalid` for the size.
    fn create(&self, name: &VolumeName, size: u64) -> Result<Arc<dyn Volume>, Error>;

    /// Makes a volume whose content `fill` writes, and opens it read-write. The volume appears
    /// under its name, whole and safe from a power cut, only after `fill` has returned `Ok`; with
    /// an error, that of `fill` included, it never does. `fill` need not flush and calls nothing
    /// of this backend.
    ///
    /// # Errors
    /// As for [`create`](Self::create); whatever `fill` returns.
    fn create_filled(
        &self,
        name: &VolumeName,
        size: u64,
        fill: &mut dyn FnMut(&dyn Volume) -> Result<(), Error>,
    ) -> Result<Arc<dyn Volume>, Error>;

    /// Opens a volume.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when [`Access`] says so; `Damaged` when it fails the backend's checks.
    fn open(&self, name: &VolumeName, access: Access) -> Result<Arc<dyn Volume>, Error>;

    /// Keeps the volume's present content as a new immutable layer. The caller has no write in
    /// flight; what was written before the call, flushed or not, is in the layer. The volume goes
    /// on with the same content, open through this object or not open at all.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `InUse` (open for writing elsewhere), `ChainTooLong`, `StorageFull`.
    fn freeze(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        durability: Durability,
    ) -> Result<(), Error>;

    /// Returns once the layer would survive a power cut. Doing it again is harmless.
    ///
    /// # Errors
    /// `NotFound`; when the storage fails, the layer may not be relied upon.
    fn sync_layer(&self, layer: &LayerName) -> Result<(), Error>;

    /// Makes a new volume with the layer's content and opens it read-write. A power cut before its
    /// first [`Volume::flush`] leaves the volume whole or absent; from then on it stays.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `ChainTooLong`, `StorageFull`.
    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Result<Arc<dyn Volume>, Error>;

    /// Opens a layer for reading; the handle is read-only and bears the layer's name.
    ///
    /// # Errors
    /// `NotFound`, `Damaged`.
    fn open_layer(&self, layer: &LayerName) -> Result<Arc<dyn Volume>, Error>;

    /// Makes a volume independent of every layer, keeping its content. It must not be open. Where
    /// volumes never depend on layers there is nothing to do but the checks.
    ///
    /// # Errors
    /// `NotFound`, `InUse`, `StorageFull`.
    fn flatten(&self, volume: &VolumeName) -> Result<(), Error>;

    /// Deletes a volume that nobody has open. After a power cut it may be there again, whole.
    ///
    /// # Errors
    /// `NotFound`, `InUse`.
    fn delete(&self, volume: &VolumeName) -> Result<(), Error>;

    /// Deletes a layer. Refused while volumes or layers depend on its data. One that is merely open
    /// for reading is refused, or goes and its readers keep what they see.
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

    /// How much space a volume takes; it may be open.
    ///
    /// # Errors
    /// `NotFound`.
    fn usage(&self, volume: &VolumeName) -> Result<Usage, Error>;

    /// Reads the metadata of a volume and of all that it depends on, and reports what is wrong; it
    /// may be open through this object.
    ///
    /// # Errors
    /// `Damaged` with the first finding; `NotFound`; `InUse` when it is open for writing elsewhere
    /// and its metadata is on the move.
    fn check(&self, volume: &VolumeName) -> Result<(), Error>;

    /// The descriptors that the store itself cannot do without, such as its directories; not those of
    /// what is open of it. A process that forks keeps these open in the child, and closes all others.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;

    /// In a child of fork(2) that has closed every descriptor but [`descriptors`](Self::descriptors)
    /// and has forgotten (not dropped) every volume: forgets, too, what it had open, without closing
    /// it. From then on the object is as if it had just been opened. No lock was held at the fork.
    fn forget_open(&self);
}
