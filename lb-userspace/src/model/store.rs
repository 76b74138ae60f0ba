//! What the cluster holds at the moment.
//!
//! # Purpose
//!
//! [`Store`] keeps the latest version of each object and says what a change may affect, as [`Changes`].
//!
//! # Invariants
//!
//! - Objects may arrive in any order: slices before their service, a service before its slices.
//! - An object that equals the one held causes no change.
//! - A re-list (`replace_*`) removes what it does not name: deletions that a watch missed are not lost.
//! - State is kept for each slice, so that an endpoint held by two slices stays when one of them goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
};

use super::{Node, Service, ServiceKey, Slice, SliceKey};

/// What a change of the [`Store`] may affect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a change that nobody computes never reaches the tables"]
pub struct Changes {
    /// Services whose own object or slices changed. A key may name a service that the store does not hold.
    pub services: BTreeSet<ServiceKey>,
    /// Whether a Node changed. Most such changes do not change the [`crate::desired::Topology`]: compare it.
    pub topology: bool,
}

impl Changes {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.topology
    }

    /// Adds what another change affects.
    pub fn merge(&mut self, mut other: Self) {
        self.services.append(&mut other.services);
        self.topology |= other.topology;
    }

    fn service(key: ServiceKey) -> Self {
        Self { services: BTreeSet::from([key]), topology: false }
    }
}

/// Services, slices and nodes, each in its latest version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    services: BTreeMap<ServiceKey, Service>,
    slices: BTreeMap<ServiceKey, BTreeMap<Arc<str>, Slice>>,
    /// The service that holds each slice: a deletion names only the slice, and its label may change.
    services_of_slices: BTreeMap<SliceKey, ServiceKey>,
    nodes: BTreeMap<Arc<str>, Node>,
}

impl Store {
    /// A store without objects.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets or, with `None`, removes a service.
    ///
    /// `None` is also what an object gives that stopped being served, such as one that became headless.
    pub fn set_service(&mut self, key: &ServiceKey, service: Option<Service>) -> Changes {
        if self.services.get(key) == service.as_ref() {
            return Changes::default();
        }
        match service {
            Some(service) => drop(self.services.insert(key.clone(), service)),
            None => drop(self.services.remove(key)),
        }
        Changes::service(key.clone())
    }

    /// Sets or, with `None`, removes a slice. A slice whose service label changed affects both services.
    ///
    /// A slice that differs in nothing but its trigger time is kept and affects no service.
    pub fn set_slice(&mut self, key: &SliceKey, slice: Option<Slice>) -> Changes {
        let mut changes = Changes::default();
        let old_service = self.services_of_slices.get(key);
        if let Some(old_service) = old_service
            && slice.as_ref().is_none_or(|slice| slice.service != *old_service)
        {
            let old_service = old_service.clone();
            self.remove_slice(&old_service, key);
            changes.services.insert(old_service);
        }
        let Some(slice) = slice else {
            return changes;
        };
        let service = slice.service.clone();
        let slices = self.slices.entry(service.clone()).or_default();
        let is_same = slices.get(&key.name).is_some_and(|old| {
            (old.ipv6, &old.ports, &old.endpoints) == (slice.ipv6, &slice.ports, &slice.endpoints)
        });
        slices.insert(key.name.clone(), slice);
        if !is_same {
            changes.services.insert(service.clone());
        }
        self.services_of_slices.insert(key.clone(), service);
        changes
    }

    /// Sets or, with `None`, removes a node.
    pub fn set_node(&mut self, name: &str, node: Option<Node>) -> Changes {
        if self.nodes.get(name) == node.as_ref() {
            return Changes::default();
        }
        match node {
            Some(node) => drop(self.nodes.insert(name.into(), node)),
            None => drop(self.nodes.remove(name)),
        }
        Changes { topology: true, ..Changes::default() }
    }

    /// Makes these the only services.
    pub fn replace_services(&mut self, services: impl IntoIterator<Item = Service>) -> Changes {
        let services: BTreeMap<_, _> =
            services.into_iter().map(|service| (service.key.clone(), service)).collect();
        let old = mem::take(&mut self.services);
        let removed = old.keys().filter(|key| !services.contains_key(*key));
        let set = services.iter().filter(|(key, service)| old.get(key) != Some(service)).map(|(key, _)| key);
        let changes = Changes { services: removed.chain(set).cloned().collect(), topology: false };
        self.services = services;
        changes
    }

    /// Makes these the only slices.
    pub fn replace_slices(&mut self, slices: impl IntoIterator<Item = Slice>) -> Changes {
        let slices: BTreeMap<_, _> = slices.into_iter().map(|slice| (slice.key(), slice)).collect();
        let removed: Vec<_> =
            self.services_of_slices.keys().filter(|key| !slices.contains_key(*key)).cloned().collect();
        let mut changes = Changes::default();
        for key in removed {
            changes.merge(self.set_slice(&key, None));
        }
        for (key, slice) in slices {
            changes.merge(self.set_slice(&key, Some(slice)));
        }
        changes
    }

    /// Makes these the only nodes.
    pub fn replace_nodes(&mut self, nodes: impl IntoIterator<Item = Node>) -> Changes {
        let nodes: BTreeMap<_, _> = nodes.into_iter().map(|node| (node.name.clone(), node)).collect();
        let topology = nodes != self.nodes;
        self.nodes = nodes;
        Changes { topology, ..Changes::default() }
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// All services, in the order of their keys.
    #[must_use]
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Service> {
        self.services.values()
    }

    /// The slices of a service, in the order of their names. The service itself may be absent.
    pub fn slices_of(&self, key: &ServiceKey) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(key).into_iter().flat_map(BTreeMap::values)
    }

    /// All slices, in the order of their services' keys.
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.slices.values().flat_map(BTreeMap::values)
    }

    /// A node by its name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All nodes, in the order of their names.
    #[must_use]
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &Node> {
        self.nodes.values()
    }

    fn remove_slice(&mut self, service: &ServiceKey, key: &SliceKey) {
        self.services_of_slices.remove(key);
        if let Some(slices) = self.slices.get_mut(service) {
            slices.remove(&key.name);
            if slices.is_empty() {
                self.slices.remove(service);
            }
        }
    }
}

#[cfg(test)]
mod tests;
