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

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::ctx::SockAddr;

macro_rules! programs {
    ($($(#[$meta:meta])* $name:ident => $function:path;)+) => {
        $($(#[$meta])*
        #[cgroup_sock_addr($name)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            $function(&SockAddr::new(&ctx))
        })+
    };
}

programs! {
    /// `connect()` on an `AF_INET` socket.
    connect4 => hook::connect4;
    /// `connect()` on an `AF_INET6` socket.
    connect6 => hook::connect6;
    /// `sendto()` and `sendmsg()` with an address on an `AF_INET` UDP socket.
    sendmsg4 => hook::sendmsg4;
    /// `sendto()` and `sendmsg()` with an address on an `AF_INET6` UDP socket.
    sendmsg6 => hook::sendmsg6;
    /// `recvfrom()` and `recvmsg()` that ask for the sender, on an `AF_INET` UDP socket.
    recvmsg4 => hook::restore4;
    /// `recvfrom()` and `recvmsg()` that ask for the sender, on an `AF_INET6` UDP socket.
    recvmsg6 => hook::restore6;
    /// `getpeername()` on an `AF_INET` socket.
    getpeername4 => hook::restore4;
    /// `getpeername()` on an `AF_INET6` socket.
    getpeername6 => hook::restore6;
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
