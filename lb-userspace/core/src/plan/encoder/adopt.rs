//! Adopting the maps of an earlier agent.
//!
//! # Invariants
//!
//! - Every entry that a call can find is adopted, or removed by the first plan. Until then neither its id nor
//!   its run is reused.
//! - The maps are adopted even if the earlier agent was killed between any two ops.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use lb_common::layout::{Frontend, Run};

use super::{Capacity, Encoder, EndpointAddress, FrontendState, Op, RunContent, place};
use crate::{
    desired::FrontendAddress,
    tables::{Entry, Image, StoredRun, pool::Pool, space::Space},
};

/// A run and its table (`true` for IPv6).
type RunAt = (bool, Run);

/// Entries that cannot be adopted. The first plan removes them.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    /// Keys without a usable entry of `frontends`.
    pub(super) keys: BTreeSet<FrontendAddress>,
    /// Entries of `frontends` that only such keys refer to.
    frontend_ids: BTreeSet<u32>,
    /// Runs that no frontend adopts.
    runs: Vec<RunAt>,
}

impl Encoder {
    /// An encoder that adopts the content of the maps: ids and runs survive a restart, and an unchanged
    /// frontend needs no op.
    ///
    /// A frontend with an unsound run (damaged, or another port's because the agent was killed between two
    /// ops) keeps its entry; the first plan gives it a new run. The first plan also rewrites or deletes keys
    /// without an entry of their own.
    #[must_use]
    pub fn adopt(capacity: Capacity, found: &Image) -> Self {
        let max_ids = capacity.services.saturating_mul(2);
        let mut encoder = Self::empty(capacity);
        encoder.image.node_addrs.clone_from(&found.node_addrs);
        encoder.image.cluster_ips.clone_from(&found.cluster_ips);
        encoder.image.service_cidrs.clone_from(&found.service_cidrs);

        let mut usable = BTreeMap::new();
        for (&address, &id) in &found.services {
            match found.frontends.get(&id) {
                Some(&frontend) if id < max_ids && !usable.contains_key(&id) => {
                    usable.insert(id, (address, frontend));
                }
                _ => {
                    encoder.leftovers.keys.insert(address);
                    encoder.leftovers.frontend_ids.insert(id);
                    encoder.n_leaving[usize::from(address.ip.is_ipv6())] += 1;
                }
            }
        }
        encoder.leftovers.frontend_ids.retain(|id| !usable.contains_key(id));

        let reserved = encoder.reserve_runs(found, usable.values());
        let families = families(usable.values());
        let belongs_to = |address: &FrontendAddress, service_id: u32| {
            service_id < max_ids && families.get(&service_id) == Some(&address.ip.is_ipv6())
        };
        let owners = owners(found, usable.values(), &reserved, belongs_to);
        for (&id, &(address, frontend)) in &usable {
            let ipv6 = address.ip.is_ipv6();
            let service_id = Some(frontend.service_id).filter(|id| belongs_to(&address, *id));
            let owner = owners.get(&(ipv6, frontend.run.offset, frontend.run.len));
            let is_sound = service_id.is_some() && (frontend.run.len == 0 || owner == service_id.as_ref());
            let stored = found.stored(ipv6, frontend.run).filter(|_| frontend.run.len > 0);
            let set = is_sound.then(|| stored.map(RunContent::of_stored).unwrap_or_default());
            encoder.adopt_frontend(address, id, frontend, service_id, set.zip(Some(stored)));
        }

        for run in reserved {
            // Not adopted: a second run with equal content, or one that another port refers to. The next plan
            // removes the last reference.
            if !encoder.image.runs(run.0).contains_key(&run.1.offset) {
                if let Some(stored) = found.stored(run.0, run.1) {
                    encoder.image.runs_mut(run.0).insert(run.1.offset, stored.clone());
                }
                encoder.leftovers.runs.push(run);
            }
        }
        let frontend_ids = encoder.image.frontends.keys().chain(&encoder.leftovers.frontend_ids);
        encoder.frontend_ids = Pool::new(max_ids, &frontend_ids.copied().collect());
        encoder.service_ids = Pool::new(max_ids, &encoder.ports.keys().copied().collect());
        let endpoint_ids = encoder.ports.values().flat_map(|port| &port.ids.0).map(|(_, (id, _))| *id);
        encoder.endpoint_ids = Pool::new(capacity.endpoints.saturating_mul(2), &endpoint_ids.collect());
        encoder
    }

    /// Marks the space of all referenced runs as taken, except runs that overlap others, which no encoder
    /// writes.
    fn reserve_runs<'a>(
        &mut self,
        found: &Image,
        frontends: impl Iterator<Item = &'a (FrontendAddress, Frontend)>,
    ) -> Vec<RunAt> {
        let referred: BTreeSet<(bool, u32, u32)> = frontends
            .map(|(address, frontend)| (address.ip.is_ipv6(), frontend.run.offset, frontend.run.len))
            .filter(|(_, _, len)| *len > 0)
            .collect();
        let mut taken = [BTreeMap::new(), BTreeMap::new()];
        let mut ends = [0; 2];
        let mut reserved = Vec::new();
        for (ipv6, offset, len) in referred {
            let (family, run) = (usize::from(ipv6), Run { offset, len });
            let n_entries = found.stored(ipv6, run).map_or(len, StoredRun::n_entries);
            let end = offset.checked_add(n_entries).filter(|end| *end <= self.capacity.endpoints);
            if let Some(end) = end.filter(|_| offset >= ends[family]) {
                ends[family] = end;
                taken[family].insert(offset, n_entries);
                reserved.push((ipv6, run));
            }
        }
        // The ranges are checked above, so `Space::new` succeeds.
        self.space = taken.map(|taken| Space::new(self.capacity.endpoints, &taken).unwrap_or_default());
        reserved
    }

    fn adopt_frontend(
        &mut self,
        address: FrontendAddress,
        id: u32,
        mut frontend: Frontend,
        service_id: Option<u32>,
        sound: Option<(RunContent, Option<&StoredRun>)>,
    ) {
        let ipv6 = address.ip.is_ipv6();
        let mut placed = FrontendState { frontend_id: id, service_id, set: None };
        if let (Some((set, stored)), Some(service_id)) = (sound, service_id) {
            let port = self.ports.entry(service_id).or_default();
            port.n_frontends += 1;
            if let Some(stored) = stored {
                let run = if let Some((run, n_users)) = port.runs.get_mut(&set) {
                    *n_users += 1;
                    *run
                } else {
                    let ids: BTreeMap<_, _> = stored
                        .reachable()
                        .map(|entry| (place(&entry.address()), entry.endpoint_id))
                        .collect();
                    let is_new = |place: &EndpointAddress| port.ids.get(place).is_none();
                    let fresh: Vec<_> = ids
                        .into_iter()
                        .filter(|(place, _)| is_new(place))
                        .map(|(place, id)| (place, (id, 0)))
                        .collect();
                    port.ids.extend(fresh.into_iter());
                    for address in set.addresses() {
                        if let Some((_, n_runs)) = port.ids.get_mut(&place(address)) {
                            *n_runs += 1;
                        }
                    }
                    self.image.runs_mut(ipv6).insert(frontend.run.offset, stored.clone());
                    port.runs.extend([(set.clone(), (frontend.run, 1))].into_iter());
                    frontend.run
                };
                // A crash between two ops can leave two equal runs. One is adopted.
                if run != frontend.run {
                    frontend.run = run;
                    self.ops.push(Op::SwitchRun { id, run });
                }
            }
            placed.set = Some(set);
        }
        self.image.frontends.insert(id, frontend);
        self.image.services.insert(address, id);
        self.placed.insert(address, placed);
        self.n_services[usize::from(ipv6)] += 1;
    }

    /// Removes what was not adopted, after all desired frontends are set.
    pub(super) fn remove_leftovers(&mut self) {
        let Leftovers { keys, frontend_ids, runs } = std::mem::take(&mut self.leftovers);
        for address in keys {
            // If a frontend uses the key now, its element was replaced.
            self.freed.n_keys[usize::from(address.ip.is_ipv6())] += 1;
            if !self.placed.contains_key(&address) {
                self.ops.push(Op::DeleteService(address));
            }
        }
        self.freed.frontend_ids.extend(frontend_ids);
        for (ipv6, run) in runs {
            // A frontend whose new run did not fit still uses the old one.
            let is_used = |placed: &FrontendState| {
                placed.set.is_none()
                    && self.image.frontends.get(&placed.frontend_id).is_some_and(|f| f.run == run)
            };
            if self.placed.iter().any(|(address, placed)| address.ip.is_ipv6() == ipv6 && is_used(placed)) {
                self.leftovers.runs.push((ipv6, run));
                continue;
            }
            if !self.image.runs(ipv6).contains_key(&run.offset) {
                // It could not be read; its length is all that is known.
                self.freed.runs[usize::from(ipv6)].push((run.offset, run.len));
            }
            self.drop_run(ipv6, run.offset);
        }
    }
}

impl RunContent {
    /// The set that a run was made of.
    fn of_stored(stored: &StoredRun) -> Self {
        let mut endpoints: Vec<(SocketAddr, Option<u8>)> = match stored.shares() {
            None => stored.endpoints().iter().map(|entry| (entry.address(), None)).collect(),
            Some(shares) => stored.endpoints().iter().map(Entry::address).zip(shares.map(Some)).collect(),
        };
        endpoints.sort_unstable();
        let shares: Option<Vec<u8>> = endpoints.iter().map(|(_, share)| *share).collect();
        // An extended run for the sake of the endpoints to fall back to has equal shares.
        let shares = shares.filter(|shares| shares.iter().any(|share| *share != u8::MAX));
        let mut spill: Vec<SocketAddr> = stored.spill().iter().map(Entry::address).collect();
        spill.sort_unstable();
        let endpoints = endpoints.into_iter().map(|(address, _)| address).collect();
        Self::new(endpoints, shares.map(Arc::from), spill.into())
    }
}

/// The family of each service id: that of most of its frontends. A service port has one family.
fn families<'a>(frontends: impl Iterator<Item = &'a (FrontendAddress, Frontend)>) -> BTreeMap<u32, bool> {
    let mut votes: BTreeMap<u32, [usize; 2]> = BTreeMap::new();
    for (address, frontend) in frontends {
        votes.entry(frontend.service_id).or_default()[usize::from(address.ip.is_ipv6())] += 1;
    }
    votes.into_iter().map(|(service_id, [n_v4, n_v6])| (service_id, n_v6 > n_v4)).collect()
}

/// The owner of each run: the service id of most frontends that refer to it.
///
/// Unsound runs are left out: not sorted by endpoint id, with a duplicate address or one of another family,
/// or with an endpoint id that a run with more frontends uses for another address or service port.
fn owners<'a>(
    found: &Image,
    frontends: impl Iterator<Item = &'a (FrontendAddress, Frontend)>,
    reserved: &[RunAt],
    belongs_to: impl Fn(&FrontendAddress, u32) -> bool,
) -> BTreeMap<(bool, u32, u32), u32> {
    let mut votes: BTreeMap<(bool, u32, u32), BTreeMap<u32, usize>> = BTreeMap::new();
    for (address, frontend) in
        frontends.filter(|(address, frontend)| belongs_to(address, frontend.service_id))
    {
        let run = (address.ip.is_ipv6(), frontend.run.offset, frontend.run.len);
        *votes.entry(run).or_default().entry(frontend.service_id).or_default() += 1;
    }
    let mut candidates: Vec<_> = reserved
        .iter()
        .filter_map(|&(ipv6, run)| {
            let votes = votes.get(&(ipv6, run.offset, run.len))?;
            let (&service_id, &n_votes) =
                votes.iter().max_by_key(|(id, n)| (**n, std::cmp::Reverse(**id)))?;
            let stored = found.stored(ipv6, run).filter(|stored| is_sound(ipv6, stored))?;
            Some((std::cmp::Reverse(n_votes), (ipv6, run.offset, run.len), service_id, stored))
        })
        .collect();
    candidates.sort_unstable_by_key(|(n_votes, run, ..)| (*n_votes, *run));
    let mut owner_of_id = BTreeMap::new();
    let mut id_of_owner = BTreeMap::new();
    let mut owners = BTreeMap::new();
    for (_, run, service_id, stored) in candidates {
        let is_consistent = stored.reachable().all(|entry| {
            let owner = (service_id, entry.address());
            owner_of_id.get(&entry.endpoint_id).is_none_or(|other| *other == owner)
                && id_of_owner.get(&owner).is_none_or(|other| *other == entry.endpoint_id)
        });
        if is_consistent {
            for entry in stored.reachable() {
                owner_of_id.insert(entry.endpoint_id, (service_id, entry.address()));
                id_of_owner.insert((service_id, entry.address()), entry.endpoint_id);
            }
            owners.insert(run, service_id);
        }
    }
    owners
}

/// Whether an encoder could have written a run.
fn is_sound(ipv6: bool, stored: &StoredRun) -> bool {
    let is_list = |entries: &[Entry]| {
        let addresses: BTreeSet<SocketAddr> = entries.iter().map(Entry::address).collect();
        entries.is_sorted_by(|a, b| a.endpoint_id < b.endpoint_id)
            && addresses.len() == entries.len()
            && addresses.iter().all(|address| address.is_ipv6() == ipv6)
    };
    if !is_list(stored.endpoints()) || !is_list(stored.spill()) {
        return false;
    }
    if !stored.is_extended() {
        return stored.endpoints().iter().all(|entry| entry.extra == 0);
    }
    let ids: BTreeMap<_, _> = stored.reachable().map(|entry| (entry.address(), entry.endpoint_id)).collect();
    let id = |address: &SocketAddr| ids.get(address).copied().unwrap_or(u32::MAX);
    RunContent::of_stored(stored).stored(id) == *stored
}
