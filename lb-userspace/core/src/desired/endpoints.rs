//! The endpoints of a service port, and those that a call may reach: readiness, policies, topology hints.
//!
//! # Purpose
//!
//! [`PortEndpoints`] is the union of all slices for one service port. [`PortEndpoints::classify`] applies the
//! rules of `pkg/proxy/topology.go` to it. The sets for the tables and the output of `socklb explain` come
//! from this one function, so they always agree.
//!
//! # Invariants
//!
//! - The result does not depend on the number, the names or the order of the slices.
//! - A set is sorted and has no duplicates: an unchanged set compares equal.
//! - Only endpoints that are ready, or serving while terminating, are used (KEP-1669).

use std::{collections::BTreeMap, fmt, net::SocketAddr, sync::Arc};

use super::{PortKey, Topology, slow_start::Ramp};
use crate::model::{Family, Protocol, ServicePort, Slice, SliceEndpoint, Store, annotation::DEFAULT_WEIGHT};

/// The callers that a set of endpoints is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope<'a> {
    /// Calls that may go to any node: topology hints apply.
    Cluster,
    /// Calls limited to one node's endpoints (policy `Local`): topology hints do not apply.
    Node(&'a str),
}

/// The endpoints of one service port in one family, usable or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortEndpoints<'a> {
    known: BTreeMap<SocketAddr, &'a SliceEndpoint>,
}

/// Why an endpoint is not in a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// It is neither ready nor terminating.
    NotReady,
    /// Its weight is 0.
    NoWeight,
    /// It serves while terminating, but others are ready.
    Terminating,
    /// It terminates and no longer serves.
    NotServing,
    /// The policy is Local, and it is on another or an unknown node.
    OtherNode,
    /// All ready endpoints have node hints, and its hints do not name this node.
    HintedToOtherNodes,
    /// All ready endpoints have zone hints, and its hints do not name this zone.
    HintedToOtherZones,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::NoWeight => "weight 0",
            Self::Terminating => "terminating, and others are ready",
            Self::NotServing => "terminating and not serving",
            Self::OtherNode => "on another node, and the policy is Local",
            Self::HintedToOtherNodes => "hinted to other nodes",
            Self::HintedToOtherZones => "hinted to other zones",
        })
    }
}

/// Which hints limit the cluster set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hints<'a> {
    Ignored,
    SameNode(&'a str),
    SameZone(&'a str),
}

/// The slices of one service and family by port name, so that one pass over them serves all ports.
#[derive(Debug)]
pub struct SlicePorts<'a>(BTreeMap<(&'a str, Protocol), Vec<PortOfSlice<'a>>>);

/// A port number, and the endpoints that have it.
type PortOfSlice<'a> = (u16, &'a [SliceEndpoint]);

impl<'a> SlicePorts<'a> {
    /// Groups the slices of `family` by port.
    #[must_use]
    pub fn new(family: Family, slices: impl IntoIterator<Item = &'a Slice>) -> Self {
        let mut ports = BTreeMap::<_, Vec<_>>::new();
        for slice in slices.into_iter().filter(|slice| slice.family() == family) {
            for port in &slice.ports {
                ports.entry((&*port.name, port.protocol)).or_default().push((port.port, &*slice.endpoints));
            }
        }
        Self(ports)
    }

    /// Entries of the slices for a port, duplicates included: an upper bound of its endpoints.
    #[must_use]
    pub fn n_entries(&self, port: &ServicePort) -> usize {
        self.of(port).iter().map(|(_, endpoints)| endpoints.len()).sum()
    }

    /// [`PortEndpoints::new`] for one of the service's ports.
    #[must_use]
    pub fn endpoints_of<'s>(&'s self, port: &'s ServicePort) -> PortEndpoints<'s> {
        PortEndpoints::unite(self.of(port).iter().copied())
    }

    fn of<'s>(&'s self, port: &'s ServicePort) -> &'s [PortOfSlice<'s>] {
        self.0.get(&(&*port.name, port.protocol)).map_or(&[], Vec::as_slice)
    }
}

impl<'a> PortEndpoints<'a> {
    /// Unites the slices of a service for one port; for all ports use [`SlicePorts`].
    ///
    /// A slice port matches by name and protocol; its number may differ between slices. An address in several
    /// slices counts once, with its most usable entry. Upstream requires only that a terminating entry never
    /// replaces another; a total order makes the result independent of the order of slices.
    #[must_use]
    pub fn new(port: &ServicePort, family: Family, slices: impl IntoIterator<Item = &'a Slice>) -> Self {
        let slices = slices.into_iter().filter(|slice| slice.family() == family);
        Self::unite(slices.flat_map(|slice| {
            let matching = slice
                .ports
                .iter()
                .filter(|candidate| candidate.name == port.name && candidate.protocol == port.protocol);
            matching.map(|candidate| (candidate.port, &*slice.endpoints))
        }))
    }

    /// [`Self::new`] by the objects of a store; without endpoints if there is no such port.
    #[must_use]
    pub fn of_port(store: &'a Store, key: &PortKey) -> Self {
        let service = store.service(&key.service);
        let port = service.and_then(|service| service.port(&key.port_name, key.protocol));
        let family = if key.ipv6 { Family::V6 } else { Family::V4 };
        port.map(|port| Self::new(port, family, store.slices_of(&key.service))).unwrap_or_default()
    }

    fn unite(ports: impl Iterator<Item = PortOfSlice<'a>>) -> Self {
        let mut known = BTreeMap::new();
        for (port, endpoints) in ports {
            for endpoint in endpoints {
                known
                    .entry(SocketAddr::new(endpoint.address, port))
                    .and_modify(|standing: &mut &SliceEndpoint| {
                        if usability(endpoint) > usability(standing) {
                            *standing = endpoint;
                        }
                    })
                    .or_insert(endpoint);
            }
        }
        Self { known }
    }

    /// All known endpoints in the order of addresses, each with the reason if it is not in the set for
    /// `scope`.
    pub fn classify(
        &self,
        scope: Scope<'_>,
        topology: &Topology,
    ) -> impl Iterator<Item = (SocketAddr, &'a SliceEndpoint, Option<LeftOut>)> {
        let hints = if scope == Scope::Cluster { self.hints(topology) } else { Hints::Ignored };
        let first_choice = |endpoint: &SliceEndpoint| {
            endpoint.takes_calls() && is_in(scope, endpoint) && hints.admit(endpoint)
        };
        let any_first_choice = self.known.values().any(|endpoint| first_choice(endpoint));
        self.known.iter().map(move |(address, endpoint)| {
            let reason = if !is_in(scope, endpoint) {
                Some(LeftOut::OtherNode)
            } else if endpoint.weight == 0 {
                Some(LeftOut::NoWeight)
            } else if endpoint.ready {
                // `hints` admit at least one ready endpoint, or they are ignored.
                hints.refusal(endpoint)
            } else if !endpoint.terminating {
                Some(LeftOut::NotReady)
            } else if !endpoint.serving {
                Some(LeftOut::NotServing)
            } else if any_first_choice {
                Some(LeftOut::Terminating)
            } else {
                None
            };
            (*address, *endpoint, reason)
        })
    }

    /// The endpoints that a call in `scope` may reach: the ready ones, or else those that serve while
    /// terminating.
    #[must_use]
    pub fn set(&self, scope: Scope<'_>, topology: &Topology) -> Arc<[SocketAddr]> {
        self.classify(scope, topology)
            .filter(|(_, _, left_out)| left_out.is_none())
            .map(|(address, ..)| address)
            .collect()
    }

    /// The endpoints that take calls.
    pub fn taking_calls(&self) -> impl Iterator<Item = SocketAddr> {
        self.known.iter().filter(|(_, endpoint)| endpoint.takes_calls()).map(|(address, _)| *address)
    }

    /// Where calls of the cluster set go while all of it is ejected: the ready endpoints that topology hints
    /// leave out.
    #[must_use]
    pub fn spill(&self, topology: &Topology) -> Arc<[SocketAddr]> {
        let hints = self.hints(topology);
        let left_out =
            self.known.iter().filter(|(_, endpoint)| endpoint.takes_calls() && !hints.admit(endpoint));
        let mut addresses = left_out.map(|(address, _)| *address).peekable();
        // The usual case shares one allocation.
        if addresses.peek().is_none() { Arc::default() } else { addresses.collect() }
    }

    /// [`Frontend::shares`](super::Frontend::shares) of a set of these endpoints.
    #[must_use]
    pub fn shares(&self, set: &[SocketAddr], ramp: &Ramp) -> Option<Arc<[u8]>> {
        let mut all = self.known.values().map(|endpoint| endpoint.weight);
        let first = all.next()?;
        // Nearly every Service: no allocation.
        if !ramp.is_growing() && all.all(|weight| weight == first) {
            return None;
        }
        let weight = |address| self.known.get(address).map_or(DEFAULT_WEIGHT, |endpoint| endpoint.weight);
        let weights: Vec<u64> = set.iter().map(|address| ramp.weigh(address, weight(address))).collect();
        shares(&weights)
    }

    /// Whether a socket may stay connected to an endpoint (semantics R10): the endpoint serves, even if new
    /// calls do not reach it. While no endpoint of the port serves, all listed ones keep their sockets.
    #[must_use]
    pub fn keeps_sockets(&self, address: &SocketAddr) -> bool {
        // With `publishNotReadyAddresses` an endpoint may be ready without serving: calls go there.
        let serves = |endpoint: &SliceEndpoint| endpoint.ready || endpoint.serving;
        self.known
            .get(address)
            .is_some_and(|endpoint| serves(endpoint) || !self.known.values().any(|other| serves(other)))
    }

    /// The endpoints by node, so that one pass gives the sets of all nodes.
    #[must_use]
    pub fn by_node(&self) -> BTreeMap<&'a str, Self> {
        let mut nodes = BTreeMap::<_, Self>::new();
        for (address, endpoint) in &self.known {
            if let Some(node) = endpoint.node() {
                nodes.entry(node).or_default().known.insert(*address, endpoint);
            }
        }
        nodes
    }

    /// `topologyModeFromHints` of `pkg/proxy/topology.go`: hints apply only if every ready endpoint has one
    /// and at least one names this node, or else this zone.
    fn hints<'t>(&self, topology: &'t Topology) -> Hints<'t> {
        let ready = || self.known.values().filter(|endpoint| endpoint.takes_calls());
        let limit = |hints: Hints<'t>, has_hint: fn(&SliceEndpoint) -> bool| {
            let counts =
                ready().all(|endpoint| has_hint(endpoint)) && ready().any(|endpoint| hints.admit(endpoint));
            counts.then_some(hints)
        };
        limit(Hints::SameNode(topology.node_name()), |endpoint| !endpoint.hint_nodes().is_empty())
            .or_else(|| {
                limit(Hints::SameZone(topology.zone()?), |endpoint| !endpoint.hint_zones().is_empty())
            })
            .unwrap_or(Hints::Ignored)
    }
}

impl Hints<'_> {
    fn admit(self, endpoint: &SliceEndpoint) -> bool {
        self.refusal(endpoint).is_none()
    }

    fn refusal(self, endpoint: &SliceEndpoint) -> Option<LeftOut> {
        match self {
            Self::Ignored => None,
            Self::SameNode(node) => (!endpoint.hint_nodes().iter().any(|hint| **hint == *node))
                .then_some(LeftOut::HintedToOtherNodes),
            Self::SameZone(zone) => (!endpoint.hint_zones().iter().any(|hint| **hint == *zone))
                .then_some(LeftOut::HintedToOtherZones),
        }
    }
}

fn is_in(scope: Scope<'_>, endpoint: &SliceEndpoint) -> bool {
    match scope {
        Scope::Cluster => true,
        Scope::Node(name) => endpoint.node() == Some(name),
    }
}

/// Weights scaled so that the largest is 255 and none is less than 1; `None` if all are equal.
fn shares(weights: &[u64]) -> Option<Arc<[u8]>> {
    let largest = *weights.iter().max()?;
    let share = |weight: &u64| {
        let scaled = (weight * u64::from(u8::MAX) + largest / 2).checked_div(largest);
        scaled.and_then(|share| u8::try_from(share).ok()).unwrap_or(u8::MAX).max(1)
    };
    weights.iter().any(|weight| share(weight) < u8::MAX).then(|| weights.iter().map(share).collect())
}

/// A total order of the entries for one address; the greatest one is used.
fn usability(endpoint: &SliceEndpoint) -> impl Ord {
    (
        !endpoint.terminating,
        endpoint.ready,
        endpoint.serving,
        endpoint.node(),
        endpoint.zone(),
        endpoint.hint_nodes(),
        endpoint.hint_zones(),
        endpoint.weight,
    )
}

#[cfg(test)]
mod tests;
