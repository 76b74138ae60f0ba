//! The kernel: the only module that knows aya, file descriptors of maps, and pins.
//!
//! # Purpose
//!
//! [`Kernel::open`] loads the programs, adopts or creates the pinned maps, and attaches or replaces the programs.
//! [`Kernel::apply`] carries out a plan; [`store::Maps::image`] reads back what the tables hold;
//! [`store::Maps::compare`] and [`Kernel::repair`] are the audit. [`sockets`] finds and ends sockets on the whole host.
//!
//! # Invariants
//!
//! - Maps and links are pinned: ending the process changes nothing for programs and calls.
//! - A program is replaced in its link, never detached and attached anew.
//! - What maps and hooks there are comes from `lb_common::maps` and `lb_common::hooks`.
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
mod takeover;

pub use self::{
    error::{KernelError, chain},
    feature::{Features, SockFields},
    store::{Kernel, Options},
    takeover::TooSmall,
};
