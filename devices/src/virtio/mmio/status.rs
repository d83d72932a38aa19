//! The device status field (virtio 1.2, 2.1) and its legal steps (3.1.1).

/// The guest has found the device.
pub(crate) const ACKNOWLEDGE: u32 = 1;
/// The guest knows how to drive it.
pub(crate) const DRIVER: u32 = 2;
/// The driver is up.
pub(crate) const DRIVER_OK: u32 = 4;
/// The features are agreed on.
pub(crate) const FEATURES_OK: u32 = 8;
/// The device cannot go on but by a reset.
pub(crate) const NEEDS_RESET: u32 = 64;
/// The driver has given up.
pub(crate) const FAILED: u32 = 128;

/// What a driver sets on its way up, in this order.
pub(crate) const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// The device status. Each value of it is one that a driver and a device can reach by legal steps
/// only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Status(u32);

impl Status {
    /// The status from saved bits, when it is a legal one.
    pub(crate) fn from_saved(bits: u32) -> Option<Self> {
        let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
        let implies = |bit: u32, other: u32| bits & bit == 0 || bits & other != 0;
        let legal = bits & !known == 0
            && implies(DRIVER, ACKNOWLEDGE)
            && implies(FEATURES_OK, DRIVER)
            && implies(DRIVER_OK, FEATURES_OK)
            && implies(NEEDS_RESET, DRIVER_OK);
        legal.then_some(Self(bits))
    }

    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    pub(crate) fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    pub(crate) fn set(&mut self, bit: u32) {
        self.0 |= bit;
    }

    /// Whether `step`, one of [`STEPS`], is the next one.
    pub(crate) fn is_next(self, step: u32) -> bool {
        !self.has(FAILED)
            && STEPS
                .iter()
                .find(|s| !self.has(**s))
                .is_some_and(|next| *next == step)
    }

    /// Whether the driver may write feature bits now (3.1.1, step 4).
    pub(crate) fn negotiating(self) -> bool {
        self.has(DRIVER) && !self.has(FEATURES_OK) && !self.has(FAILED)
    }

    /// Whether the driver may set queues up now (3.1.1, step 7).
    pub(crate) fn configuring(self) -> bool {
        self.has(FEATURES_OK) && !self.has(DRIVER_OK) && !self.has(FAILED)
    }
}
