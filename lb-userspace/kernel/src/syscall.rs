//! System calls that aya and nix lack.
#![expect(unsafe_code, reason = "raw bpf(2)")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::libc;

/// bpf(2). Returns 0 or a new file descriptor: see [`bpf_new`].
///
/// # Errors
///
/// The system call's.
///
/// # Safety
///
/// `attr` must begin as `union bpf_attr` does for `command`. Each pointer in it must be valid for what the
/// kernel reads or writes there.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: the kernel accesses `size_of` bytes at the pointer, which outlives the call. The caller vouches
    // for the pointers in `attr`.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    match RawFd::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// bpf(2), for a command that returns a file descriptor.
///
/// # Errors
///
/// The system call's.
///
/// # Safety
///
/// As [`bpf`]; `command` must be one that returns a descriptor.
unsafe fn bpf_new<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for `attr`.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `BPF_OBJ_GET` of `enum bpf_cmd`.
const BPF_OBJ_GET: libc::c_int = 7;

/// `BPF_OBJ_*` of `union bpf_attr`.
#[repr(C)]
struct ObjPath {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

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
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjPath { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the kernel reads a string from `pathname`, which outlives the call.
    unsafe { bpf_new(BPF_OBJ_GET, &mut attr) }
}

/// Pins a map, program or link, even if it is pinned elsewhere.
///
/// # Errors
///
/// The system call's; `AlreadyExists` if the path exists.
///
/// # Kernel
///
/// 4.4
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    /// `BPF_OBJ_PIN` of `enum bpf_cmd`.
    const BPF_OBJ_PIN: libc::c_int = 6;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr =
        ObjPath { pathname: path.as_ptr() as u64, bpf_fd: object.as_raw_fd().cast_unsigned(), file_flags: 0 };
    // SAFETY: the kernel reads a string from `pathname`, which outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Keeps the heap of the C library small, at the price of speed that this program does not need. Call it
/// before any thread starts. Does nothing without glibc.
///
/// - Large buffers get their own mapping, which is returned when they are freed. By default the first freed
///   one (here the text of the snapshot) raises the threshold, and later ones stay on the heap.
/// - One heap serves all threads, instead of one each with its own gaps: 6 MiB less at 100,000 endpoints.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two integers and changes where later allocations are made.
    let _whether_they_were_set =
        unsafe { (libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10), libc::mallopt(libc::M_ARENA_MAX, 1)) };
}

/// Returns freed memory to the kernel.
///
/// The C library keeps freed memory for reuse. After the first list that is about as much as the objects
/// themselves, and is not reused. Does nothing without glibc.
pub fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer; allocations stay where they are.
    let _whether_some_was_returned = unsafe { libc::malloc_trim(0) };
}

/// `BPF_PROG_LOAD` of `enum bpf_cmd`.
const BPF_PROG_LOAD: libc::c_int = 5;

/// Loads a program. `instructions` are in the kernel's encoding, each one word in native byte order. `target`
/// is the BTF id of the attach target of a tracing program, else 0.
fn load(program_type: u32, attach_type: u32, target: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    /// The beginning of the anonymous struct for `BPF_PROG_LOAD` in `union bpf_attr`.
    #[repr(C)]
    #[derive(Default)]
    struct ProgLoad {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info_rec_size: u32,
        func_info: u64,
        func_info_cnt: u32,
        line_info_rec_size: u32,
        line_info: u64,
        line_info_cnt: u32,
        attach_btf_id: u32,
    }
    let mut attr = ProgLoad {
        prog_type: program_type,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        prog_name: *b"socklb\0\0\0\0\0\0\0\0\0\0",
        expected_attach_type: attach_type,
        attach_btf_id: target,
        ..ProgLoad::default()
    };
    // SAFETY: the kernel reads the instructions and the licence, which outlive the call.
    unsafe { bpf_new(BPF_PROG_LOAD, &mut attr) }
}

/// Whether the verifier accepts a program of a socket-address hook. `false` also after any other error, such
/// as a missing capability. `instructions` are in the kernel's encoding, in native byte order.
#[must_use]
pub fn loads(instructions: &[u64]) -> bool {
    /// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR` of `enum bpf_prog_type`.
    const CGROUP_SOCK_ADDR: u32 = 18;
    /// `BPF_CGROUP_INET4_CONNECT` of `enum bpf_attach_type`.
    const INET4_CONNECT: u32 = 10;
    load(CGROUP_SOCK_ADDR, INET4_CONNECT, 0, instructions).is_ok()
}

/// `BPF_TRACE_ITER` of `enum bpf_attach_type`.
const BPF_TRACE_ITER: u32 = 28;

/// Loads the program of a BPF iterator. `target` is the BTF id of the kernel's function `bpf_iter_...`.
/// `instructions` are in the kernel's encoding, in native byte order.
///
/// # Errors
///
/// The system call's: `EPERM` without `CAP_BPF` and `CAP_PERFMON`.
///
/// # Kernel
///
/// 5.8
pub fn load_iterator(target: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    /// `BPF_PROG_TYPE_TRACING` of `enum bpf_prog_type`.
    const TRACING: u32 = 26;
    load(TRACING, BPF_TRACE_ITER, target, instructions)
}

/// `BPF_LINK_CREATE` of `enum bpf_cmd`.
const BPF_LINK_CREATE: libc::c_int = 28;

/// Links an iterator's program to the map over whose elements it runs.
///
/// # Errors
///
/// The system call's: `EINVAL` for a map of another type.
///
/// # Kernel
///
/// 5.9
pub fn link_iterator(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `link_create` of `union bpf_attr`, for iterators.
    #[repr(C)]
    struct LinkCreate {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
        iter_info: u64,
        iter_info_len: u32,
        padding: u32,
    }
    // `map` of `union bpf_iter_link_info`.
    let map_fd = map.as_raw_fd().cast_unsigned();
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iter_info: (&raw const map_fd) as u64,
        iter_info_len: 4,
        padding: 0,
    };
    // SAFETY: the kernel reads four octets from `iter_info`, which outlives the call.
    unsafe { bpf_new(BPF_LINK_CREATE, &mut attr) }
}

/// Starts an iteration. The program's output is read from the returned descriptor; the link must outlive it.
///
/// # Errors
///
/// The system call's.
///
/// # Kernel
///
/// 5.8
pub fn iterate(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `BPF_ITER_CREATE` of `enum bpf_cmd`.
    const BPF_ITER_CREATE: libc::c_int = 33;
    /// `iter_create` of `union bpf_attr`.
    #[repr(C)]
    struct IterCreate {
        link_fd: u32,
        flags: u32,
    }
    let mut attr = IterCreate { link_fd: link.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: it contains no pointer.
    unsafe { bpf_new(BPF_ITER_CREATE, &mut attr) }
}

/// Attaches a program to a hook of a cgroup, beside others. It stays attached while the link is open or
/// pinned.
///
/// # Errors
///
/// The system call's: `EPERM` without `CAP_NET_ADMIN`, or if another program excludes further ones.
///
/// # Kernel
///
/// 5.7
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    /// `link_create` of `union bpf_attr`.
    #[repr(C)]
    struct LinkCreate {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        /// Links always imply "multi": the flag for it is `EINVAL`.
        flags: u32,
    }
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        flags: 0,
    };
    // SAFETY: it contains no pointer.
    unsafe { bpf_new(BPF_LINK_CREATE, &mut attr) }
}

/// `BPF_LINK_UPDATE` of `enum bpf_cmd`.
const BPF_LINK_UPDATE: libc::c_int = 29;

/// Replaces the program of a link atomically: every call runs the old one or the new one.
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
    let mut attr = LinkUpdate {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: it contains no pointer.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// `BPF_LINK_DETACH` of `enum bpf_cmd`.
const BPF_LINK_DETACH: libc::c_int = 34;

/// Detaches the program of a link, even if others have the link open or pinned. Calls that begin afterwards
/// do not run it. The link stays, without effect.
///
/// # Errors
///
/// The system call's: `EINVAL` if it is not a link.
///
/// # Kernel
///
/// 5.9
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    /// `link_detach` of `union bpf_attr`.
    #[repr(C)]
    struct LinkDetach {
        link_fd: u32,
    }
    let mut attr = LinkDetach { link_fd: link.as_raw_fd().cast_unsigned() };
    // SAFETY: it contains no pointer.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// The kernel's description of a link to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupLink {
    /// The kernel's id of the link.
    pub id: u32,
    /// The program in it.
    pub program_id: u32,
    /// The cgroup's id; 0 once the link is detached or the cgroup removed.
    pub cgroup_id: u64,
    /// `enum bpf_attach_type`
    pub attach_type: u32,
}

/// Reads the program of a link and where it is attached.
///
/// # Errors
///
/// The system call's; `InvalidData` for a link to anything but a cgroup.
///
/// # Kernel
///
/// 5.8
pub fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    /// `BPF_OBJ_GET_INFO_BY_FD` of `enum bpf_cmd`.
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    /// `BPF_LINK_TYPE_CGROUP` of `enum bpf_link_type`.
    const CGROUP: u32 = 3;
    /// `info` of `union bpf_attr`.
    #[repr(C)]
    struct GetInfo {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    /// `struct bpf_link_info`, for cgroups.
    #[repr(C)]
    #[derive(Default)]
    struct LinkInfo {
        link_type: u32,
        id: u32,
        prog_id: u32,
        padding: u32,
        cgroup_id: u64,
        attach_type: u32,
        padding_at_end: u32,
    }
    let mut info = LinkInfo::default();
    let mut attr = GetInfo {
        bpf_fd: link.as_raw_fd().cast_unsigned(),
        info_len: u32::try_from(size_of::<LinkInfo>()).map_err(io::Error::other)?,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel writes at most `info_len` bytes to `info`, which outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    if info.link_type != CGROUP {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a link to a cgroup"));
    }
    let LinkInfo { id, prog_id: program_id, cgroup_id, attach_type, .. } = info;
    Ok(CgroupLink { id, program_id, cgroup_id, attach_type })
}

/// `BPF_PROG_QUERY` of `enum bpf_cmd`.
const BPF_PROG_QUERY: libc::c_int = 16;

/// The ids of the effective programs of a cgroup's hook in order, including those of its ancestors. At most
/// 64, the kernel's limit.
///
/// # Errors
///
/// The system call's; `EINVAL` for a hook that the kernel lacks.
///
/// # Kernel
///
/// 4.15
pub fn programs_of(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    /// `BPF_F_QUERY_EFFECTIVE`
    const EFFECTIVE: u32 = 1;
    query(cgroup, attach_type, EFFECTIVE).map(|attached| attached.programs)
}

/// What is attached to a hook of one cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Flags that all of them were attached with (`BPF_F_ALLOW_*`).
    pub flags: u32,
    /// The ids of the programs.
    pub programs: Vec<u32>,
}

/// What is attached to a hook of this cgroup itself, without its ancestors. At most 64 programs.
///
/// # Errors
///
/// As [`programs_of`].
///
/// # Kernel
///
/// 4.15
pub fn attached_to(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Attached> {
    query(cgroup, attach_type, 0)
}

fn query(cgroup: BorrowedFd<'_>, attach_type: u32, query_flags: u32) -> io::Result<Attached> {
    /// `query` of `union bpf_attr`, as of kernel 5.10.
    #[repr(C)]
    struct ProgQuery {
        target_fd: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        reserved: u32,
    }
    let mut ids = [0u32; 64];
    let mut attr = ProgQuery {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        query_flags,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        reserved: 0,
    };
    // SAFETY: the kernel writes at most `prog_cnt` ids, which is the length of `ids`; they outlive the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    let programs = ids.into_iter().take(attr.prog_cnt as usize).collect();
    Ok(Attached { flags: attr.attach_flags, programs })
}

/// A map of maps, used only because updating it waits for an RCU grace period.
#[derive(Debug)]
pub struct MapOfMaps {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl MapOfMaps {
    /// Creates one with a single element, not pinned.
    ///
    /// # Errors
    ///
    /// The system call's.
    ///
    /// # Kernel
    ///
    /// 4.12
    pub fn new() -> io::Result<Self> {
        /// `BPF_MAP_TYPE_ARRAY` and `BPF_MAP_TYPE_ARRAY_OF_MAPS` of `enum bpf_map_type`.
        const ARRAY: u32 = 2;
        const ARRAY_OF_MAPS: u32 = 12;
        let inner = create_array(ARRAY, None)?;
        Ok(Self { outer: create_array(ARRAY_OF_MAPS, Some(inner.as_fd()))?, inner })
    }

    /// Waits until every program that was running on any CPU has finished, except sleepable ones.
    ///
    /// Programs of cgroup hooks run inside an RCU read-side critical section. The kernel calls
    /// `synchronize_rcu()` before it returns from an update of a map of maps (`maybe_wait_bpf_programs()`),
    /// for any number of CPUs and with `nohz_full`. `membarrier(MEMBARRIER_CMD_GLOBAL)` does so only with two
    /// CPUs online and without `nohz_full`. Takes some tens of milliseconds.
    ///
    /// # Errors
    ///
    /// The system call's.
    ///
    /// # Kernel
    ///
    /// 5.10: waits on every supported kernel.
    pub fn wait_for_grace_period(&self) -> io::Result<()> {
        /// `BPF_MAP_UPDATE_ELEM` of `enum bpf_cmd`.
        const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
        /// `BPF_MAP_*_ELEM` of `union bpf_attr`.
        #[repr(C)]
        struct Elem {
            map_fd: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let (key, value) = (0u32, self.inner.as_raw_fd().cast_unsigned());
        let mut attr = Elem {
            map_fd: self.outer.as_raw_fd().cast_unsigned(),
            padding: 0,
            key: (&raw const key) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads a key and a value of four bytes each, which outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }
}

/// Creates an array map of one element of four bytes.
fn create_array(map_type: u32, inner: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    /// `BPF_MAP_CREATE` of `enum bpf_cmd`.
    const BPF_MAP_CREATE: libc::c_int = 0;
    /// The beginning of the anonymous struct for `BPF_MAP_CREATE` in `union bpf_attr`.
    #[repr(C)]
    struct MapCreate {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
        inner_map_fd: u32,
        numa_node: u32,
        map_name: [u8; 16],
    }
    let mut attr = MapCreate {
        map_type,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        map_flags: 0,
        inner_map_fd: inner.map_or(0, |fd| fd.as_raw_fd().cast_unsigned()),
        numa_node: 0,
        map_name: *b"socklb_grace\0\0\0\0",
    };
    // SAFETY: it contains no pointer.
    unsafe { bpf_new(BPF_MAP_CREATE, &mut attr) }
}

/// Cookie of the calling thread's network namespace, or `None` if the kernel does not report it.
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
