//! The programs' effect on real sockets, on the running kernel.
//!
//! Each test has its own sandbox. The executable works as the only program of a virtual machine.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic, and so do its helpers")]

mod affinity;
mod any_kernel;
mod balance;
mod calls;
#[path = "../pure/clusters.rs"]
#[expect(
    dead_code,
    reason = "the states of a cluster, and the allowed outcomes of calls meanwhile, are for the pure tests"
)]
mod clusters;
mod conntrack;
mod exclusion;
mod fixture;
mod grace;
mod health;
mod kinds;
mod lifecycle;
mod matrix;
mod multipath;
mod nftables;
mod packets;
mod records;
mod refusals;
mod slots;
mod stale;
mod verifier;
