//! Who owns a frontend address that several services claim.
//!
//! # Purpose
//!
//! The API accepts two Services with one external IP and port; kube-proxy's choice is arbitrary. [`Desired`]
//! orders claims by kind (cluster IP, load-balancer IP, external IP, node port), then by age, oldest first,
//! then by namespace and name. When the owner is removed, the next in the queue follows.
//!
//! # Invariants
//!
//! - The owners depend on the frontends, not on the order in which services were set.
//! - The cost of a change is proportional to the frontends of the changed service.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use super::{Frontend, FrontendAddress, PacketSide};
use crate::model::{Issue, IssueKind, ObjectRef, ServiceKey};

/// The frontends of all services, with one owner for each address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    claims: BTreeMap<FrontendAddress, Claims>,
    addresses: BTreeMap<ServiceKey, Vec<FrontendAddress>>,
    /// Addresses with more than one claim, so that [`Desired::issues`] need not scan all claims.
    contested: BTreeSet<FrontendAddress>,
}

/// The claims on one address. Nearly every address has one claim, which needs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claims {
    owner: Frontend,
    /// The claims that lose, best first.
    queue: Vec<Frontend>,
}

impl Desired {
    /// A state without frontends.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the frontends of a service; an empty list removes the service.
    ///
    /// Returns the addresses whose owner, or whose owner's content, changed. If a list names an address
    /// twice, the better claim counts.
    pub fn set(&mut self, key: &ServiceKey, mut frontends: Vec<Frontend>) -> BTreeSet<FrontendAddress> {
        frontends.sort_by(|a, b| a.address.cmp(&b.address).then_with(|| rank(a).cmp(&rank(b))));
        frontends.dedup_by_key(|frontend| frontend.address);

        let new_addresses: Vec<_> = frontends.iter().map(|frontend| frontend.address).collect();
        let old_addresses = if new_addresses.is_empty() {
            self.addresses.remove(key)
        } else {
            self.addresses.insert(key.clone(), new_addresses)
        };
        let mut changed = BTreeSet::new();
        for address in old_addresses.unwrap_or_default() {
            if frontends.binary_search_by_key(&address, |frontend| frontend.address).is_err()
                && self.withdraw(key, address)
            {
                changed.insert(address);
            }
        }
        for frontend in frontends {
            let address = frontend.address;
            if self.claim(frontend) {
                changed.insert(address);
            }
        }
        changed
    }

    /// The frontend that answers calls of sockets to an address.
    #[must_use]
    pub fn owner(&self, address: &FrontendAddress) -> Option<&Frontend> {
        self.claims.get(address).map(|claims| &claims.owner).filter(|owner| owner.is_for_sockets())
    }

    /// The frontend that answers packets to an address, with what they get.
    #[must_use]
    pub fn packet_owner(&self, address: &FrontendAddress) -> Option<(&Frontend, &PacketSide)> {
        let owner = &self.claims.get(address)?.owner;
        owner.packets.as_deref().map(|packets| (owner, packets))
    }

    /// The frontends that answer calls of sockets, in the order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = &Frontend> {
        self.claims.values().map(|claims| &claims.owner).filter(|owner| owner.is_for_sockets())
    }

    /// The frontends that answer packets alone, in the order of their addresses.
    pub fn packets_alone(&self) -> impl Iterator<Item = (&Frontend, &PacketSide)> {
        let owners = self.claims.values().map(|claims| &claims.owner);
        owners
            .filter(|owner| !owner.is_for_sockets())
            .filter_map(|owner| Some((owner, owner.packets.as_deref()?)))
    }

    /// Number of frontends, those for packets alone included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    /// Whether no frontend answers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// The services that have frontends, in order.
    #[must_use]
    pub fn services(&self) -> impl ExactSizeIterator<Item = &ServiceKey> {
        self.addresses.keys()
    }

    /// The frontends that a service claims, in the order of their addresses, each with whether it owns its
    /// address.
    pub fn frontends_of(&self, key: &ServiceKey) -> impl Iterator<Item = (&Frontend, bool)> {
        self.addresses.get(key).into_iter().flatten().filter_map(|address| {
            let claims = self.claims.get(address)?;
            let of_service = |frontend: &&Frontend| frontend.port.service == *key;
            let queued = || claims.queue.iter().find(of_service).map(|frontend| (frontend, false));
            Some(&claims.owner).filter(of_service).map(|frontend| (frontend, true)).or_else(queued)
        })
    }

    /// One issue for each losing claim, in the order of addresses; it names the winner.
    pub fn issues(&self) -> impl Iterator<Item = Issue> {
        self.contested.iter().filter_map(|address| self.claims.get(address)).flat_map(|claims| {
            claims.queue.iter().map(|loser| {
                Issue::new(
                    ObjectRef::from(&loser.port.service),
                    IssueKind::FrontendTaken {
                        address: loser.address.to_string(),
                        winner: claims.owner.port.service.to_string(),
                    },
                )
            })
        })
    }

    /// Adds or replaces the claim of a service on an address. Returns whether the owner or its content
    /// changed.
    fn claim(&mut self, frontend: Frontend) -> bool {
        let address = frontend.address;
        let Some(claims) = self.claims.get_mut(&address) else {
            self.claims.insert(address, Claims { owner: frontend, queue: Vec::new() });
            return true;
        };
        // The common case: an update of the only claim.
        if claims.queue.is_empty() && claims.owner.port.service == frontend.port.service {
            let old = mem::replace(&mut claims.owner, frontend);
            return old != claims.owner;
        }
        let old_owner = claims.owner.clone();
        claims.queue.retain(|queued| queued.port.service != frontend.port.service);
        if claims.owner.port.service == frontend.port.service {
            claims.owner = frontend;
        } else {
            claims.queue.push(frontend);
        }
        claims.elect();
        let changed = old_owner != claims.owner;
        self.update_contested(address);
        changed
    }

    /// Removes the claim of a service on an address. Returns whether the owner changed.
    fn withdraw(&mut self, key: &ServiceKey, address: FrontendAddress) -> bool {
        let Some(claims) = self.claims.get_mut(&address) else {
            return false;
        };
        let is_owner = claims.owner.port.service == *key;
        if !is_owner {
            claims.queue.retain(|queued| queued.port.service != *key);
        } else if claims.queue.is_empty() {
            self.claims.remove(&address);
        } else {
            claims.owner = claims.queue.remove(0);
        }
        self.update_contested(address);
        is_owner
    }

    fn update_contested(&mut self, address: FrontendAddress) {
        if self.claims.get(&address).is_some_and(|claims| !claims.queue.is_empty()) {
            self.contested.insert(address);
        } else {
            self.contested.remove(&address);
        }
    }
}

impl Claims {
    /// Restores the order of the claims.
    fn elect(&mut self) {
        self.queue.sort_by(|a, b| rank(a).cmp(&rank(b)));
        if let Some(best) = self.queue.first_mut()
            && rank(best) < rank(&self.owner)
        {
            mem::swap(best, &mut self.owner);
            self.queue.sort_by(|a, b| rank(a).cmp(&rank(b)));
        }
    }
}

/// The order of claims on one address; the least wins. A service without a creation time comes last.
fn rank(frontend: &Frontend) -> impl Ord + '_ {
    (frontend.kind, frontend.created.is_none(), frontend.created, &frontend.port.service)
}

#[cfg(test)]
mod tests;
