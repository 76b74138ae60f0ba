//! The kernel side: the only crate that uses aya, map file descriptors and pins.
//!
//! # Purpose
//!
//! [`Kernel::open`] loads the programs, adopts or creates the pinned maps, and attaches or replaces the
//! programs. [`Kernel::apply`] applies a plan; [`store::Maps::image`] reads the tables back;
//! [`store::Maps::compare`] and [`Kernel::repair`] are the audit. [`sockets`] finds and destroys sockets on
//! the whole host.
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
mod attach;
mod btf;
pub mod cgroup;
mod counters;
pub mod error;
pub mod exclusion;
pub mod exclusive;
mod fault;
pub mod feature;
pub mod grace;
pub mod host;
mod layouts;
pub mod links;
pub mod lock;
pub mod mapped;
mod mountinfo;
pub mod netns;
pub mod object;
pub mod pins;
mod pod;
mod served;
pub mod sock_diag;
pub mod sockets;
mod storage;
pub mod store;
pub mod syscall;
mod adoption;

pub use self::{
    error::{KernelError, chain},
    feature::{Features, SockFields},
    store::{Kernel, Options},
    adoption::TooSmall,
};
