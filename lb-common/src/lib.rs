//! Map layouts and the load-balancing decision of socklb.
//!
//! # Purpose
//!
//! The contract between the BPF programs (`lb-ebpf`) and user space (`lb-userspace`):
//!
//! - [`layout`]: the exact bytes of every map key and value.
//! - [`resolve`]: decides where a call goes, in the BPF programs on kernel maps and in user space on an
//!   image.
//! - [`health`]: which endpoints are ejected, and for how long.
//! - [`limits`]: capacities that both sides agree on.
//! - [`maps`], [`hooks`]: the tables of all maps and all hooks.
//!
//! # Invariants
//!
//! - No dependencies, no allocation, no `std`: all of it compiles for the BPF target.
//! - No implicit padding in any map type, checked at compile time.
//! - Ports are host-order `u16`, addresses are octet arrays. Network-order integers exist only at the edge of
//!   `lb-ebpf`, which reads the context.
#![no_std]
#![warn(unused_results)]
#![expect(
    clippy::inline_always,
    reason = "a BPF function call costs a frame and hides value ranges from the verifier; kernels before \
              5.16 refuse more than 8 frames"
)]

#[cfg(test)]
extern crate std;

pub mod address;
pub mod health;
pub mod hooks;
pub mod layout;
pub mod limits;
pub mod maps;
pub mod resolve;

pub use address::{Address, Family};
pub use resolve::{Caller, Tables, Verdict, resolve};
