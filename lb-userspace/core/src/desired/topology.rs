//! This node's place in the cluster: its zone and addresses, and the other nodes' addresses.
//! [`super::endpoints`] applies topology hints.
//!
//! # Invariants
//!
//! - Each address belongs to one node: to this node if it has it, else to the node whose name sorts first.
//! - At most [`MAX_NODE_ADDRS`] addresses count: this node's first, then the first of each other node, the
//!   second of each, and so on.
//! - Loopback addresses are in neither set: [`lb_common::resolve::Caller::loopback_is_node`] decides about
//!   them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use lb_common::limits::MAX_NODE_ADDRS;

use super::{NodePortAddresses, Settings};
use crate::model::{Cidr, Family, Node, address};

/// The state outside of a service that its frontends depend on.
///
/// Equal topologies give equal frontends: a Node's change that leaves the topology equal needs no further
/// work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    node_name: Arc<str>,
    zone: Option<Arc<str>>,
    own: BTreeSet<IpAddr>,
    interfaces: BTreeSet<IpAddr>,
    pods: BTreeSet<Cidr>,
    others: BTreeMap<IpAddr, Arc<str>>,
    addresses_of_others: BTreeMap<Arc<str>, Vec<IpAddr>>,
    /// Nodes with addresses beyond the limit, and how many.
    left_out: BTreeMap<Arc<str>, usize>,
}

impl Topology {
    /// Builds the topology of the node that `settings` names.
    ///
    /// `interfaces` are the current addresses of the node's network interfaces; [`NodePortAddresses`] selects
    /// from them and from the addresses of the Node (`pkg/proxy/util/nodeport_addresses.go`). Without a Node
    /// there is no zone, and `Primary` accepts no address. The other nodes are assumed to have the same
    /// settings.
    #[must_use]
    pub fn new<'a>(
        nodes: impl IntoIterator<Item = &'a Node>,
        settings: &Settings,
        interfaces: &[IpAddr],
    ) -> Self {
        let (own_nodes, other_nodes): (Vec<_>, Vec<_>) =
            nodes.into_iter().partition(|node| node.name == settings.node_name);
        let own_node = own_nodes.first();
        let listed = own_node.map_or(&[][..], |node| &node.addresses);
        let mut left_out = BTreeMap::new();
        let mut own = BTreeSet::new();
        for ip in accepted(&settings.node_port_addresses, listed, interfaces) {
            if own.len() < MAX_NODE_ADDRS as usize || own.contains(&ip) {
                own.insert(ip);
            } else {
                *left_out.entry(settings.node_name.clone()).or_default() += 1;
            }
        }

        let (mut others, mut addresses_of_others) = (BTreeMap::new(), BTreeMap::new());
        // Sorted: the result must not depend on the order of the nodes.
        let other_nodes: BTreeMap<_, _> = other_nodes.into_iter().map(|node| (&node.name, node)).collect();
        for (name, node) in other_nodes {
            let mut addresses = Vec::new();
            for ip in accepted(&settings.node_port_addresses, &node.addresses, &[]) {
                if !own.contains(&ip) && !others.contains_key(&ip) {
                    others.insert(ip, name.clone());
                    addresses.push(ip);
                }
            }
            addresses_of_others.insert(name.clone(), addresses);
        }
        let wanted: Vec<usize> = addresses_of_others.values().map(Vec::len).collect();
        let shares = shares(&wanted, MAX_NODE_ADDRS as usize - own.len());
        for ((name, addresses), share) in addresses_of_others.iter_mut().zip(shares) {
            let without_room = addresses.split_off(share);
            if !without_room.is_empty() {
                left_out.insert(name.clone(), without_room.len());
            }
            for ip in without_room {
                others.remove(&ip);
            }
        }
        Self {
            node_name: settings.node_name.clone(),
            zone: own_node.and_then(|node| node.zone.clone()),
            own,
            interfaces: interfaces.iter().copied().filter(|ip| is_node_address(*ip)).collect(),
            pods: own_node.iter().flat_map(|node| &node.pod_cidrs).copied().collect(),
            others,
            addresses_of_others,
            left_out,
        }
    }

    /// The nodes with addresses that do not fit into `node_addrs`, and how many. Node ports do not answer on
    /// these.
    pub fn left_out(&self) -> impl Iterator<Item = (&str, usize)> {
        self.left_out.iter().map(|(node, n)| (&**node, *n))
    }

    /// The node that an address belongs to, if node ports answer on it.
    #[must_use]
    pub fn node_of(&self, ip: IpAddr) -> Option<&str> {
        let other = || self.others.get(&ip).map(|node| &**node);
        if self.own.contains(&ip) { Some(&self.node_name) } else { other() }
    }

    /// Name of this node.
    #[must_use]
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// Zone of this node.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// This node's addresses that accept node ports.
    #[must_use]
    pub const fn own_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.own
    }

    /// Whether an interface of this node has this address.
    #[must_use]
    pub fn is_on_interface(&self, ip: IpAddr) -> bool {
        self.interfaces.contains(&ip)
    }

    /// The networks of this node's pods, by its Node object.
    #[must_use]
    pub const fn pods(&self) -> &BTreeSet<Cidr> {
        &self.pods
    }

    /// The addresses of another node that accept node ports; empty for this node and for an unknown one.
    #[must_use]
    pub fn addresses_of(&self, other_node: &str) -> &[IpAddr] {
        self.addresses_of_others.get(other_node).map_or(&[], Vec::as_slice)
    }

    /// Names of the other nodes, in order.
    #[must_use]
    pub fn other_nodes(&self) -> impl ExactSizeIterator<Item = &str> {
        self.addresses_of_others.keys().map(|name| &**name)
    }

    /// The addresses of all other nodes, each with the node's name.
    pub fn other_addresses(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        self.others.iter().map(|(ip, node)| (*ip, &**node))
    }

    /// Whether node ports answer on an address, of this node or another.
    #[must_use]
    pub fn is_node_address(&self, ip: IpAddr) -> bool {
        self.own.contains(&ip) || self.others.contains_key(&ip)
    }

    /// All addresses on which node ports answer, with whether each is this node's: the content of
    /// `node_addrs`.
    #[must_use]
    pub fn node_addresses(&self) -> BTreeMap<IpAddr, bool> {
        let others = self.others.keys().map(|ip| (*ip, false));
        others.chain(self.own.iter().map(|ip| (*ip, true))).collect()
    }
}

/// Splits `room` evenly: no share exceeds another by more than 1, except where less is wanted.
fn shares(wanted: &[usize], room: usize) -> Vec<usize> {
    let n_within = |most: usize| wanted.iter().map(|n| *n.min(&most)).sum::<usize>();
    let highest = wanted.iter().copied().max().unwrap_or_default();
    // The largest equal share; the remainder goes to the first ones, one each.
    let (mut all, mut too_many) = (0, highest + 1);
    while too_many - all > 1 {
        let middle = all.midpoint(too_many);
        if n_within(middle) <= room { all = middle } else { too_many = middle }
    }
    let mut rest = room - n_within(all);
    let share = |n: &usize| {
        let has_more = *n > all && rest > 0;
        rest -= usize::from(has_more);
        all.min(*n) + usize::from(has_more)
    };
    wanted.iter().map(share).collect()
}

/// The addresses of one node that accept node ports.
///
/// `listed` are the addresses of the Node in order of preference. They count as well as those of the
/// interfaces, because a cloud's external address reaches the node's ports without being on an interface.
fn accepted(
    setting: &NodePortAddresses,
    listed: &[IpAddr],
    interfaces: &[IpAddr],
) -> impl Iterator<Item = IpAddr> {
    let all = || interfaces.iter().chain(listed).copied().filter(|ip| is_node_address(*ip));
    let primary_of = |family| listed.iter().copied().find(move |ip| address::family(*ip) == family);
    let primary =
        || [Family::V4, Family::V6].into_iter().filter_map(primary_of).filter(|ip| is_node_address(*ip));
    let accepted: Vec<IpAddr> = match setting {
        NodePortAddresses::All => all().collect(),
        NodePortAddresses::Primary => primary().collect(),
        NodePortAddresses::Listed { primary: has_primary, networks } => {
            let within = all().filter(|ip| networks.iter().any(|network| network.contains(*ip)));
            primary().filter(|_| *has_primary).chain(within).collect()
        }
        NodePortAddresses::Within(networks) => all()
            .filter(|ip| {
                let mut of_family =
                    networks.iter().filter(|network| network.family() == address::family(*ip));
                let no_network = of_family.clone().next().is_none();
                no_network || of_family.any(|network| network.contains(*ip))
            })
            .collect(),
    };
    accepted.into_iter()
}

/// Whether an address can identify a node. A link-local IPv6 address cannot: it is ambiguous between links.
fn is_node_address(ip: IpAddr) -> bool {
    let is_link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !(ip.is_loopback() || ip.is_unspecified() || is_link_local)
}

#[cfg(test)]
mod tests;
