//! System calls that aya and nix do not offer.
#![expect(unsafe_code, reason = "raw bpf(2) and membarrier(2)")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::libc;

/// `BPF_OBJ_GET` of `enum bpf_cmd`.
const BPF_OBJ_GET: libc::c_int = 7;

/// Opens a pinned map, program or link.
///
/// # Errors
///
/// The system call's; `NotFound` if nothing is pinned there.
///
/// # Kernel
///
/// 4.4
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    /// `BPF_OBJ_*` of `union bpf_attr`.
    #[repr(C)]
    struct ObjGet {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: bpf(2) reads `size_of` bytes from the pointer and a string from `pathname`; both outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<ObjGet>()) };
    match i32::try_from(fd) {
        // SAFETY: a new file descriptor that nobody else knows.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `BPF_LINK_UPDATE` of `enum bpf_cmd`.
const BPF_LINK_UPDATE: libc::c_int = 29;

/// Replaces the program of a link in one step: every call sees the old one or the new one.
///
/// # Errors
///
/// The system call's.
///
/// # Kernel
///
/// 5.7
pub fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    /// `link_update` of `union bpf_attr`.
    #[repr(C)]
    struct LinkUpdate {
        link_fd: u32,
        new_prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    let attr = LinkUpdate {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: bpf(2) reads `size_of` bytes from the pointer, which outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_UPDATE, &raw const attr, size_of::<LinkUpdate>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `MEMBARRIER_CMD_GLOBAL` of `enum membarrier_cmd`.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Waits until every program that was running on any CPU has ended.
///
/// `MEMBARRIER_CMD_GLOBAL` is `synchronize_rcu()`, and cgroup programs run inside an RCU read-side section. Takes
/// some tens of milliseconds.
///
/// # Errors
///
/// The system call's: `EINVAL` on a kernel with `nohz_full` CPUs, `ENOSYS` without `CONFIG_MEMBARRIER`.
pub fn wait_for_grace_period() -> io::Result<()> {
    // SAFETY: takes two integers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Cookie of the network namespace that the calling thread is in, or `None` if the kernel cannot tell.
///
/// # Kernel
///
/// 5.14 (`SO_NETNS_COOKIE`)
#[must_use]
pub fn netns_cookie() -> Option<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .ok()?;
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).ok()?;
    // SAFETY: the kernel writes at most `len` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(cookie)
}
