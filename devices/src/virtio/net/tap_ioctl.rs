//! The tap driver's ioctls.
//!
//! # Rules
//! Each function owes the kernel a descriptor that is open for the call (a `BorrowedFd` pays) and
//! a pointer to memory of the size that the request number names, initialised where the kernel
//! reads it. What is not a tap answers with an error and touches nothing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
pub(super) const FLAGS: libc::c_short = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq` as the tap ioctls use it: name and flags, and room up to its full size.
#[repr(C)]
#[derive(Default)]
struct IfReq {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

const _: () = assert!(std::mem::size_of::<IfReq>() == std::mem::size_of::<libc::ifreq>());

fn result(code: libc::c_int) -> io::Result<()> {
    if code < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// TUNSETIFF: attaches `fd` to the tap `name` (zero-terminated), which the kernel makes if there
/// is none. Returns nothing but success.
pub(super) fn attach(fd: BorrowedFd<'_>, name: [u8; 16]) -> io::Result<()> {
    let mut request = IfReq {
        name,
        flags: FLAGS,
        ..IfReq::default()
    };
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose size `IfReq` has (asserted
    // above) and which lives until the call returns.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// TUNGETIFF: the flags of the tap that `fd` is attached to.
pub(super) fn flags(fd: BorrowedFd<'_>) -> io::Result<libc::c_short> {
    let mut request = IfReq::default();
    // SAFETY: TUNGETIFF writes one `struct ifreq`, as above.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    Ok(request.flags)
}

/// TUNSETVNETHDRSZ: the bytes of the header before each frame.
pub(super) fn set_header_len(fd: BorrowedFd<'_>, len: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int` that lives until the call returns.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
}

/// TUNSETOFFLOAD: what the reader of the tap accepts (`TUN_F_*`).
pub(super) fn set_offload(fd: BorrowedFd<'_>, offload: libc::c_uint) -> io::Result<()> {
    let offload = libc::c_ulong::from(offload);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offload) })
}
