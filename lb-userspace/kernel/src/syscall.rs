//! System calls that aya and nix do not offer.
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
/// `attr` must begin as `union bpf_attr` does for `command`; each pointer in it must be valid for what the kernel reads or
/// writes there.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads and writes `size_of` bytes at the pointer, which outlives the call; for the pointers in
    // `attr` the caller vouches.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    match RawFd::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// bpf(2), for a command that makes a file descriptor.
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
    // SAFETY: new, so that nothing else owns it.
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

/// Pins a map, program or link, also if it is pinned elsewhere.
///
/// # Errors
///
/// The system call's; `AlreadyExists` if something is there.
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

/// Has the C library keep the heap small, which costs it speed that nobody here needs. To be called before there are
/// threads. Does nothing with another C library than glibc.
///
/// - Large buffers are memory of their own, which is given back when they are freed. By default the first one that is
///   freed, here the text of the snapshot, is taken for a sign that more will come, and all later ones stay on the heap.
/// - There is one heap, not one for each thread, each with gaps of its own: 6 MiB less at 100,000 endpoints.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two integers and changes where later allocations are made.
    let _whether_they_were_set =
        unsafe { (libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10), libc::mallopt(libc::M_ARENA_MAX, 1)) };
}

/// Gives memory that was freed back to the kernel.
///
/// The C library keeps what it might need again. After a first list that is about as much as the objects themselves,
/// and nothing needs it again. Does nothing with another C library than glibc.
pub fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer; allocations stay where they are.
    let _whether_some_was_returned = unsafe { libc::malloc_trim(0) };
}

/// `BPF_PROG_LOAD` of `enum bpf_cmd`.
const BPF_PROG_LOAD: libc::c_int = 5;

/// Has the kernel verify a program. `instructions` are in the kernel's encoding, each as one word in native byte order;
/// `target` is the BTF id of what a program of a tracing type attaches to, else 0.
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

/// Whether the kernel's verifier takes a program of a socket-address hook. `false` also if it refuses for another
/// reason, such as a lack of privilege. `instructions` as the kernel encodes them, in native byte order.
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

/// Loads the program of a BPF iterator. `target` is the BTF id of the kernel's function `bpf_iter_...`, `instructions` are as
/// the kernel encodes them, in native byte order.
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

/// Links an iterator's program to the map whose elements it is to run for.
///
/// # Errors
///
/// The system call's: `EINVAL` for a map of another type.
///
/// # Kernel
///
/// 5.9
pub fn link_iterator(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `link_create` of `union bpf_attr`, as far as it is about iterators.
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

/// Begins to iterate: what the program writes is read from the descriptor returned. The link must live as long.
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
    // SAFETY: there is no pointer in it.
    unsafe { bpf_new(BPF_ITER_CREATE, &mut attr) }
}

/// Attaches a program to a hook of a cgroup, beside others. It stays attached as long as the link is open or pinned.
///
/// # Errors
///
/// The system call's: `EPERM` without `CAP_NET_ADMIN`, or if another program has the hook for itself.
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
        /// Links are always "multi": a flag for it is `EINVAL`.
        flags: u32,
    }
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        flags: 0,
    };
    // SAFETY: there is no pointer in it.
    unsafe { bpf_new(BPF_LINK_CREATE, &mut attr) }
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
    let mut attr = LinkUpdate {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: there is no pointer in it.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// `BPF_LINK_DETACH` of `enum bpf_cmd`.
const BPF_LINK_DETACH: libc::c_int = 34;

/// Detaches the program of a link, whoever else has the link open or pinned. A call that begins afterwards does not run
/// it. The link stays, with nothing to do.
///
/// # Errors
///
/// The system call's: `EINVAL` for what is no link.
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
    // SAFETY: there is no pointer in it.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// What the kernel tells of a link to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupLink {
    /// The kernel's id of the link.
    pub id: u32,
    /// The program in it.
    pub program_id: u32,
    /// The cgroup's id; 0 once the link is detached, or the cgroup gone.
    pub cgroup_id: u64,
    /// `enum bpf_attach_type`
    pub attach_type: u32,
}

/// Asks what a link holds and where it is attached.
///
/// # Errors
///
/// The system call's; `InvalidData` for a link to something else than a cgroup.
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
    /// `struct bpf_link_info`, as far as it is about cgroups.
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
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no link to a cgroup"));
    }
    let LinkInfo { id, prog_id: program_id, cgroup_id, attach_type, .. } = info;
    Ok(CgroupLink { id, program_id, cgroup_id, attach_type })
}

/// `BPF_PROG_QUERY` of `enum bpf_cmd`.
const BPF_PROG_QUERY: libc::c_int = 16;

/// The ids of the programs that run for a hook of a cgroup, also those that its ancestors bring, in their order. At most
/// 64, as many as the kernel attaches.
///
/// # Errors
///
/// The system call's; `EINVAL` for a hook that the kernel does not have.
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

/// What is attached to a hook of this very cgroup, without its ancestors. At most 64 programs.
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
    /// `query` of `union bpf_attr`, as far as kernel 5.10 knows it.
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
    // SAFETY: the kernel writes at most `prog_cnt` ids, for which there is room; they outlive the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    let programs = ids.into_iter().take(attr.prog_cnt as usize).collect();
    Ok(Attached { flags: attr.attach_flags, programs })
}

/// A map of maps, whose only use is that a change of it waits for an RCU grace period.
#[derive(Debug)]
pub struct MapOfMaps {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl MapOfMaps {
    /// Makes one with a single element, pinned nowhere.
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

    /// Waits until every program that was running on any CPU has ended, but for those that may sleep.
    ///
    /// Programs of cgroup hooks run inside an RCU read-side section. The kernel calls `synchronize_rcu()` before it returns from
    /// a change to a map of maps (`maybe_wait_bpf_programs()`), however many CPUs there are and whether or not one is
    /// `nohz_full`; `membarrier(MEMBARRIER_CMD_GLOBAL)` does so only with two CPUs online and without `nohz_full`. Takes some
    /// tens of milliseconds.
    ///
    /// # Errors
    ///
    /// The system call's.
    ///
    /// # Kernel
    ///
    /// 5.10: waits on every kernel that takes the programs.
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

/// Makes an array map of one element of four bytes.
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
    // SAFETY: there is no pointer in it.
    unsafe { bpf_new(BPF_MAP_CREATE, &mut attr) }
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
