//! The kernel side: the only crate that uses aya, map file descriptors and pins.
//!
//! # Purpose
//!
//! [`Kernel::open`] loads the programs, adopts or creates the pinned maps, and attaches or replaces the
//! programs. [`Kernel::apply`] applies a plan; [`Maps::image`] reads the tables back, and [`Observations`]
//! what the programs count; [`Maps::compare`] and [`Kernel::repair`] are the audit. [`sockets`] finds and
//! destroys sockets on the whole host.
//!
//! # Invariants
//!
//! - Maps and links are pinned: programs and calls are unaffected when the process exits.
//! - A program is replaced in its link, never detached and attached again.
//! - `lb_common::maps` and `lb_common::hooks` define which maps and hooks exist.
//! - Unsafe code of user space is in [`mapped`], [`pod`] and [`syscall`] only.
//!
//! # Depends on
//!
//! `plan`, `tables`, `model`, `lb_common`, aya, netlink.

pub mod addresses;
mod adoption;
mod attach;
mod audit;
mod btf;
pub mod cgroup;
pub mod conntrack;
pub mod conntrack_settings;
mod counters;
pub mod error;
pub mod exclusion;
pub mod exclusive;
mod executor;
mod fault;
pub mod feature;
pub mod grace;
pub mod host;
mod layouts;
pub mod links;
mod loader;
pub mod lock;
pub mod mapped;
mod maps;
mod mountinfo;
pub mod netns;
mod nfnetlink;
pub mod nftables;
pub mod object;
mod observations;
pub mod pins;
mod pod;
mod served;
pub mod sock_diag;
pub mod sockets;
mod storage;
pub mod syscall;

pub use self::{
    adoption::TooSmall,
    audit::{Findings, Repaired},
    error::{KernelError, chain},
    executor::{Done, Kernel, Options, Pins},
    feature::{Features, SockFields},
    loader::try_programs,
    maps::Maps,
    observations::Observations,
};
