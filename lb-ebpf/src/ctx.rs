//! Raw access to the program's context. The only file that sees network byte order.
//!
//! Every access is a volatile read or write of one 32-bit field: the verifier takes only some widths at some
//! offsets, and LLVM would otherwise merge neighbouring fields into one wide access ("invalid `bpf_context`
//! access").

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    programs::{SockAddrContext, SockContext},
};
use lb_common::{
    address::{Octets4, Octets6},
    layout::Protocol,
};
use network_types::ip::IpProto;

/// Return value of a program that lets the call proceed.
pub(crate) const PROCEED: i32 = 1;
/// Return value of a program that rejects the call: `EPERM` unless another value was set.
pub(crate) const REJECT: i32 = 0;

/// `ECONNREFUSED`, which is 111 on every architecture that Kubernetes runs on.
const ECONNREFUSED: i32 = 111;

// The numbers in map keys are the IP header's.
const _: () = assert!(Protocol::TCP.0 == IpProto::Tcp as u8 && Protocol::UDP.0 == IpProto::Udp as u8);

/// The context of a `BPF_PROG_TYPE_CGROUP_SOCK_ADDR` program.
pub(crate) struct SockAddr<'a> {
    ctx: &'a SockAddrContext,
    raw: *mut bpf_sock_addr,
}

impl<'a> SockAddr<'a> {
    /// Wraps the context that the kernel passed in.
    #[inline(always)]
    pub(crate) fn new(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, raw: ctx.sock_addr }
    }

    /// The context as aya's macros and helpers take it.
    #[inline(always)]
    pub(crate) fn aya(&self) -> &SockAddrContext {
        self.ctx
    }

    /// The protocol of the socket as tables know it, or `None` if no frontend can match it.
    ///
    /// Multipath TCP is not among them: Linux runs no connect hook for its sockets (seen up to 6.18), so that nothing is
    /// recorded that a later hook could find.
    #[inline(always)]
    pub(crate) fn protocol(&self) -> Option<Protocol> {
        // SAFETY: `raw` is the context of the running program; the field is readable in all sock_addr hooks.
        let number = unsafe { addr_of!((*self.raw).protocol).read_volatile() };
        if number == IpProto::Tcp as u32 {
            Some(Protocol::TCP)
        } else if number == IpProto::Udp as u32 || number == IpProto::UdpLite as u32 {
            Some(Protocol::UDP)
        } else {
            None
        }
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

    /// Whether the socket has a peer, as a connected UDP socket has.
    ///
    /// The kernel runs `sendmsg4` also for a plain `send()` on an `AF_INET6` socket that is connected to an
    /// IPv4-mapped address (`udpv6_sendmsg`), with the peer as the destination: that is no call of its own.
    #[inline(always)]
    pub(crate) fn is_connected(&self) -> bool {
        /// `TCP_ESTABLISHED`, which is the state of a connected datagram socket too.
        const ESTABLISHED: u32 = 1;
        // SAFETY: the verifier types the pointer as a full socket, never null.
        unsafe { addr_of!((*self.sock()).state).read_volatile() == ESTABLISHED }
    }

    /// Cookie of the socket, never 0 and never used twice. Kernel 4.12.
    #[inline(always)]
    pub(crate) fn cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    /// Cookie of the network namespace that the socket lives in. Kernel 5.7.
    #[inline(always)]
    pub(crate) fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }
}

/// Makes the call that the program runs for fail with `ECONNREFUSED`. Kernel 5.18 (`bpf_set_retval`).
#[inline(always)]
pub(crate) fn refuse_call() -> i32 {
    // SAFETY: no preconditions; a failure leaves the default, EPERM.
    let _unchanged_on_error = unsafe { bpf_set_retval(-ECONNREFUSED) };
    REJECT
}

/// Cookie of the initial network namespace. Kernel 5.7.
#[inline(always)]
pub(crate) fn initial_netns_cookie() -> u64 {
    // SAFETY: the helper documents a null context as "the initial network namespace".
    unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
}

/// Cookie of a socket that is being closed. Kernel 5.9 (`BPF_CGROUP_INET_SOCK_RELEASE`).
#[inline(always)]
pub(crate) fn sock_cookie(ctx: &SockContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Replaces a word if it has the expected value. Kernel 5.12.
///
/// An intrinsic, since `core::sync::atomic` has no compare-and-swap for the BPF target, whose specification was made
/// before the instruction.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn compare_and_swap(word: *mut u64, old: u64, new: u64) -> bool {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_cxchg};
    // SAFETY: callers pass an aligned word of a live map element.
    unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(word, old, new).1 }
}

/// The same for lints on the host.
#[cfg(not(target_arch = "bpf"))]
pub(crate) fn compare_and_swap(word: *mut u64, old: u64, new: u64) -> bool {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
    // SAFETY: callers pass an aligned word of a live map element.
    unsafe { AtomicU64::from_ptr(word) }.compare_exchange(old, new, Relaxed, Relaxed).is_ok()
}
