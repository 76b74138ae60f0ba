//! Raw access to the program's context. The only file that handles network byte order.
//!
//! Every access is a volatile read or write of one 32-bit field: the verifier accepts only some widths at
//! some offsets, and LLVM would merge neighbouring fields into one wide access ("invalid `bpf_context`
//! access").

use core::ptr::{NonNull, addr_of, addr_of_mut};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr, bpf_sock_ops, mptcp_sock},
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_probe_read_kernel, bpf_set_retval,
        bpf_sk_storage_get, bpf_skc_to_mptcp_sock, bpf_skc_to_tcp_sock, bpf_sock_ops_cb_flags_set,
    },
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use lb_common::{
    address::{Address, Octets4, Octets6},
    layout::{Protocol, SocketRecords},
};
use network_types::ip::IpProto;

use crate::{config, maps};

/// Return value of a program that lets the call proceed.
pub(crate) const PROCEED: i32 = 1;
/// Return value of a program that rejects the call: `EPERM` unless another value was set.
pub(crate) const REJECT: i32 = 0;

/// `ECONNREFUSED`; the number is the same on every architecture that Kubernetes runs on.
pub(crate) const ECONNREFUSED: i32 = 111;
/// `EHOSTUNREACH`; likewise.
pub(crate) const EHOSTUNREACH: i32 = 113;

// Map keys use the IP header's protocol numbers.
const _: () = assert!(Protocol::TCP.0 == IpProto::Tcp as u8 && Protocol::UDP.0 == IpProto::Udp as u8);

/// `TCP_ESTABLISHED`, also the state of a connected datagram socket.
const ESTABLISHED: u32 = 1;
/// `AF_INET6`
const AF_INET6: u32 = 10;
/// `IPPROTO_MPTCP`, which exceeds an octet.
const MPTCP: u32 = 262;

/// An address and port, IPv4 in mapped form.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct Peer {
    /// Address.
    pub(crate) address: Octets6,
    /// Port, host order.
    pub(crate) port: u16,
}

impl Peer {
    /// Stands for "none": no endpoint has port 0. A sentinel for the same reason as `Choice::NONE`.
    pub(crate) const NONE: Self = Self { address: [0; 16], port: 0 };
}

/// The context of a `BPF_PROG_TYPE_CGROUP_SOCK_ADDR` program.
pub(crate) struct SockAddr<'a> {
    ctx: &'a SockAddrContext,
    raw: *mut bpf_sock_addr,
}

impl<'a> SockAddr<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, raw: ctx.sock_addr }
    }

    /// The context for aya's macros and helpers.
    #[inline(always)]
    pub(crate) fn aya(&self) -> &SockAddrContext {
        self.ctx
    }

    /// The IP protocol number of the socket.
    #[inline(always)]
    fn protocol_number(&self) -> u32 {
        // SAFETY: `raw` is the context of the running program; the field is readable in all sock_addr hooks.
        unsafe { addr_of!((*self.raw).protocol).read_volatile() }
    }

    /// The protocol of the socket in the tables' terms, or `None` if no frontend can match it.
    ///
    /// Multipath TCP yields `None`: the kernel runs the connect hooks for its subflows, which are TCP
    /// sockets.
    #[inline(always)]
    pub(crate) fn protocol(&self) -> Option<Protocol> {
        let number = self.protocol_number();
        if number == IpProto::Tcp as u32 {
            Some(Protocol::TCP)
        } else if number == IpProto::Udp as u32 || number == IpProto::UdpLite as u32 {
            Some(Protocol::UDP)
        } else {
            None
        }
    }

    /// Whether the socket is a multipath TCP socket, not a subflow.
    #[inline(always)]
    pub(crate) fn is_mptcp(&self) -> bool {
        self.protocol_number() == MPTCP
    }

    /// The port in the user's socket address, host order.
    #[inline(always)]
    pub(crate) fn port(&self) -> u16 {
        // SAFETY: as above. The field is a u32 that holds the 16 network-order bits in its first two octets.
        let raw = unsafe { addr_of!((*self.raw).user_port).read_volatile() };
        let [high, low, ..] = raw.to_ne_bytes();
        u16::from_be_bytes([high, low])
    }

    /// Replaces the port in the user's socket address.
    #[inline(always)]
    pub(crate) fn set_port(&self, port: u16) {
        let [high, low] = port.to_be_bytes();
        // SAFETY: as above; the field is writable in all sock_addr hooks that this object attaches to.
        unsafe { addr_of_mut!((*self.raw).user_port).write_volatile(u32::from_ne_bytes([high, low, 0, 0])) };
    }

    /// The address in the user's `sockaddr_in`. Only in the hooks for `AF_INET`.
    #[inline(always)]
    pub(crate) fn ipv4(&self) -> Octets4 {
        // SAFETY: as above.
        unsafe { addr_of!((*self.raw).user_ip4).read_volatile() }.to_ne_bytes()
    }

    /// Replaces the address in the user's `sockaddr_in`. Only in the hooks for `AF_INET`.
    #[inline(always)]
    pub(crate) fn set_ipv4(&self, address: Octets4) {
        // SAFETY: as above.
        unsafe { addr_of_mut!((*self.raw).user_ip4).write_volatile(u32::from_ne_bytes(address)) };
    }

    /// The address in the user's `sockaddr_in6`. Only in the hooks for `AF_INET6`.
    #[inline(always)]
    pub(crate) fn ipv6(&self) -> Octets6 {
        let mut octets = [0; 16];
        let mut word = 0;
        while word < 4 {
            // SAFETY: as above; `word` is below 4.
            let part = unsafe { addr_of!((*self.raw).user_ip6[word]).read_volatile() }.to_ne_bytes();
            octets[word * 4] = part[0];
            octets[word * 4 + 1] = part[1];
            octets[word * 4 + 2] = part[2];
            octets[word * 4 + 3] = part[3];
            word += 1;
        }
        octets
    }

    /// Replaces the address in the user's `sockaddr_in6`. Only in the hooks for `AF_INET6`.
    #[inline(always)]
    pub(crate) fn set_ipv6(&self, address: Octets6) {
        let mut word = 0;
        while word < 4 {
            let at = word * 4;
            let part = [address[at], address[at + 1], address[at + 2], address[at + 3]];
            // SAFETY: as above; `word` is below 4.
            unsafe { addr_of_mut!((*self.raw).user_ip6[word]).write_volatile(u32::from_ne_bytes(part)) };
            word += 1;
        }
    }

    /// The socket, for socket storage. Never null in these hooks.
    #[inline(always)]
    pub(crate) fn sock(&self) -> *mut bpf_sock {
        // SAFETY: as above; the verifier types this field as a pointer to a full socket.
        unsafe { (*self.raw).__bindgen_anon_1.sk }
    }

    /// The peer of a connected datagram socket in a hook for `AF_INET`, or [`Peer::NONE`].
    ///
    /// The call's address selects the hook: an `AF_INET6` socket accepts `sockaddr_in`, too.
    #[inline(always)]
    pub(crate) fn peer4(&self) -> Peer {
        if !self.is_connected() {
            return Peer::NONE;
        }
        // SAFETY: the verifier types the pointer as a full socket, never null.
        if unsafe { addr_of!((*self.sock()).family).read_volatile() } == AF_INET6 {
            return self.peer6();
        }
        // SAFETY: as above.
        let address = unsafe { addr_of!((*self.sock()).dst_ip4).read_volatile() }.to_ne_bytes();
        Peer { address: address.to_mapped(), port: self.peer_port() }
    }

    /// The peer of a connected `AF_INET6` datagram socket, or [`Peer::NONE`].
    #[inline(always)]
    pub(crate) fn peer6(&self) -> Peer {
        if !self.is_connected() {
            return Peer::NONE;
        }
        // SAFETY: as above.
        let words = unsafe {
            [
                addr_of!((*self.sock()).dst_ip6[0]).read_volatile(),
                addr_of!((*self.sock()).dst_ip6[1]).read_volatile(),
                addr_of!((*self.sock()).dst_ip6[2]).read_volatile(),
                addr_of!((*self.sock()).dst_ip6[3]).read_volatile(),
            ]
        };
        // SAFETY: both types are 16 plain octets.
        Peer { address: unsafe { core::mem::transmute::<[u32; 4], Octets6>(words) }, port: self.peer_port() }
    }

    #[inline(always)]
    fn is_connected(&self) -> bool {
        // SAFETY: as above.
        unsafe { addr_of!((*self.sock()).state).read_volatile() == ESTABLISHED }
    }

    #[inline(always)]
    fn peer_port(&self) -> u16 {
        // SAFETY: as above. The field holds the port in network order.
        u16::from_be(unsafe { addr_of!((*self.sock()).dst_port).read_volatile() })
    }

    /// The socket's cookie, or 0 if none was assigned yet.
    ///
    /// [`Self::cookie`] assigns it. A socket without a cookie has no record and costs no look-up in a cold
    /// table. Only with [`config::Mode::SLOTS`].
    #[inline(always)]
    pub(crate) fn known_cookie(&self) -> u64 {
        read_kernel(self.kernel_sock().wrapping_add(config::SOCK_COOKIE.load().into()))
    }

    /// Whether the kernel uses the socket itself (`sk_kern_sock`), as NFS and multipath TCP's subflows do.
    /// `false` where [`config::HAS_SOCK_FIELDS`] is off.
    ///
    /// No `sock_release` program runs for such a socket (`inet_release`).
    #[inline(always)]
    pub(crate) fn is_kernel_socket(&self) -> bool {
        if !config::is_on(&config::HAS_SOCK_FIELDS) {
            return false;
        }
        let word: u8 = read_kernel(self.kernel_sock().wrapping_add(config::SOCK_KERNEL.load().into()));
        word & config::SOCK_KERNEL_MASK.load() != 0
    }

    /// Address of the kernel's `struct sock`. The verifier forbids arithmetic on the context's pointer.
    #[inline(always)]
    fn kernel_sock(&self) -> u64 {
        read_kernel((self.ctx.as_ptr() as u64).wrapping_add(config::CONTEXT_SOCK.load().into()))
    }

    /// The multipath TCP socket of this subflow. Kernel 5.19 (`bpf_skc_to_mptcp_sock`).
    #[inline(always)]
    pub(crate) fn multipath(&self) -> Option<Multipath> {
        if !config::is_on(&config::HAS_MPTCP) || self.protocol_number() != IpProto::Tcp as u32 {
            return None;
        }
        // SAFETY: the helper takes any socket and returns null for another kind.
        NonNull::new(unsafe { bpf_skc_to_mptcp_sock(self.sock().cast()) }).map(|socket| Multipath { socket })
    }

    /// The socket's cookie, never 0 and never reused. Kernel 4.12.
    #[inline(always)]
    pub(crate) fn cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    /// Cookie of the socket's network namespace. Kernel 5.7.
    #[inline(always)]
    pub(crate) fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }
}

/// The context of a `BPF_PROG_TYPE_SOCK_OPS` program.
pub(crate) struct SockOps {
    raw: *mut bpf_sock_ops,
}

impl SockOps {
    #[inline(always)]
    pub(crate) fn new(ctx: &SockOpsContext) -> Self {
        Self { raw: ctx.ops }
    }

    /// What happened: `BPF_SOCK_OPS_*`.
    #[inline(always)]
    pub(crate) fn op(&self) -> u32 {
        // SAFETY: `raw` is the context of the running program; the field is readable for all operations.
        unsafe { addr_of!((*self.raw).op).read_volatile() }
    }

    /// An argument of the operation.
    #[inline(always)]
    pub(crate) fn argument(&self, n: usize) -> u32 {
        // SAFETY: as above; callers pass 0 or 1 of four.
        unsafe { addr_of!((*self.raw).__bindgen_anon_1.args[n]).read_volatile() }
    }

    /// Callbacks of this socket that are requested: `BPF_SOCK_OPS_*_CB_FLAG`, also by other programs.
    #[inline(always)]
    pub(crate) fn callbacks(&self) -> u32 {
        // SAFETY: as above.
        unsafe { addr_of!((*self.raw).bpf_sock_ops_cb_flags).read_volatile() }
    }

    /// Sets the requested callbacks.
    #[inline(always)]
    pub(crate) fn set_callbacks(&self, flags: u32) {
        // SAFETY: the helper takes the program's own context. It fails for flags that this kernel lacks.
        let _all_exist_since_4_16 = unsafe { bpf_sock_ops_cb_flags_set(self.raw, flags.cast_signed()) };
    }

    /// The state of the connection (`TCP_*`).
    #[inline(always)]
    pub(crate) fn state(&self) -> u32 {
        // SAFETY: as above.
        unsafe { addr_of!((*self.raw).state).read_volatile() }
    }

    /// The peer of the connection.
    #[inline(always)]
    pub(crate) fn peer(&self) -> Peer {
        // All are read, since LLVM would merge two reads of different fields into one of a selected address.
        // SAFETY: as above; of another family, the kernel returns any word.
        let (port, family, v4, v6) = unsafe {
            (
                addr_of!((*self.raw).remote_port).read_volatile(),
                addr_of!((*self.raw).family).read_volatile(),
                addr_of!((*self.raw).remote_ip4).read_volatile(),
                [
                    addr_of!((*self.raw).remote_ip6[0]).read_volatile(),
                    addr_of!((*self.raw).remote_ip6[1]).read_volatile(),
                    addr_of!((*self.raw).remote_ip6[2]).read_volatile(),
                    addr_of!((*self.raw).remote_ip6[3]).read_volatile(),
                ],
            )
        };
        let is_v6 = family == AF_INET6;
        let mapped = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), v4];
        // SAFETY: both types are 16 plain octets.
        let address = unsafe { core::mem::transmute::<[u32; 4], Octets6>(if is_v6 { v6 } else { mapped }) };
        // The port is in network order, in the upper half of a big-endian word.
        #[expect(clippy::cast_possible_truncation, reason = "the port")]
        let port = u32::from_be(port) as u16;
        Peer { address, port }
    }

    /// The socket's cookie, or 0 if none was assigned yet: see [`SockAddr::known_cookie`].
    #[inline(always)]
    pub(crate) fn known_cookie(&self) -> u64 {
        self.field(config::SOCK_COOKIE.load())
    }

    /// The socket's error (`errno`), or 0. The kernel sets it before it closes a connection that failed, and
    /// has not set it when the program itself closes.
    #[inline(always)]
    pub(crate) fn error(&self) -> u32 {
        self.field(config::SOCK_ERROR.load())
    }

    /// Reads a field at an offset in `struct sock`; zero without a socket. Kernel 5.9
    /// (`bpf_skc_to_tcp_sock`).
    ///
    /// The kernel's own context is no typed pointer: it would take two calls of `bpf_probe_read_kernel`.
    #[inline(always)]
    fn field<T: Default>(&self, offset: u32) -> T {
        let sock = self.sock();
        if sock.is_null() {
            return T::default();
        }
        // SAFETY: the helper takes any socket and returns null for another kind.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sock.cast()) };
        if tcp.is_null() {
            return T::default();
        }
        // SAFETY: `struct tcp_sock` begins with its `struct sock`. User space reads the field's offset from
        // the kernel's BTF, and the verifier checks the access against it.
        unsafe { tcp.cast::<u8>().add(offset as usize).cast::<T>().read_volatile() }
    }

    /// The socket, or null.
    #[inline(always)]
    fn sock(&self) -> *mut bpf_sock {
        // SAFETY: the verifier types this field as a pointer to a full socket, or null.
        unsafe { addr_of!((*self.raw).__bindgen_anon_2.sk).read_volatile() }
    }

    /// The socket's storage, or null.
    #[inline(always)]
    pub(crate) fn storage(&self) -> *mut SocketRecords {
        let sock = self.sock();
        if sock.is_null() {
            return core::ptr::null_mut();
        }
        // SAFETY: a live socket.
        unsafe { storage_of(sock.cast(), 0) }
    }
}

/// The multipath TCP socket of a subflow.
#[derive(Clone, Copy)]
pub(crate) struct Multipath {
    // `NonNull` gives `Option` a niche: without one, LLVM reads the pointer before it checks for `None`.
    socket: NonNull<mptcp_sock>,
}

impl Multipath {
    /// Whether the connection is established. Subflows added later are the kernel's, not a call.
    #[inline(always)]
    pub(crate) fn is_established(self) -> bool {
        // SAFETY: `struct mptcp_sock` begins with its `struct sock`. User space reads the field's offset from
        // the kernel's BTF, and the verifier checks the access against it.
        let state = unsafe {
            self.socket.as_ptr().cast::<u8>().add(config::SOCK_STATE.load() as usize).read_volatile()
        };
        u32::from(state) == ESTABLISHED
    }

    /// The socket's storage, or null.
    #[inline(always)]
    pub(crate) fn storage(self) -> *mut SocketRecords {
        // SAFETY: a live socket.
        unsafe { storage_of(self.socket.as_ptr().cast(), 0) }
    }

    /// The socket's storage, created if missing. Null only when the kernel is out of memory.
    #[inline(always)]
    pub(crate) fn storage_or_new(self) -> *mut SocketRecords {
        // SAFETY: as above.
        unsafe { storage_of(self.socket.as_ptr().cast(), BPF_SK_STORAGE_GET_F_CREATE.into()) }
    }
}

/// Reads kernel memory; zero if it cannot be read. Kernel 5.8 in these programs (`bpf_probe_read_kernel`),
/// unless lockdown forbids it.
#[inline(always)]
fn read_kernel<T: Default>(address: u64) -> T {
    let mut value = T::default();
    #[expect(clippy::cast_possible_truncation, reason = "a word")]
    let size = size_of::<T>() as u32;
    // SAFETY: the helper writes `size` octets, zeros if it cannot read.
    let _zero_on_error =
        unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size, address as *const core::ffi::c_void) };
    value
}

/// Makes the current call fail with an error number. Kernel 5.18 (`bpf_set_retval`).
#[inline(always)]
pub(crate) fn fail_call(errno: i32) -> i32 {
    // SAFETY: no preconditions; a failure leaves the default, EPERM.
    let _unchanged_on_error = unsafe { bpf_set_retval(-errno) };
    REJECT
}

/// Cookie of the initial network namespace. Kernel 5.7.
#[inline(always)]
pub(crate) fn initial_netns_cookie() -> u64 {
    // SAFETY: the helper documents a null context as "the initial network namespace".
    unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
}

/// Cookie of a socket that is being closed, or 0: see [`SockAddr::known_cookie`]. Kernel 5.9
/// (`BPF_CGROUP_INET_SOCK_RELEASE`, whose context is the `struct sock` itself).
#[inline(always)]
pub(crate) fn sock_cookie(ctx: &SockContext) -> u64 {
    read_kernel((ctx.as_ptr() as u64).wrapping_add(config::SOCK_COOKIE.load().into()))
}

/// Storage of a socket that is being closed, or null. Kernel 5.9.
#[inline(always)]
pub(crate) fn sock_storage(ctx: &SockContext) -> *mut SocketRecords {
    // SAFETY: the context is the socket.
    unsafe { storage_of(ctx.as_ptr(), 0) }
}

/// Storage of a socket, or null.
///
/// # Safety
///
/// A live socket.
#[inline(always)]
unsafe fn storage_of(sock: *mut core::ffi::c_void, flags: u64) -> *mut SocketRecords {
    let map = (&raw const maps::SOCKET_STORAGE).cast_mut().cast();
    // SAFETY: a map of this object, and a socket as the caller promises.
    unsafe { bpf_sk_storage_get(map, sock.cast(), core::ptr::null_mut(), flags) }.cast()
}

/// Compare-and-swap of a word. Kernel 5.12.
///
/// An intrinsic: `core::sync::atomic` has no compare-and-swap for the BPF target, whose specification
/// predates the instruction.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn compare_and_swap(word: *mut u64, old: u64, new: u64) -> bool {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_cxchg};
    // SAFETY: callers pass an aligned word of a live map element.
    unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(word, old, new).1 }
}

/// The same, for lints on the host.
#[cfg(not(target_arch = "bpf"))]
pub(crate) fn compare_and_swap(word: *mut u64, old: u64, new: u64) -> bool {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
    // SAFETY: callers pass an aligned word of a live map element.
    unsafe { AtomicU64::from_ptr(word) }.compare_exchange(old, new, Relaxed, Relaxed).is_ok()
}

/// Adds to a word that other CPUs add to. The old value is not read: that would take Linux 5.12.
///
/// # Safety
///
/// An aligned word of a live map element.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) unsafe fn add<T: Copy>(word: *mut T, number: T) {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};
    // SAFETY: the caller's.
    let _former = unsafe { atomic_xadd::<T, T, { Relaxed }>(word, number) };
}

/// The same, for lints on the host.
///
/// # Safety
///
/// As above.
#[cfg(not(target_arch = "bpf"))]
pub(crate) unsafe fn add<T: Copy + core::ops::Add<Output = T>>(word: *mut T, number: T) {
    // SAFETY: the caller's.
    unsafe { word.write_volatile(word.read_volatile() + number) };
}
