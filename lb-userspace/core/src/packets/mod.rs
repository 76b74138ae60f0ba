//! What reaches no hook is served as packets, by nftables: the rules as values, and the changes between them.
//!
//! # Purpose
//!
//! Sockets outside of the cgroup, pods in virtual machines, other hosts and SCTP call service addresses that
//! no hook sees. [`Rules`] computes the tables `ip socklb` and `ip6 socklb` from the same desired state that
//! the BPF maps follow, and the transaction of each change. `lb_kernel::nftables` executes it.
//!
//! # Structure
//!
//! Services lie in sets and maps of data, and chains depend on few of their properties. A change of a
//! service's endpoints adds and deletes elements of data only: the kernel then checks no chain, as it does
//! for verdicts, so that the cost does not grow with the number of services. `skeleton` has the layout.
//!
//! # Invariants
//!
//! - The tables depend on the desired state alone, not on its history.
//! - A transaction that [`diff`] computes turns the one table into the other, at once.

pub mod conntrack;
pub mod diff;
pub mod nft;
mod rules;
pub mod sim;
mod skeleton;

use self::nft::{Family, TableId};
pub use self::{
    diff::diff,
    rules::{Rules, Site, Stale, frontends_of},
    skeleton::Reason,
};

/// The maps in which rules record the endpoint of each client.
pub const AFFINITY_MAPS: [&str; 2] = ["affinity", "nodeport-affinity"];

/// The tables: `ip socklb` and `ip6 socklb`.
#[must_use]
pub fn table_ids() -> [TableId; 2] {
    [Family::V4, Family::V6].map(table_id)
}

fn table_id(family: Family) -> TableId {
    TableId { family, name: "socklb".into() }
}
