//! The BPF programs of socklb.
//!
//! # Purpose
//!
//! Entry points of the cgroup socket hooks. Each names its hook and hands over to [`hook`]; the decision is
//! `lb_common::resolve`, the tables behind it are in [`tables`], raw context access is in [`ctx`], what a socket
//! remembers is in [`record`].
//!
//! # Invariants
//!
//! - A call that is not for a service is let through unchanged ([`ctx::PROCEED`]).
//! - No program rejects a call except for a service that is known to have no endpoint.
//! - What depends on the kernel or on a setting is a read-only global ([`config`]): the verifier removes the dead
//!   branch, so one object serves every kernel from 5.10 on.
#![no_std]
#![no_main]
// For compare-and-swap, see `ctx::compare_and_swap`.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics), expect(internal_features, reason = "as above"))]
#![warn(unused_results)]
#![expect(
    clippy::inline_always,
    reason = "a BPF function call costs a frame and hides value ranges from the verifier"
)]

mod config;
mod ctx;
mod hook;
mod maps;
mod record;
mod tables;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};

use crate::ctx::SockAddr;

/// Defines each program twice: one that keeps records in slots, and one, with `_s` behind its name, that keeps them in
/// socket storage alone. Kernels before 5.12 refuse an object's program for a compare-and-swap even where it can
/// never run, so a read-only global does not do; the loader takes the one or the other.
macro_rules! programs {
    ($($(#[$meta:meta])* $hook:ident, $with_slots:ident, $with_storage:ident => $function:ident;)+) => {
        $($(#[$meta])*
        #[cgroup_sock_addr($hook)]
        fn $with_slots(ctx: SockAddrContext) -> i32 {
            hook::$function::<true>(&SockAddr::new(&ctx))
        }

        $(#[$meta])*
        #[cgroup_sock_addr($hook)]
        fn $with_storage(ctx: SockAddrContext) -> i32 {
            hook::$function::<false>(&SockAddr::new(&ctx))
        })+
    };
}

programs! {
    /// `connect()` on an `AF_INET` socket.
    connect4, connect4, connect4_s => connect4;
    /// `connect()` on an `AF_INET6` socket.
    connect6, connect6, connect6_s => connect6;
    /// `sendto()` and `sendmsg()` with an address on an `AF_INET` UDP socket.
    sendmsg4, sendmsg4, sendmsg4_s => sendmsg4;
    /// `sendto()` and `sendmsg()` with an address on an `AF_INET6` UDP socket.
    sendmsg6, sendmsg6, sendmsg6_s => sendmsg6;
    /// `recvfrom()` and `recvmsg()` that ask for the sender, on an `AF_INET` UDP socket.
    recvmsg4, recvmsg4, recvmsg4_s => restore4;
    /// `recvfrom()` and `recvmsg()` that ask for the sender, on an `AF_INET6` UDP socket.
    recvmsg6, recvmsg6, recvmsg6_s => restore6;
    /// `getpeername()` on an `AF_INET` socket.
    getpeername4, getpeername4, getpeername4_s => restore4;
    /// `getpeername()` on an `AF_INET6` socket.
    getpeername6, getpeername6, getpeername6_s => restore6;
}

/// The last `close()` of a socket, of any protocol.
#[cgroup_sock(sock_release)]
#[expect(clippy::needless_pass_by_value, reason = "the macro passes the context by value")]
fn sock_release(ctx: SockContext) -> i32 {
    record::released(&ctx);
    ctx::PROCEED
}

/// The verifier asks for a licence compatible with the GPL, since helpers in use are for GPL programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: no code here panics. The compiler wants the item all the same.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
