//! The virtual machine generation id ("Virtual Machine Generation ID", Microsoft, 2012): 16 bytes in
//! guest memory that are different in every copy of a machine, so that the guest knows that it is
//! one.
//!
//! The machine says by ACPI where they are, writes the new id before a copy's first instruction, and
//! then notifies the guest.

use std::fmt;

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::{Error, ErrorKind, GuestRam};

/// The id's length in bytes.
pub const LEN: usize = 16;
const ALIGN: u64 = 8;
const OBJECT: &str = "generation id";

/// A generation id: 128 bits that no other generation has.
///
/// Guests seed their random numbers with it, so it is not shown by `Debug`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GenerationId([u8; LEN]);

impl GenerationId {
    /// A new id from the host's entropy.
    ///
    /// # Errors
    /// When the host has none to give.
    pub fn random() -> Result<Self, Error> {
        let mut bytes = [0; LEN];
        getrandom::fill(&mut bytes)
            .map_err(|e| Error::because(ErrorKind::Io, OBJECT, "ask the host for entropy", e))?;
        Ok(Self(bytes))
    }

    /// The id of these bytes, for a host that hands ids out itself.
    #[must_use]
    pub fn from_bytes(bytes: [u8; LEN]) -> Self {
        Self(bytes)
    }

    /// The id as it stands in guest memory.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; LEN] {
        &self.0
    }
}

impl fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GenerationId(..)")
    }
}

/// Where the id is. The id itself is guest memory, and a copy gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmGenIdState {
    /// The id's guest physical address.
    pub address: u64,
}

impl Payload for VmGenIdState {
    const KIND: SectionKind = SectionKind(*b"vgen");
    const VERSION: u16 = 1;
}

/// The device: a place in guest memory that was proven to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmGenId {
    address: GuestAddress,
}

impl VmGenId {
    /// The device with its id at `address` of `memory`. The id should have a page of its own, told to
    /// the guest as reserved.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the address is not a multiple of 8 or not in RAM.
    pub fn new(memory: &GuestRam, address: GuestAddress) -> Result<Self, Error> {
        let wrong = |context| Error::new(ErrorKind::Memory, OBJECT, context);
        if !address.0.is_multiple_of(ALIGN) {
            return Err(wrong("its address is not a multiple of 8"));
        }
        if !memory.check_range(address, LEN, Permissions::ReadWrite) {
            return Err(wrong("its address is not in guest memory"));
        }
        Ok(Self { address })
    }

    /// The device from saved state.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidState`] where [`new`](Self::new) would fail.
    pub fn restore(state: &VmGenIdState, memory: &GuestRam) -> Result<Self, Error> {
        Self::new(memory, GuestAddress(state.address)).map_err(|e| {
            Error::because(
                ErrorKind::InvalidState,
                OBJECT,
                "the saved address cannot be",
                e,
            )
        })
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> VmGenIdState {
        VmGenIdState {
            address: self.address.0,
        }
    }

    /// Where the id is.
    #[must_use]
    pub fn address(&self) -> GuestAddress {
        self.address
    }

    /// Puts `id` into guest memory. Called while no vCPU runs; the guest is notified afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when `memory` is not the memory that the device was made with.
    pub fn write(&self, memory: &GuestRam, id: &GenerationId) -> Result<(), Error> {
        memory
            .write_slice(id.as_bytes(), self.address)
            .map_err(|e| Error::because(ErrorKind::Memory, OBJECT, "write it", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    #[test]
    fn every_id_is_new_and_is_written_where_the_guest_looks() {
        let memory = memory();
        let device = VmGenId::new(&memory, GuestAddress(0x1008)).unwrap();
        let copy = VmGenId::restore(&device.save(), &memory).unwrap();
        assert_eq!(copy, device);
        let (a, b) = (
            GenerationId::random().unwrap(),
            GenerationId::random().unwrap(),
        );
        assert_ne!(a, b);
        for id in [a, b] {
            copy.write(&memory, &id).unwrap();
            let mut seen = [0; LEN];
            memory.read_slice(&mut seen, GuestAddress(0x1008)).unwrap();
            assert_eq!(GenerationId::from_bytes(seen), id);
        }
    }

    #[test]
    fn an_address_outside_memory_is_refused() {
        let memory = memory();
        for address in [0x1004, 0x1ff8, 0x2000, u64::MAX - 7] {
            let state = VmGenIdState { address };
            let error = VmGenId::restore(&state, &memory).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidState, "{address:#x}");
        }
        assert!(VmGenId::new(&memory, GuestAddress(0x1ff0)).is_ok());
    }

    #[test]
    fn an_id_is_not_shown() {
        let id = GenerationId::from_bytes([0xab; LEN]);
        assert_eq!(format!("{id:?}"), "GenerationId(..)");
    }
}
