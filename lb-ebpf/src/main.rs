//! The BPF programs of socklb.
//!
//! # Purpose
//!
//! Entry points of the cgroup socket hooks. Each calls its function in [`hook`]. The verdict is from
//! `lb_common::resolve`, its tables are in [`tables`], raw context access is in [`ctx`], and socket records
//! are in [`record`].
//!
//! # Invariants
//!
//! - A call to anything but a service passes unchanged ([`ctx::PROCEED`]).
//! - A program rejects a call only if its service is known to have no endpoint.
//! - Kernel features and settings are read-only globals ([`config`]): the verifier removes dead branches, so
//!   one object serves every kernel from 5.10 on.
#![no_std]
#![no_main]
// For `ctx::compare_and_swap`.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics), expect(internal_features, reason = "as above"))]
#![warn(unused_results)]
#![expect(
    clippy::inline_always,
    reason = "a BPF function call costs a frame and hides value ranges from the verifier"
)]

mod config;
mod ctx;
mod exclude;
mod hook;
mod maps;
mod outcome;
mod record;
mod tables;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};

use crate::ctx::SockAddr;

/// Defines the programs of each hook, one for each [`config::Mode`].
macro_rules! programs {
    ($($(#[$meta:meta])* $hook:ident, $slots:ident, $storage:ident, $logged:ident => $function:ident;)+) => {
        $(programs!(@one $(#[$meta])* $hook, $slots, Slots, $function);
        programs!(@one $(#[$meta])* $hook, $storage, Storage, $function);
        programs!(@one $(#[$meta])* $hook, $logged, Logged, $function);)+
    };
    (@one $(#[$meta:meta])* $hook:ident, $name:ident, $mode:ident, $function:ident) => {
        $(#[$meta])*
        #[cgroup_sock_addr($hook)]
        // LLVM makes a BPF function of a large one: see `config::Mode::LOG`.
        #[inline(always)]
        fn $name(ctx: SockAddrContext) -> i32 {
            hook::$function::<config::$mode>(&SockAddr::new(&ctx))
        }
    };
}

programs! {
    /// `connect()` on an `AF_INET` socket.
    connect4, connect4, connect4_s, connect4_l => connect4;
    /// `connect()` on an `AF_INET6` socket.
    connect6, connect6, connect6_s, connect6_l => connect6;
    /// `sendto()` and `sendmsg()` with an address on an `AF_INET` UDP socket.
    sendmsg4, sendmsg4, sendmsg4_s, sendmsg4_l => sendmsg4;
    /// `sendto()` and `sendmsg()` with an address on an `AF_INET6` UDP socket.
    sendmsg6, sendmsg6, sendmsg6_s, sendmsg6_l => sendmsg6;
    /// `recvfrom()` and `recvmsg()` that ask for the sender, on an `AF_INET` UDP socket.
    recvmsg4, recvmsg4, recvmsg4_s, recvmsg4_l => restore4;
    /// `recvfrom()` and `recvmsg()` that ask for the sender, on an `AF_INET6` UDP socket.
    recvmsg6, recvmsg6, recvmsg6_s, recvmsg6_l => restore6;
    /// `getpeername()` on an `AF_INET` socket.
    getpeername4, getpeername4, getpeername4_s, getpeername4_l => restore4;
    /// `getpeername()` on an `AF_INET6` socket.
    getpeername6, getpeername6, getpeername6_s, getpeername6_l => restore6;
}

/// Defines the programs of `sock_ops`, one for each [`config::Mode`].
macro_rules! sock_ops_programs {
    ($($name:ident, $mode:ident;)+) => {
        $(/// Events of a TCP connection.
        #[sock_ops]
        #[inline(always)]
        fn $name(ctx: SockOpsContext) -> u32 {
            outcome::observe::<config::$mode>(&ctx::SockOps::new(&ctx))
        })+
    };
}

sock_ops_programs! {
    sock_ops, Slots;
    sock_ops_s, Storage;
    sock_ops_l, Logged;
}

/// The last `close()` of a socket, of any protocol.
#[cgroup_sock(sock_release)]
#[expect(clippy::needless_pass_by_value, reason = "the macro passes the context by value")]
fn sock_release(ctx: SockContext) -> i32 {
    record::release(&ctx);
    ctx::PROCEED
}

/// Some helpers require a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The compiler requires it; no code here panics.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
