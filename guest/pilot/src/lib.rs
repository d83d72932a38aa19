//! A tiny bare-metal guest, built on demand.
