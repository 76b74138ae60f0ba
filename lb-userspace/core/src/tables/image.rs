//! The content of the maps, as a value.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use imbl::OrdMap;
use lb_common::{
    layout::{self, Frontend, Run},
    limits,
};

use super::run::{Entry, StoredRun};
use crate::{
    desired::FrontendAddress,
    model::{Cidr, Protocol},
};

/// The endpoint table of one family: runs by offset.
pub type Runs = OrdMap<u32, StoredRun>;

/// A table of addresses, each with a flag.
pub type Addresses = OrdMap<IpAddr, bool>;

/// What user space writes to the maps and calls depend on. Affinity, records and counters belong to the
/// programs.
///
/// A clone costs a few references and shares what neither side changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// `services4` and `services6`: frontend address → frontend id.
    pub services: OrdMap<FrontendAddress, u32>,
    /// `frontends`, the entries in use.
    pub frontends: OrdMap<u32, Frontend>,
    /// `endpoints4`, the runs in use.
    pub runs4: Runs,
    /// `endpoints6`, the runs in use.
    pub runs6: Runs,
    /// `node_addrs`: address → whether it is this node's.
    pub node_addrs: Addresses,
    /// `cluster_ips`: address → whether undefined ports are refused.
    pub cluster_ips: Addresses,
    /// `service_cidrs`: the service networks, at most [`limits::MAX_SERVICE_CIDRS`] of each family.
    pub service_cidrs: Vec<Cidr>,
}

/// The name of a table of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressTable {
    /// `node_addrs`
    Nodes,
    /// `cluster_ips`
    ClusterIps,
}

impl AddressTable {
    /// All.
    pub const ALL: [Self; 2] = [Self::Nodes, Self::ClusterIps];

    /// The name of the map.
    #[must_use]
    pub const fn map(self) -> &'static str {
        match self {
            Self::Nodes => "node_addrs",
            Self::ClusterIps => "cluster_ips",
        }
    }

    /// The map's capacity, entries.
    #[must_use]
    pub const fn capacity(self) -> u32 {
        match self {
            Self::Nodes => limits::MAX_NODE_ADDRS,
            Self::ClusterIps => limits::MAX_CLUSTER_IPS,
        }
    }
}

impl Image {
    /// A table of addresses.
    #[must_use]
    pub fn addresses(&self, table: AddressTable) -> &Addresses {
        match table {
            AddressTable::Nodes => &self.node_addrs,
            AddressTable::ClusterIps => &self.cluster_ips,
        }
    }

    /// A table of addresses, for changes.
    pub fn addresses_mut(&mut self, table: AddressTable) -> &mut Addresses {
        match table {
            AddressTable::Nodes => &mut self.node_addrs,
            AddressTable::ClusterIps => &mut self.cluster_ips,
        }
    }

    /// The endpoint table of a family.
    #[must_use]
    pub fn runs(&self, ipv6: bool) -> &Runs {
        if ipv6 { &self.runs6 } else { &self.runs4 }
    }

    /// The endpoint table of a family, for changes.
    pub fn runs_mut(&mut self, ipv6: bool) -> &mut Runs {
        if ipv6 { &mut self.runs6 } else { &mut self.runs4 }
    }

    /// The endpoints of the frontend at an address; empty without a frontend.
    #[must_use]
    pub fn entries_at(&self, address: FrontendAddress) -> &[Entry] {
        self.stored_at(address).map(StoredRun::endpoints).unwrap_or_default()
    }

    /// The run of the frontend at an address; `None` without a frontend or endpoints.
    #[must_use]
    pub fn stored_at(&self, address: FrontendAddress) -> Option<&StoredRun> {
        let frontend = self.services.get(&address).and_then(|id| self.frontends.get(id))?;
        self.stored(address.ip.is_ipv6(), frontend.run)
    }

    /// The endpoints of a run; `None` if the table holds no such run, an empty slice for an empty run.
    #[must_use]
    pub fn entries(&self, ipv6: bool, run: Run) -> Option<&[Entry]> {
        if run.len == 0 {
            return Some(&[]);
        }
        self.stored(ipv6, run).map(StoredRun::endpoints)
    }

    /// A run that is not empty; `None` if the table holds no such run.
    #[must_use]
    pub fn stored(&self, ipv6: bool, run: Run) -> Option<&StoredRun> {
        self.runs(ipv6).get(&run.offset).filter(|stored| stored.at(run.offset) == run)
    }

    /// The entry at an index of a family's endpoint table.
    #[must_use]
    pub fn entry(&self, ipv6: bool, index: u32) -> Option<Entry> {
        let (offset, run) = self.runs(ipv6).range(..=index).next_back()?;
        run.entries().get(usize::try_from(index - offset).ok()?).copied()
    }

    /// Every endpoint of both families that a call may reach, with repetitions.
    pub fn reachable(&self) -> impl Iterator<Item = &Entry> {
        self.runs4.values().chain(self.runs6.values()).flat_map(StoredRun::reachable)
    }
}

/// The unspecified address of a family.
pub(super) const fn unspecified(ipv6: bool) -> IpAddr {
    if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) }
}

/// The protocol number in map keys; `None` for SCTP, which no hook serves.
#[must_use]
pub fn wire_protocol(protocol: Protocol) -> Option<layout::Protocol> {
    (protocol != Protocol::Sctp).then(|| layout::Protocol(protocol.number()))
}
