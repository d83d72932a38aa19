//! The system calls that have no safe wrapper. All unsafe code of the agent is here.
//!
//! Rules: every pointer that the kernel gets is to a local that outlives the call, every length
//! comes from the same local, and what runs between fork and exec allocates nothing, takes no
//! lock and touches nothing but its own captured values.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Gid, Uid};

/// The host's vsock context id.
pub(crate) const HOST_CID: u32 = 2;

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// Keeps what the agent was started with from those that it starts, but for the three streams.
pub(crate) fn keep_descriptors() {
    // SAFETY: close_range takes three numbers, and with this flag closes nothing here.
    unsafe { libc::close_range(3, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
}

/// Keeps the memory of many short threads in one heap, and gives large buffers back when freed.
pub(crate) fn keep_heap_small() {
    // SAFETY: mallopt takes two numbers; it is called before any other thread runs.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
    }
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a structure of integers, for which all zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = VSOCK_FAMILY;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// `AF_VSOCK` in the type that an address has it in.
const VSOCK_FAMILY: libc::sa_family_t = 40;
/// Length of a vsock address.
const VSOCK_ADDRESS: libc::socklen_t = 16;
const _: () = assert!(size_of::<libc::sockaddr_vm>() == 16 && libc::AF_VSOCK == 40);

/// A socket that is bound to a vsock port on every context id of this guest.
pub(crate) fn vsock_bind(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes three numbers.
    let fd = checked(unsafe {
        libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)
    })?;
    // SAFETY: the descriptor was just made, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address outlives the call, and its length is its own.
    checked(unsafe { libc::bind(fd, (&raw const address).cast(), VSOCK_ADDRESS) })?;
    Ok(socket)
}

/// The context id at the other end of a vsock connection.
pub(crate) fn vsock_peer(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut address = vsock_address(0, 0);
    let mut len = VSOCK_ADDRESS;
    // SAFETY: the kernel writes at most `len` bytes, the size of the address, into it.
    checked(unsafe {
        libc::getpeername(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut len)
    })?;
    Ok(address.svm_cid)
}

/// The user at the other end of a Unix socket. (rustix has this, with a pid that can't be 0; and 0
/// it is for a process outside of our pid namespace.)
pub(crate) fn unix_peer(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len: libc::socklen_t = 12;
    const { assert!(size_of::<libc::ucred>() == 12) };
    // SAFETY: the kernel writes at most `len` bytes, the size of the structure, into it.
    checked(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    })?;
    Ok(peer.uid)
}

/// `CLOSE_RANGE_CLOEXEC` of linux/close_range.h.
const CLOSE_RANGE_CLOEXEC: libc::c_int = 4;

/// Bytes of seed that one call of [`add_entropy`] takes.
pub(crate) const SEED_PART: usize = 64;

/// `struct rand_pool_info` with its buffer.
#[repr(C)]
struct RandomPool {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; SEED_PART],
}

/// `RNDADDENTROPY`: mixes `seed`, at most [`SEED_PART`] bytes, into the kernel's pool and credits
/// it as wholly random.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    let mut pool = RandomPool {
        entropy_bits: 0,
        size: 0,
        bytes: [0; SEED_PART],
    };
    for (to, from) in pool.bytes.iter_mut().zip(seed) {
        *to = *from;
        pool.size += 1;
        pool.entropy_bits += 8;
    }
    // SAFETY: the kernel reads the two numbers and `size` bytes, which `bytes` has.
    checked(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
    Ok(())
}

/// `RNDRESEEDCRNG`: has every processor's generator start anew from the pool.
pub(crate) fn reseed(random: BorrowedFd<'_>) -> io::Result<()> {
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    // SAFETY: this ioctl takes no argument.
    checked(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}

/// Signals that are taken by [`wait_for`] and not delivered otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Signals(libc::sigset_t);

/// Blocks signals in this thread and in those that it starts from now on.
pub(crate) fn block(signals: &[libc::c_int]) -> io::Result<Signals> {
    // SAFETY: sigemptyset makes a value of the zeroed set; sigaddset and pthread_sigmask get
    // pointers to it, and null where nothing is wanted back.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            checked(libc::sigaddset(&raw mut set, *signal))?;
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
            0 => Ok(Signals(set)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Waits for one of the signals.
pub(crate) fn wait_for(signals: &Signals) -> io::Result<libc::c_int> {
    let mut signal = 0;
    // SAFETY: both pointers are to values that outlive the call.
    match unsafe { libc::sigwait(&raw const signals.0, &raw mut signal) } {
        0 => Ok(signal),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Sends a signal to a process, or to its whole group.
pub(crate) fn kill(pid: i32, signal: i32, group: bool) -> io::Result<()> {
    // 0, 1 and -1 mean something else than one process: never by accident.
    if pid <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill takes two numbers.
    checked(unsafe { libc::kill(if group { -pid } else { pid }, signal) })?;
    Ok(())
}

/// Sends a signal to every process but the caller and process 1.
pub(crate) fn kill_all(signal: i32) {
    // SAFETY: kill takes two numbers. That nobody is left is not an error here.
    let _ = unsafe { libc::kill(-1, signal) };
}

/// Gives the child of `command` all signals back that are blocked here.
pub(crate) fn unblock(command: &mut Command) {
    let prepare = || -> io::Result<()> {
        // SAFETY: as in `block`: pointers to a set that outlives the calls, and null.
        unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    };
    // SAFETY: the closure makes two calls on a local value: no allocation, no lock.
    unsafe { command.pre_exec(prepare) };
}

/// Whose rights a child gets.
#[derive(Debug, Clone)]
pub(crate) struct Rights {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
}

/// Gives the child of `command` a session and process group of its own, its standard input as
/// the controlling terminal if asked for, and its rights.
pub(crate) fn set_apart(command: &mut Command, terminal: bool, rights: Option<Rights>) {
    let prepare = move || -> io::Result<()> {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if let Some(rights) = &rights {
            // The child has one thread, so what is set for the thread is set for the process.
            rustix::thread::set_thread_groups(&rights.groups)?;
            rustix::thread::set_thread_res_gid(rights.gid, rights.gid, rights.gid)?;
            rustix::thread::set_thread_res_uid(rights.uid, rights.uid, rights.uid)?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls on captured values only: no allocation, no lock.
    unsafe { command.pre_exec(prepare) };
}
