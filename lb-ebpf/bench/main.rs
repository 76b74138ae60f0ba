//! Programs for comparison with socklb's hooks: an empty program, a plain look-up, and variants of storing a
//! socket's service address (docs/decisions/0002).
//!
//! Each variant does the work of a minimal balancer: one hash look-up by address, port and protocol, and on a
//! hit the rewrite. They differ only in the record.
#![no_std]
#![no_main]
// The BPF target has no stable compare-and-swap: `atomic_cas` is off in its specification, though kernel 5.12
// has the instruction.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics), expect(internal_features, reason = "see above"))]
#![warn(unused_results)]
#![expect(clippy::inline_always, reason = "as in the product's programs")]
#![expect(clippy::needless_pass_by_value, reason = "the macros pass the context by value")]

use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_NO_COMMON_LRU, bpf_sock_addr},
    btf_maps::{Array, HashMap, LruHashMap, SkStorage},
    helpers::bpf_get_socket_cookie,
    macros::{btf_map, cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use lb_common::{
    address::Address,
    layout::{Endpoint4, FrontendKey4, SocketEntry, SocketRecord},
};

const PROCEED: i32 = 1;
/// Capacity of the table variants, in sockets.
const SOCKETS: usize = 65_536;
/// Slots of the array, as many as in the product.
const SLOTS_LEN: u32 = 2 * lb_common::limits::SOCKET_SETS;
const NO_COMMON_LRU: usize = BPF_F_NO_COMMON_LRU as usize;

/// The frontends, each with its single endpoint.
#[btf_map(name = "bench_services")]
static SERVICES: HashMap<FrontendKey4, Endpoint4, 65_536> = HashMap::new();
#[btf_map(name = "bench_storage")]
static STORAGE: SkStorage<SocketRecord> = SkStorage::new();
#[btf_map(name = "bench_hash")]
static HASH: HashMap<u64, SocketRecord, SOCKETS> = HashMap::new();
#[btf_map(name = "bench_lru")]
static LRU: LruHashMap<u64, SocketRecord, SOCKETS> = LruHashMap::new();
#[btf_map(name = "bench_pcpu_lru")]
static PER_CPU_LRU: LruHashMap<u64, SocketRecord, SOCKETS, NO_COMMON_LRU> = LruHashMap::new();
#[btf_map(name = "bench_slots")]
static SLOTS: Array<SocketEntry, { SLOTS_LEN as usize }> = Array::new();

/// The destination's endpoint and its record, if the destination is a frontend.
#[inline(always)]
fn look_up(raw: *mut bpf_sock_addr) -> Option<(Endpoint4, SocketRecord)> {
    // SAFETY: `raw` is the context of the running program.
    let (address, port, protocol) = unsafe {
        (
            addr_of!((*raw).user_ip4).read_volatile().to_ne_bytes(),
            addr_of!((*raw).user_port).read_volatile(),
            addr_of!((*raw).protocol).read_volatile(),
        )
    };
    #[expect(clippy::cast_possible_truncation, reason = "a port has 16 bits, a protocol of interest 8")]
    let key =
        FrontendKey4 { address, port: u16::from_be(port as u16), protocol: protocol as u8, reserved: 0 };
    // SAFETY: the map is not written while the bench runs.
    let endpoint = unsafe { SERVICES.get(key) }.copied()?;
    let record = SocketRecord {
        service_address: address.to_mapped(),
        endpoint_address: endpoint.address.to_mapped(),
        service_port: key.port,
        endpoint_port: endpoint.port,
        endpoint_id: endpoint.endpoint_id,
        service_id: 0,
        index: 0,
        protocol: key.protocol,
        flags: 0,
    };
    Some((endpoint, record))
}

#[inline(always)]
fn rewrite(raw: *mut bpf_sock_addr, endpoint: &Endpoint4) {
    // SAFETY: `raw` is the context of the running program, and these fields are writable in it.
    unsafe {
        core::ptr::addr_of_mut!((*raw).user_ip4).write_volatile(u32::from_ne_bytes(endpoint.address));
        core::ptr::addr_of_mut!((*raw).user_port).write_volatile(u32::from(endpoint.port.to_be()));
    }
}

#[inline(always)]
fn cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Does nothing: measures the kernel's cost of any program.
#[cgroup_sock_addr(connect4)]
fn empty_connect(_ctx: SockAddrContext) -> i32 {
    PROCEED
}

/// Does nothing for a datagram.
#[cgroup_sock_addr(sendmsg4)]
fn empty_sendmsg(_ctx: SockAddrContext) -> i32 {
    PROCEED
}

/// Does nothing when a socket is closed.
#[cgroup_sock(sock_release)]
fn empty_release(_ctx: SockContext) -> i32 {
    PROCEED
}

/// Reads the socket's cookie, which the kernel assigns on the first read.
#[cgroup_sock_addr(connect4)]
fn cookie_connect(ctx: SockAddrContext) -> i32 {
    // Always true: cookies ascend from 1. It keeps the compiler from dropping the call.
    i32::from(cookie(&ctx) != u64::MAX)
}

/// The same when a socket is closed.
#[cgroup_sock(sock_release)]
fn cookie_release(ctx: SockContext) -> i32 {
    i32::from(cookie(&ctx) != u64::MAX)
}

/// One look-up and the rewrite; stores no record.
#[cgroup_sock_addr(connect4)]
fn plain_connect(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, _)) = look_up(ctx.sock_addr) {
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// The same for a datagram.
#[cgroup_sock_addr(sendmsg4)]
fn plain_sendmsg(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, _)) = look_up(ctx.sock_addr) {
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// Socket storage for sockets that use a service.
#[cgroup_sock_addr(connect4)]
fn storage_connect(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, mut record)) = look_up(ctx.sock_addr) {
        // SAFETY: the storage of this socket, which is locked.
        if let Some(stored) = unsafe { STORAGE.get_or_insert_ptr_mut(&ctx, Some(&mut record)).as_mut() } {
            *stored = record;
        }
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// Socket storage for every socket that connects.
#[cgroup_sock_addr(connect4)]
fn storage_all_connect(ctx: SockAddrContext) -> i32 {
    // SAFETY: the storage of this socket, which is locked.
    let stored = unsafe { STORAGE.get_or_insert_ptr_mut(&ctx, None).as_mut() };
    if let Some((endpoint, record)) = look_up(ctx.sock_addr) {
        if let Some(stored) = stored {
            *stored = record;
        }
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// A preallocated hash by socket cookie, emptied by [`hash_release`].
#[cgroup_sock_addr(connect4)]
fn hash_connect(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, record)) = look_up(ctx.sock_addr) {
        let _full = HASH.insert(cookie(&ctx), record, 0);
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// The other half of [`hash_connect`].
#[cgroup_sock(sock_release)]
fn hash_release(ctx: SockContext) -> i32 {
    let _not_there = HASH.remove(cookie(&ctx));
    PROCEED
}

/// An LRU hash by socket cookie: loses records of live sockets when full.
#[cgroup_sock_addr(connect4)]
fn lru_connect(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, record)) = look_up(ctx.sock_addr) {
        let _full = LRU.insert(cookie(&ctx), record, 0);
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// The same with a separate LRU list for each CPU.
#[cgroup_sock_addr(connect4)]
fn per_cpu_lru_connect(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, record)) = look_up(ctx.sock_addr) {
        let _full = PER_CPU_LRU.insert(cookie(&ctx), record, 0);
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// A slot of an array, found by the low bits of the socket cookie and owned by a compare-and-swap; socket
/// storage if another live socket owns it. Freed by [`slots_release`].
#[cgroup_sock_addr(connect4)]
fn slots_connect(ctx: SockAddrContext) -> i32 {
    if let Some((endpoint, mut record)) = look_up(ctx.sock_addr) {
        let cookie = cookie(&ctx);
        if let Some(slot) = slot(cookie)
            && own(slot, cookie)
        {
            // SAFETY: the slot is this socket's.
            unsafe { (*slot).first = record };
        } else if let Some(stored) =
            // SAFETY: the storage of this socket, which is locked.
            unsafe { STORAGE.get_or_insert_ptr_mut(&ctx, Some(&mut record)).as_mut() }
        {
            *stored = record;
        }
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// The other half of [`slots_connect`].
#[cgroup_sock(sock_release)]
fn slots_release(ctx: SockContext) -> i32 {
    let cookie = cookie(&ctx);
    if let Some(slot) = slot(cookie) {
        // SAFETY: a live array element; the cookie is only ever accessed as one word.
        unsafe {
            let owner = &raw mut (*slot).cookie;
            if owner.read_volatile() == cookie {
                owner.write_volatile(0);
            }
        }
    }
    PROCEED
}

#[inline(always)]
fn slot(cookie: u64) -> Option<*mut SocketEntry> {
    #[expect(clippy::cast_possible_truncation, reason = "the low bits are what is wanted")]
    SLOTS.get_ptr_mut(cookie as u32 & (SLOTS_LEN - 1))
}

#[inline(always)]
fn own(slot: *mut SocketEntry, cookie: u64) -> bool {
    // SAFETY: as in `slots_release`.
    let owner = unsafe { &raw mut (*slot).cookie };
    // SAFETY: as above.
    let now = unsafe { owner.read_volatile() };
    now == cookie || (now == 0 && compare_and_swap(owner, 0, cookie))
}

#[cfg(target_arch = "bpf")]
#[inline(always)]
fn compare_and_swap(word: *mut u64, old: u64, new: u64) -> bool {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_cxchg};
    // SAFETY: a live, aligned word.
    unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(word, old, new).1 }
}

/// For lints on the host.
#[cfg(not(target_arch = "bpf"))]
fn compare_and_swap(word: *mut u64, old: u64, new: u64) -> bool {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
    // SAFETY: a live, aligned word.
    unsafe { AtomicU64::from_ptr(word) }.compare_exchange(old, new, Relaxed, Relaxed).is_ok()
}

/// The helpers of socket storage require a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: no code here panics.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
