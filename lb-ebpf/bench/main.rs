//! Programs for comparison with socklb's hooks: empty ones, and a minimal balancer, which does one hash
//! look-up by address, port and protocol, and on a hit the rewrite. It keeps no record of the service.
#![no_std]
#![no_main]
#![warn(unused_results)]
#![expect(clippy::inline_always, reason = "as in the product's programs")]
#![expect(clippy::needless_pass_by_value, reason = "the macros pass the context by value")]

use core::ptr::addr_of;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    btf_maps::HashMap,
    macros::{btf_map, cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use lb_common::layout::{Endpoint4, FrontendKey4};

const PROCEED: i32 = 1;

/// The frontends, each with its single endpoint.
#[btf_map(name = "bench_services")]
static SERVICES: HashMap<FrontendKey4, Endpoint4, 65_536> = HashMap::new();

/// The destination's endpoint, if the destination is a frontend.
#[inline(always)]
fn look_up(raw: *mut bpf_sock_addr) -> Option<Endpoint4> {
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
    unsafe { SERVICES.get(key) }.copied()
}

#[inline(always)]
fn rewrite(raw: *mut bpf_sock_addr, endpoint: &Endpoint4) {
    // SAFETY: `raw` is the context of the running program, and these fields are writable in it.
    unsafe {
        core::ptr::addr_of_mut!((*raw).user_ip4).write_volatile(u32::from_ne_bytes(endpoint.address));
        core::ptr::addr_of_mut!((*raw).user_port).write_volatile(u32::from(endpoint.port.to_be()));
    }
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

/// Does nothing in the callbacks of a TCP connection.
#[sock_ops]
fn empty_sock_ops(_ctx: SockOpsContext) -> u32 {
    1
}

/// One look-up and the rewrite; stores no record.
#[cgroup_sock_addr(connect4)]
fn plain_connect(ctx: SockAddrContext) -> i32 {
    if let Some(endpoint) = look_up(ctx.sock_addr) {
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// The same for a datagram.
#[cgroup_sock_addr(sendmsg4)]
fn plain_sendmsg(ctx: SockAddrContext) -> i32 {
    if let Some(endpoint) = look_up(ctx.sock_addr) {
        rewrite(ctx.sock_addr, &endpoint);
    }
    PROCEED
}

/// Never reached: no code here panics.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
