//! Messages between host and guest.
