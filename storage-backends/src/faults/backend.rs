//! A backend that fails.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Faults, Operation};
use crate::{
    Access, Capabilities, Durability, Error, LayerName, StorageBackend, Usage, Volume, VolumeName,
};

/// The backend.
#[derive(Debug)]
pub(super) struct FaultyBackend {
    inner: Arc<dyn StorageBackend>,
    faults: Faults,
}

impl FaultyBackend {
    pub(super) fn new(inner: Arc<dyn StorageBackend>, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

impl StorageBackend for FaultyBackend {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn create(&self, name: &VolumeName, size: u64) -> Result<Arc<dyn Volume>, Error> {
        self.faults.next_on(Operation::Create, "create", name)?;
        Ok(self.faults.wrap_volume(self.inner.create(name, size)?))
    }

    /// `fill` writes to the real volume: nobody sees it before it is whole.
    fn create_filled(
        &self,
        name: &VolumeName,
        size: u64,
        fill: &mut dyn FnMut(&dyn Volume) -> Result<(), Error>,
    ) -> Result<Arc<dyn Volume>, Error> {
        self.faults.next_on(Operation::Create, "create", name)?;
        let volume = self.inner.create_filled(name, size, fill)?;
        Ok(self.faults.wrap_volume(volume))
    }

    fn open(&self, name: &VolumeName, access: Access) -> Result<Arc<dyn Volume>, Error> {
        self.faults.next_on(Operation::Open, "open", name)?;
        Ok(self.faults.wrap_volume(self.inner.open(name, access)?))
    }

    fn freeze(
        &self,
        volume: &VolumeName,
        layer: &LayerName,
        durability: Durability,
    ) -> Result<(), Error> {
        self.faults.next_on(Operation::Freeze, "freeze", volume)?;
        self.faults
            .send(volume)
            .map_err(|e| Error::io("freeze", volume, e))?;
        self.inner.freeze(volume, layer, durability)?;
        if durability == Durability::Deferred {
            self.faults.state().unsynced.insert(layer.clone());
        }
        Ok(())
    }

    fn sync_layer(&self, layer: &LayerName) -> Result<(), Error> {
        self.faults.next_on(Operation::SyncLayer, "sync", layer)?;
        self.inner.sync_layer(layer)?;
        self.faults.state().unsynced.remove(layer);
        Ok(())
    }

    fn fork(&self, layer: &LayerName, volume: &VolumeName) -> Result<Arc<dyn Volume>, Error> {
        self.faults.next_on(Operation::Fork, "fork", layer)?;
        Ok(self.faults.wrap_volume(self.inner.fork(layer, volume)?))
    }

    fn open_layer(&self, layer: &LayerName) -> Result<Arc<dyn Volume>, Error> {
        self.faults.next_on(Operation::Open, "open", layer)?;
        Ok(self.faults.wrap_volume(self.inner.open_layer(layer)?))
    }

    fn flatten(&self, volume: &VolumeName) -> Result<(), Error> {
        self.faults.next_on(Operation::Flatten, "flatten", volume)?;
        self.inner.flatten(volume)
    }

    fn delete(&self, volume: &VolumeName) -> Result<(), Error> {
        self.faults.next_on(Operation::Delete, "delete", volume)?;
        self.inner.delete(volume)
    }

    fn delete_layer(&self, layer: &LayerName) -> Result<(), Error> {
        self.faults.next_on(Operation::Delete, "delete", layer)?;
        self.inner.delete_layer(layer)?;
        self.faults.state().unsynced.remove(layer);
        Ok(())
    }

    fn volumes(&self) -> Result<Vec<VolumeName>, Error> {
        self.inner.volumes()
    }

    fn layers(&self) -> Result<Vec<LayerName>, Error> {
        self.inner.layers()
    }

    fn usage(&self, volume: &VolumeName) -> Result<Usage, Error> {
        self.inner.usage(volume)
    }

    fn check(&self, volume: &VolumeName) -> Result<(), Error> {
        self.inner.check(volume)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.inner.descriptors()
    }

    fn forget_open(&self) {
        self.inner.forget_open();
    }
}
