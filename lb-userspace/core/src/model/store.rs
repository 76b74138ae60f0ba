//! The current objects of the cluster.
//!
//! # Purpose
//!
//! [`Store`] keeps the latest version of each object and returns what a change may affect, as [`Changes`].
//!
//! # Invariants
//!
//! - Objects may arrive in any order: slices before their service, a service before its slices.
//! - An object that equals the stored one causes no change.
//! - A re-list (`replace_*`) removes what it does not name, so it makes up for deletions that a watch missed.
//! - Slices are stored separately, so an endpoint of two slices stays when one of them is deleted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use imbl::{OrdMap, OrdSet};

use super::{Node, Placement, Service, ServiceCidr, ServiceKey, Slice, SliceKey, Unselected};

/// Values that many objects share: names of namespaces and ports, placements of endpoints. Each is stored
/// once.
#[derive(Debug)]
struct Pool<T: ?Sized + Ord> {
    known: OrdSet<Arc<T>>,
    /// How many remained after the last removal of unused ones.
    n_kept: usize,
}

impl<T: ?Sized + Ord> Default for Pool<T> {
    fn default() -> Self {
        Self { known: OrdSet::new(), n_kept: 0 }
    }
}

impl<T: ?Sized + Ord> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self { known: self.known.clone(), n_kept: self.n_kept }
    }
}

/// Sharing does not count when stores are compared.
impl<T: ?Sized + Ord> PartialEq for Pool<T> {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl<T: ?Sized + Ord> Eq for Pool<T> {}

impl<T: ?Sized + Ord> Pool<T> {
    /// Below this number, unused ones are not removed.
    const FEW: usize = 4096;

    fn share(&mut self, value: &mut Arc<T>) {
        if let Some(known) = self.known.get(value) {
            *value = Arc::clone(known);
            return;
        }
        // Only when their number has doubled, so that the cost per new value is constant.
        if self.known.len() > Self::FEW.max(2 * self.n_kept) {
            self.known = self.known.iter().filter(|value| Arc::strong_count(value) > 1).cloned().collect();
            self.n_kept = self.known.len();
        }
        self.known.insert(Arc::clone(value));
    }
}

/// What a change of the [`Store`] may affect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a change reaches the tables only if a sync computes it"]
pub struct Changes {
    /// Services whose own object or slices changed. A key may name a service that the store does not hold.
    pub services: BTreeSet<ServiceKey>,
    /// Whether a Node or a ServiceCIDR changed. Most such changes leave the [`crate::desired::Topology`] and
    /// the service networks as they are: compare them.
    pub topology: bool,
}

impl Changes {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.topology
    }

    /// Adds what another change affects.
    pub fn merge(&mut self, other: Self) {
        // `append` would rebuild the whole set even for one key.
        self.services.extend(other.services);
        self.topology |= other.topology;
    }

    fn service(key: ServiceKey) -> Self {
        Self { services: BTreeSet::from([key]), topology: false }
    }
}

/// Services, slices, nodes and ServiceCIDRs, each in its latest version.
///
/// A clone costs a few references and shares what neither side changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    services: OrdMap<ServiceKey, Arc<Service>>,
    /// The slices of each service in the order of their names. Nearly every service has one slice, for which
    /// a map would take 300 octets.
    slices: OrdMap<ServiceKey, Vec<Arc<Slice>>>,
    /// The service of each slice: a deletion names only the slice, and the label may change.
    services_of_slices: OrdMap<SliceKey, ServiceKey>,
    nodes: OrdMap<Arc<str>, Arc<Node>>,
    service_cidrs: OrdMap<Arc<str>, Arc<ServiceCidr>>,
    texts: Pool<str>,
    placements: Pool<Placement>,
}

impl Store {
    /// A store without objects.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets or, with `None`, removes a service.
    ///
    /// Pass `None` also for an object that is no longer served, such as one that became headless.
    pub fn set_service(&mut self, key: &ServiceKey, service: Option<Service>) -> Changes {
        if self.services.get(key).map(Arc::as_ref) == service.as_ref() {
            return Changes::default();
        }
        match service {
            Some(mut service) => {
                self.share_service(&mut service);
                let key = if service.key == *key { service.key.clone() } else { key.clone() };
                self.services.insert(key, service.into());
            }
            None => drop(self.services.remove(key)),
        }
        Changes::service(key.clone())
    }

    /// Sets or, with `None`, removes a slice. A slice whose service label changed affects both services.
    ///
    /// A slice that differs only in its trigger time is stored but affects no service.
    pub fn set_slice(&mut self, key: &SliceKey, slice: Option<Slice>) -> Changes {
        let slice = slice.map(|mut slice| {
            self.share_slice(&mut slice);
            Arc::new(slice)
        });
        self.set_shared_slice(key, slice)
    }

    /// Sets or, with `None`, removes a node.
    pub fn set_node(&mut self, name: &str, node: Option<Node>) -> Changes {
        if self.nodes.get(name).map(Arc::as_ref) == node.as_ref() {
            return Changes::default();
        }
        match node {
            Some(node) => drop(self.nodes.insert(name.into(), node.into())),
            None => drop(self.nodes.remove(name)),
        }
        Changes { topology: true, ..Changes::default() }
    }

    /// Sets or, with `None`, removes a ServiceCIDR.
    pub fn set_service_cidr(&mut self, name: &str, service_cidr: Option<ServiceCidr>) -> Changes {
        if self.service_cidrs.get(name).map(Arc::as_ref) == service_cidr.as_ref() {
            return Changes::default();
        }
        match service_cidr {
            Some(service_cidr) => drop(self.service_cidrs.insert(name.into(), service_cidr.into())),
            None => drop(self.service_cidrs.remove(name)),
        }
        Changes { topology: true, ..Changes::default() }
    }

    /// Replaces all services.
    pub fn replace_services<T: Into<Arc<Service>>>(
        &mut self,
        services: impl IntoIterator<Item = T>,
    ) -> Changes {
        let services: OrdMap<ServiceKey, Arc<Service>> = services
            .into_iter()
            .map(|service| {
                let mut service: Arc<Service> = service.into();
                if let Some(service) = Arc::get_mut(&mut service) {
                    self.share_service(service);
                }
                (service.key.clone(), service)
            })
            .collect();
        let removed = self.services.keys().filter(|key| !services.contains_key(*key));
        let set = services.iter().filter(|(key, service)| self.services.get(*key) != Some(*service));
        let changed = removed.chain(set.map(|(key, _)| key)).cloned().collect();
        self.services = services;
        Changes { services: changed, topology: false }
    }

    /// Replaces all slices.
    pub fn replace_slices<T: Into<Arc<Slice>>>(&mut self, slices: impl IntoIterator<Item = T>) -> Changes {
        let slices: BTreeMap<SliceKey, Arc<Slice>> = slices
            .into_iter()
            .map(|slice| {
                let mut slice: Arc<Slice> = slice.into();
                if let Some(slice) = Arc::get_mut(&mut slice) {
                    self.share_slice(slice);
                }
                (slice.key(), slice)
            })
            .collect();
        let removed: Vec<_> =
            self.services_of_slices.keys().filter(|key| !slices.contains_key(*key)).cloned().collect();
        let mut changes = Changes::default();
        for key in removed {
            changes.merge(self.set_shared_slice(&key, None));
        }
        for (key, slice) in slices {
            changes.merge(self.set_shared_slice(&key, Some(slice)));
        }
        changes
    }

    /// Replaces all nodes.
    pub fn replace_nodes<T: Into<Arc<Node>>>(&mut self, nodes: impl IntoIterator<Item = T>) -> Changes {
        let nodes: OrdMap<Arc<str>, Arc<Node>> =
            nodes.into_iter().map(Into::into).map(|node| (node.name.clone(), node)).collect();
        let topology = nodes != self.nodes;
        self.nodes = nodes;
        Changes { topology, ..Changes::default() }
    }

    /// Replaces all ServiceCIDRs.
    pub fn replace_service_cidrs<T: Into<Arc<ServiceCidr>>>(
        &mut self,
        service_cidrs: impl IntoIterator<Item = T>,
    ) -> Changes {
        let service_cidrs: OrdMap<Arc<str>, Arc<ServiceCidr>> =
            service_cidrs.into_iter().map(Into::into).map(|cidr| (cidr.name.clone(), cidr)).collect();
        let topology = service_cidrs != self.service_cidrs;
        self.service_cidrs = service_cidrs;
        Changes { topology, ..Changes::default() }
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key).map(Arc::as_ref)
    }

    /// Whether a service of this namespace exists.
    #[must_use]
    pub fn has_namespace(&self, namespace: &str) -> bool {
        let first = ServiceKey::new(namespace, "");
        self.services.range(first..).next().is_some_and(|(key, _)| &*key.namespace == namespace)
    }

    /// As [`Self::service`], as a shared pointer.
    #[must_use]
    pub fn shared_service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// All services, in the order of their keys.
    #[must_use]
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Service> {
        self.services.values().map(Arc::as_ref)
    }

    /// As [`Self::services`], as shared pointers.
    #[must_use]
    pub fn shared_services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The slices of a service, in the order of their names. The service itself may be absent.
    pub fn slices_of(&self, key: &ServiceKey) -> impl Iterator<Item = &Slice> + Clone {
        self.shared_slices_of(key).map(Arc::as_ref)
    }

    /// As [`Self::slices_of`], as shared pointers.
    pub fn shared_slices_of(&self, key: &ServiceKey) -> impl Iterator<Item = &Arc<Slice>> + Clone {
        self.slices.get(key).into_iter().flatten()
    }

    /// All slices, in the order of their services' keys.
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.slices.values().flatten().map(Arc::as_ref)
    }

    /// As [`Self::slices`], as shared pointers.
    pub fn shared_slices(&self) -> impl Iterator<Item = &Arc<Slice>> {
        self.slices.values().flatten()
    }

    /// A node by its name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(Arc::as_ref)
    }

    /// All nodes, in the order of their names.
    #[must_use]
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &Node> {
        self.nodes.values().map(Arc::as_ref)
    }

    /// As [`Self::nodes`], as shared pointers.
    #[must_use]
    pub fn shared_nodes(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// All ServiceCIDRs, in the order of their names.
    #[must_use]
    pub fn service_cidrs(&self) -> impl ExactSizeIterator<Item = &Arc<ServiceCidr>> {
        self.service_cidrs.values()
    }

    /// Replaces a service's strings by equal ones that the store holds already.
    fn share_service(&mut self, service: &mut Service) {
        if let Some((known, _)) = self.slices.get_key_value(&service.key) {
            service.key = known.clone();
        }
        self.texts.share(&mut service.key.namespace);
        if let Some(Unselected::Labelled(label) | Unselected::NotLabelled(label)) = &mut service.unselected {
            self.texts.share(label);
        }
        for port in &mut service.ports {
            self.texts.share(&mut port.name);
        }
    }

    /// As [`Self::share_service`]: 100,000 endpoints may name a thousand nodes.
    fn share_slice(&mut self, slice: &mut Slice) {
        if let Some((known, _)) = self.services.get_key_value(&slice.service) {
            slice.service = known.clone();
        } else if let Some((known, _)) = self.slices.get_key_value(&slice.service) {
            slice.service = known.clone();
        }
        self.texts.share(&mut slice.service.namespace);
        for port in &mut slice.ports {
            self.texts.share(&mut port.name);
        }
        for endpoint in &mut slice.endpoints {
            self.placements.share(&mut endpoint.placement);
            let hints =
                endpoint.hints.iter_mut().flat_map(|hints| hints.zones.iter_mut().chain(&mut hints.nodes));
            for text in hints {
                self.texts.share(text);
            }
        }
    }

    fn set_shared_slice(&mut self, key: &SliceKey, slice: Option<Arc<Slice>>) -> Changes {
        let mut changes = Changes::default();
        let former = self.services_of_slices.get(key);
        let is_listed = former.is_some() && former == slice.as_ref().map(|slice| &slice.service);
        if let Some(former) = former.filter(|_| !is_listed).cloned() {
            self.remove_slice(&former, key);
            changes.services.insert(former);
        }
        let Some(slice) = slice else {
            return changes;
        };
        // A write copies the part of a map that a view shares: not for an equal object, such as the agent's
        // own.
        if is_listed && self.shared_slices_of(&slice.service).any(|held| *held == slice) {
            return changes;
        }
        let service = slice.service.clone();
        let slices = self.slices.entry(service.clone()).or_default();
        let is_same = match slices.binary_search_by(|held| held.name.cmp(&key.name)) {
            Ok(index) => {
                let old = std::mem::replace(&mut slices[index], Arc::clone(&slice));
                (old.ipv6, &old.ports, &old.endpoints) == (slice.ipv6, &slice.ports, &slice.endpoints)
            }
            Err(index) => {
                slices.reserve_exact(1);
                slices.insert(index, slice);
                false
            }
        };
        if !is_same {
            changes.services.insert(service.clone());
        }
        if !is_listed {
            self.services_of_slices.insert(key.clone(), service);
        }
        changes
    }

    fn remove_slice(&mut self, service: &ServiceKey, key: &SliceKey) {
        self.services_of_slices.remove(key);
        if let Some(slices) = self.slices.get_mut(service) {
            slices.retain(|slice| slice.name != key.name);
            if slices.is_empty() {
                self.slices.remove(service);
            }
        }
    }
}

#[cfg(test)]
mod tests;
