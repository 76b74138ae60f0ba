//! Turns desired frontends into plans, and allocates ids and runs.

mod adopt;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::OrdMap;
use lb_common::{
    layout::{Frontend, Run, frontend_flags},
    limits,
};

use self::adopt::Leftovers;
use super::{Op, Plan};
use crate::{
    desired::{self, FrontendAddress, PortKey},
    tables::{AddressTable, Cidr, Entry, Image, StoredRun, pool::Pool, space::Space},
};

/// Sizes of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Entries of `services4` and of `services6`, each; `frontends` has twice as many.
    pub services: u32,
    /// Entries of `endpoints4` and of `endpoints6`, each, and of `endpoint_stats`.
    pub endpoints: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { services: limits::MAX_FRONTENDS, endpoints: limits::MAX_ENDPOINTS }
    }
}

/// A table is full. The frontend stays as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Full {
    /// The table of frontends of this family (`--max-services`).
    Services {
        /// The capacity.
        capacity: u32,
    },
    /// The endpoint table has no gap of this length (`--max-endpoints`).
    Endpoints {
        /// The capacity.
        capacity: u32,
        /// Length of the new run. The old run stays until the switch.
        needed: u32,
    },
}

/// A service port with at least one frontend in the tables.
#[derive(Debug, Default)]
struct Port {
    /// `None` for an adopted port that no desired frontend has claimed yet.
    key: Option<Arc<PortKey>>,
    n_frontends: u32,
    /// By endpoint: its id, and how many runs use it.
    ids: Table<EndpointAddress, (u32, u32)>,
    /// By set of endpoints: its run, and how many frontends use it.
    runs: Table<RunContent, (Run, u32)>,
}

/// The endpoints of a frontend, as [`desired::Frontend`] has them: the content of a run without ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct RunContent {
    endpoints: Arc<[SocketAddr]>,
    /// `None` for most frontends.
    extension: Option<Arc<Extension>>,
}

/// What an extended run has beside its endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Extension {
    /// Parallel to the endpoints; `None` if all are equal.
    shares: Option<Arc<[u8]>>,
    spill: Arc<[SocketAddr]>,
}

impl RunContent {
    fn of(desired: &desired::Frontend) -> Self {
        Self::new(Arc::clone(&desired.endpoints), desired.shares.clone(), Arc::clone(&desired.spill))
    }

    fn new(endpoints: Arc<[SocketAddr]>, shares: Option<Arc<[u8]>>, spill: Arc<[SocketAddr]>) -> Self {
        let is_extended = !endpoints.is_empty() && (shares.is_some() || !spill.is_empty());
        Self { endpoints, extension: is_extended.then(|| Arc::new(Extension { shares, spill })) }
    }

    fn spill(&self) -> &[SocketAddr] {
        self.extension.as_ref().map(|extension| &*extension.spill).unwrap_or_default()
    }

    /// Every endpoint once.
    fn addresses(&self) -> impl Iterator<Item = &SocketAddr> {
        let is_new = |address: &&SocketAddr| self.endpoints.binary_search(address).is_err();
        self.endpoints.iter().chain(self.spill().iter().filter(is_new))
    }

    /// Entries of its run.
    fn n_entries(&self) -> usize {
        match &self.extension {
            None => self.endpoints.len(),
            Some(extension) => StoredRun::extended_len(self.endpoints.len(), extension.spill.len()),
        }
    }

    /// Its run.
    fn stored(&self, id: impl Fn(&SocketAddr) -> u32) -> StoredRun {
        let entry = |address: &SocketAddr| Entry::new(id(address), *address);
        let Some(Extension { shares, spill }) = self.extension.as_deref() else {
            let mut entries: Vec<Entry> = self.endpoints.iter().map(entry).collect();
            entries.sort_unstable();
            return entries.into();
        };
        let share = |index: usize| shares.as_ref().and_then(|shares| shares.get(index)).copied();
        let with_share = |(index, address)| (entry(address), share(index).unwrap_or(u8::MAX));
        let mut endpoints: Vec<(Entry, u8)> = self.endpoints.iter().enumerate().map(with_share).collect();
        let mut spill: Vec<Entry> = spill.iter().map(entry).collect();
        endpoints.sort_unstable();
        spill.sort_unstable();
        StoredRun::extended(&endpoints, &spill)
    }
}

/// A compact address and port: a `SocketAddr` also has a flow label and scope for IPv6.
type EndpointAddress = (IpAddr, u16);

const fn place(address: &SocketAddr) -> EndpointAddress {
    (address.ip(), address.port())
}

/// A sorted list. Most ports have one run and ten endpoints; a B-tree takes several times the memory.
///
/// Adding or removing takes linear time, so the entries of a run are added and removed together.
#[derive(Debug)]
struct Table<K, V>(Vec<(K, V)>);

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Ord, V> Table<K, V> {
    fn position(&self, key: &K) -> Result<usize, usize> {
        self.0.binary_search_by(|(known, _)| known.cmp(key))
    }

    fn get(&self, key: &K) -> Option<&V> {
        self.position(key).ok().map(|index| &self.0[index].1)
    }

    fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.position(key).ok().map(|index| &mut self.0[index].1)
    }

    /// Adds entries with new keys.
    fn extend(&mut self, entries: impl ExactSizeIterator<Item = (K, V)>) {
        self.0.reserve_exact(entries.len());
        self.0.extend(entries);
        // The list is nearly sorted, for which the standard library's sort is fast.
        self.0.sort_by(|(a, _), (b, _)| a.cmp(b));
    }

    fn retain(&mut self, is_kept: impl FnMut(&mut (K, V)) -> bool) {
        self.0.retain_mut(is_kept);
        if self.0.capacity() > 2 * self.0.len() {
            self.0.shrink_to_fit();
        }
    }
}

/// A frontend in the tables.
#[derive(Debug)]
struct FrontendState {
    frontend_id: u32,
    /// `None` for an adopted frontend with an unusable service id.
    service_id: Option<u32>,
    /// `None` for an adopted frontend whose run does not belong to its service port. It counts neither for
    /// the port nor for the run.
    set: Option<RunContent>,
}

/// What a plan frees. Programs that run during the plan may still read it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Freed {
    frontend_ids: Vec<u32>,
    service_ids: Vec<u32>,
    endpoint_ids: Vec<u32>,
    /// Parts of the endpoint table of each family: offset and length.
    runs: [Vec<(u32, u32)>; 2],
    /// Number of deleted frontend keys of each family. They occupy the map until the plan is executed, since
    /// it inserts first.
    n_keys: [u32; 2],
    /// The same for addresses, by [`AddressTable`].
    n_addresses: [usize; 2],
    /// Whether the flag of an address, and thus its element, is replaced.
    has_replaced_element: bool,
    /// Whether the service networks were removed.
    service_cidrs: bool,
}

/// Keeps the target image and turns changes into ops.
///
/// The executor of its plans must report grace periods with [`Self::settled`]; otherwise freed ids and runs
/// are never reused.
#[derive(Debug)]
pub struct Encoder {
    capacity: Capacity,
    image: Image,
    placed: BTreeMap<FrontendAddress, FrontendState>,
    ports: BTreeMap<u32, Port>,
    service_ids_by_port: OrdMap<Arc<PortKey>, u32>,
    /// Frontends of IPv4 and of IPv6.
    n_services: [u32; 2],
    /// Keys in the maps that belong to no frontend: of `leftovers`, `freed` and `held_back`.
    n_leaving: [u32; 2],
    /// The same for addresses, by [`AddressTable`].
    n_addresses_leaving: [usize; 2],
    /// Whether a program may still read removed service networks.
    may_read_cidrs: bool,
    frontend_ids: Pool,
    service_ids: Pool,
    endpoint_ids: Pool,
    space: [Space; 2],
    leftovers: Leftovers,
    ops: Vec<Op>,
    /// What `ops` free.
    freed: Freed,
    /// What plans freed, by plan number, since which no grace period has passed.
    held_back: VecDeque<(u64, Freed)>,
    n_plans: u64,
}

impl Encoder {
    /// An encoder for empty tables.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self::adopt(capacity, &Image::default())
    }

    fn empty(capacity: Capacity) -> Self {
        let no_ids = || Pool::new(0, &BTreeSet::new());
        Self {
            capacity,
            image: Image::default(),
            placed: BTreeMap::new(),
            ports: BTreeMap::new(),
            service_ids_by_port: OrdMap::new(),
            n_services: [0; 2],
            n_leaving: [0; 2],
            n_addresses_leaving: [0; 2],
            may_read_cidrs: false,
            frontend_ids: no_ids(),
            service_ids: no_ids(),
            endpoint_ids: no_ids(),
            space: [Space::default(), Space::default()],
            leftovers: Leftovers::default(),
            ops: Vec::new(),
            freed: Freed::default(),
            held_back: VecDeque::new(),
            n_plans: 0,
        }
    }

    /// As [`Self::adopt`], after a grace period since the last plan. Plan numbers continue.
    pub fn start_over(&mut self, capacity: Capacity, found: &Image) {
        *self = Self { n_plans: self.n_plans, ..Self::adopt(capacity, found) };
    }

    /// The content of the maps after all plans are executed.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The addresses that have a key in the maps, in no particular order.
    pub fn addresses(&self) -> impl Iterator<Item = &FrontendAddress> {
        self.placed.keys().chain(&self.leftovers.keys)
    }

    /// The id of a service port, if it has a frontend in the maps.
    #[must_use]
    pub fn service_id(&self, port: &PortKey) -> Option<u32> {
        self.service_ids_by_port.get(port).copied()
    }

    /// The service ports that have a frontend in the maps, each with its id.
    #[must_use]
    pub fn service_ids(&self) -> &OrdMap<Arc<PortKey>, u32> {
        &self.service_ids_by_port
    }

    /// The endpoint ids in use are below this number.
    #[must_use]
    pub fn n_endpoint_ids(&self) -> u32 {
        self.endpoint_ids.end()
    }

    /// The sizes of the tables.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Entries of the endpoint table of a family that are in use or held back.
    #[must_use]
    pub fn n_endpoints(&self, ipv6: bool) -> u32 {
        self.capacity.endpoints - self.space[usize::from(ipv6)].n_free().min(self.capacity.endpoints)
    }

    /// Frontends of a family.
    #[must_use]
    pub fn n_services(&self, ipv6: bool) -> u32 {
        self.n_services[usize::from(ipv6)]
    }

    /// Sets or removes the frontend of an address. Call it at most once per address between two calls of
    /// [`Self::take_plan`].
    ///
    /// # Errors
    ///
    /// [`Full`] if a table is full. Then this address stays as it was; others are not affected. If
    /// [`Self::holds_back`], it may succeed after the next grace period.
    pub fn set(&mut self, address: FrontendAddress, desired: Option<&desired::Frontend>) -> Result<(), Full> {
        if let Some(desired) = desired {
            return self.place(address, desired);
        }
        self.remove(&address);
        Ok(())
    }

    fn place(&mut self, address: FrontendAddress, desired: &desired::Frontend) -> Result<(), Full> {
        let ipv6 = address.ip.is_ipv6();
        let before = self.placed.get(&address).map(|placed| (placed.frontend_id, placed.service_id));
        let n_services = self.n_services[usize::from(ipv6)] + self.n_leaving[usize::from(ipv6)];
        if before.is_none() && n_services >= self.capacity.services {
            return Err(Full::Services { capacity: self.capacity.services });
        }
        let (service_id, is_new) =
            self.claim_service(&desired.port, before.and_then(|(_, service_id)| service_id))?;
        let set = RunContent::of(desired);
        let run = match self.use_run(service_id, ipv6, &set) {
            Ok(run) => run,
            Err(full) => {
                if is_new {
                    self.unclaim_service(service_id);
                }
                return Err(full);
            }
        };
        let frontend = Frontend {
            run,
            service_id,
            affinity_seconds: desired.affinity_seconds,
            flags: desired.flags | desired.balance.flag(),
            health: desired.health,
        };
        if let Some((id, _)) = before {
            self.change_frontend(id, frontend);
        } else {
            let Some(id) = self.frontend_ids.take() else {
                self.release_run(service_id, ipv6, &set);
                self.release_unused_service(service_id);
                return Err(Full::Services { capacity: self.capacity.services });
            };
            self.ops.push(Op::WriteFrontend { id, frontend });
            self.ops.push(Op::InsertService { address, frontend_id: id });
            self.image.frontends.insert(id, frontend);
            self.image.services.insert(address, id);
            self.n_services[usize::from(ipv6)] += 1;
        }
        let frontend_id = self.image.services[&address];
        if let Some(port) = self.ports.get_mut(&service_id) {
            port.n_frontends += 1;
        }
        let state = FrontendState { frontend_id, service_id: Some(service_id), set: Some(set) };
        if let Some(old) = self.placed.insert(address, state) {
            self.release(&old, ipv6);
        }
        Ok(())
    }

    fn change_frontend(&mut self, id: u32, frontend: Frontend) {
        if let Some(old) = self.image.frontends.insert(id, frontend) {
            self.ops.extend(changes(id, old, frontend));
        }
    }

    fn remove(&mut self, address: &FrontendAddress) {
        let Some(old) = self.placed.remove(address) else { return };
        let ipv6 = address.ip.is_ipv6();
        self.ops.push(Op::DeleteService(*address));
        self.ops.push(Op::DropFrontend(old.frontend_id));
        self.image.services.remove(address);
        self.image.frontends.remove(&old.frontend_id);
        self.n_services[usize::from(ipv6)] -= 1;
        self.n_leaving[usize::from(ipv6)] += 1;
        self.freed.n_keys[usize::from(ipv6)] += 1;
        self.freed.frontend_ids.push(old.frontend_id);
        self.release(&old, ipv6);
    }

    /// Releases what a frontend used.
    fn release(&mut self, old: &FrontendState, ipv6: bool) {
        if let FrontendState { service_id: Some(service_id), set: Some(set), .. } = old {
            self.release_run(*service_id, ipv6, set);
            self.release_frontend_of(*service_id);
        }
    }

    /// The id of a service port, and whether it is new: its current id, else the adopted one of its address,
    /// else a new one.
    fn claim_service(&mut self, key: &Arc<PortKey>, adopted: Option<u32>) -> Result<(u32, bool), Full> {
        if let Some(&id) = self.service_ids_by_port.get(key) {
            return Ok((id, false));
        }
        let unclaimed =
            adopted.and_then(|id| Some((id, self.ports.get_mut(&id).filter(|port| port.key.is_none())?)));
        let (id, is_new) = if let Some((id, port)) = unclaimed {
            port.key = Some(Arc::clone(key));
            (id, false)
        } else {
            let id = self.service_ids.take().ok_or(Full::Services { capacity: self.capacity.services })?;
            self.ops.push(Op::ResetService(id));
            self.ports.insert(id, Port { key: Some(Arc::clone(key)), ..Port::default() });
            (id, true)
        };
        self.service_ids_by_port.insert(Arc::clone(key), id);
        Ok((id, is_new))
    }

    /// Undoes the last [`Self::claim_service`], whose id is unused.
    fn unclaim_service(&mut self, id: u32) {
        if let Some(key) = self.ports.remove(&id).and_then(|port| port.key) {
            self.service_ids_by_port.remove(&key);
        }
        self.service_ids.put_back(id);
        let reset = self.ops.pop();
        debug_assert_eq!(reset, Some(Op::ResetService(id)));
    }

    /// The port's run of a set of endpoints; a new one if it has none.
    fn use_run(&mut self, service_id: u32, ipv6: bool, set: &RunContent) -> Result<Run, Full> {
        if set.endpoints.is_empty() {
            return Ok(Run::EMPTY);
        }
        let capacity = self.capacity.endpoints;
        let needed = u32::try_from(set.n_entries()).unwrap_or(u32::MAX);
        let full = Full::Endpoints { capacity, needed };
        let Some(port) = self.ports.get_mut(&service_id) else { return Err(full) };
        if let Some((run, n_users)) = port.runs.get_mut(set) {
            *n_users += 1;
            return Ok(*run);
        }
        if set.endpoints.len() > limits::MAX_RUN as usize || set.spill().len() > limits::MAX_RUN as usize {
            return Err(full);
        }
        let offset = self.space[usize::from(ipv6)].take(needed).ok_or(full)?;
        let mut fresh = Vec::new();
        for address in set.addresses().filter(|address| port.ids.get(&place(address)).is_none()) {
            let Some(id) = self.endpoint_ids.take() else {
                self.space[usize::from(ipv6)].free(offset, needed);
                for (_, (id, _)) in fresh {
                    self.endpoint_ids.put_back(id);
                }
                return Err(full);
            };
            fresh.push((place(address), (id, 0)));
        }
        if !fresh.is_empty() {
            self.ops.push(Op::ResetEndpoints(fresh.iter().map(|(_, (id, _))| *id).collect()));
        }
        port.ids.extend(fresh.into_iter());
        for address in set.addresses() {
            if let Some((_, n_runs)) = port.ids.get_mut(&place(address)) {
                *n_runs += 1;
            }
        }
        let stored = set.stored(|address| port.ids.get(&place(address)).map_or(u32::MAX, |(id, _)| *id));
        let run = stored.at(offset);
        port.runs.extend([(set.clone(), (run, 1))].into_iter());
        self.image.runs_mut(ipv6).insert(offset, stored.clone());
        self.ops.push(Op::WriteRun { ipv6, offset, run: stored });
        Ok(run)
    }

    fn release_run(&mut self, service_id: u32, ipv6: bool, set: &RunContent) {
        let Some(port) = self.ports.get_mut(&service_id) else { return };
        let Some((run, n_users)) = port.runs.get_mut(set) else { return };
        *n_users -= 1;
        if *n_users > 0 {
            return;
        }
        let run = *run;
        port.runs.retain(|(_, (_, n_users))| *n_users > 0);
        for address in set.addresses() {
            if let Some((_, n_runs)) = port.ids.get_mut(&place(address)) {
                *n_runs -= 1;
            }
        }
        let endpoint_ids = &mut self.freed.endpoint_ids;
        port.ids.retain(|(_, (id, n_runs))| {
            if *n_runs == 0 {
                endpoint_ids.push(*id);
            }
            *n_runs > 0
        });
        self.drop_run(ipv6, run.offset);
    }

    fn drop_run(&mut self, ipv6: bool, offset: u32) {
        if let Some(stored) = self.image.runs_mut(ipv6).remove(&offset) {
            self.freed.runs[usize::from(ipv6)].push((offset, stored.n_entries()));
        }
        self.ops.push(Op::DropRun { ipv6, offset });
    }

    fn release_frontend_of(&mut self, service_id: u32) {
        if let Some(port) = self.ports.get_mut(&service_id) {
            port.n_frontends -= 1;
        }
        self.release_unused_service(service_id);
    }

    fn release_unused_service(&mut self, service_id: u32) {
        if self.ports.get(&service_id).is_some_and(|port| port.n_frontends == 0)
            && let Some(port) = self.ports.remove(&service_id)
        {
            if let Some(key) = port.key {
                self.service_ids_by_port.remove(&key);
            }
            self.freed.service_ids.push(service_id);
        }
    }

    /// Sets the addresses that node ports answer on: address → whether it is this node's. Returns how many do
    /// not fit. If [`Self::holds_back`], they may fit after the next grace period.
    pub fn set_node_addrs(&mut self, desired: &BTreeMap<IpAddr, bool>) -> usize {
        let known = self.image.node_addrs.keys();
        let gone: Vec<IpAddr> = known.filter(|address| !desired.contains_key(address)).copied().collect();
        for address in gone {
            let _has_room = self.set_address(AddressTable::Nodes, address, None);
        }
        let own_first =
            [true, false].into_iter().flat_map(|own| desired.iter().filter(move |node| *node.1 == own));
        let has_room =
            own_first.map(|(&address, &own)| self.set_address(AddressTable::Nodes, address, Some(own)));
        has_room.filter(|has_room| !has_room).count()
    }

    /// Sets or removes the flag of an address. Call it at most once per address between two calls of
    /// [`Self::take_plan`]. Returns `false` if the table is full; if [`Self::holds_back`], it may succeed
    /// after the next grace period.
    #[must_use]
    pub fn set_address(&mut self, table: AddressTable, address: IpAddr, flag: Option<bool>) -> bool {
        let n_leaving = &mut self.n_addresses_leaving[table as usize];
        let known = self.image.addresses_mut(table);
        let Some(flag) = flag else {
            if known.remove(&address).is_some() {
                self.ops.push(Op::DeleteAddress(table, address));
                self.freed.n_addresses[table as usize] += 1;
                *n_leaving += 1;
            }
            return true;
        };
        match known.get(&address) {
            Some(&old) if old == flag => return true,
            Some(_) => self.freed.has_replaced_element = true,
            None if known.len() + *n_leaving >= table.capacity() as usize => return false,
            None => {}
        }
        known.insert(address, flag);
        self.ops.push(Op::InsertAddress { table, address, flag });
        true
    }

    /// Sets the service networks. Returns `false` if it only removed former ones: a program reads a network
    /// in several steps, so a grace period must pass before others are set. Call it at most once between two
    /// calls of [`Self::take_plan`].
    #[must_use]
    pub fn set_service_cidrs(&mut self, desired: &[Cidr]) -> bool {
        let next = if self.image.service_cidrs == desired {
            return true;
        } else if self.image.service_cidrs.is_empty() {
            if self.may_read_cidrs {
                return false;
            }
            desired
        } else {
            (self.freed.service_cidrs, self.may_read_cidrs) = (true, true);
            &[]
        };
        self.image.service_cidrs = next.to_vec();
        self.ops.push(Op::SetServiceCidrs(next.into()));
        next == desired
    }

    /// Whether a program may still use a removed service network. Until a grace period has passed, no cluster
    /// IP may be deleted: programs would treat it as unallocated.
    #[must_use]
    pub const fn may_read_cidrs(&self) -> bool {
        self.may_read_cidrs
    }

    /// The ops of all changes since the last call.
    #[must_use]
    pub fn take_plan(&mut self) -> Plan {
        self.remove_leftovers();
        self.n_plans += 1;
        let frees = self.freed != Freed::default();
        if frees {
            self.held_back.push_back((self.n_plans, std::mem::take(&mut self.freed)));
        }
        Plan::ordered(self.n_plans, std::mem::take(&mut self.ops), frees)
    }

    /// Reports that a grace period has passed since the plan of this number was executed. What it and earlier
    /// plans freed can be reused.
    pub fn settled(&mut self, plan: u64) {
        while self.held_back.front().is_some_and(|(number, _)| *number <= plan)
            && let Some((_, freed)) = self.held_back.pop_front()
        {
            self.frontend_ids.free(freed.frontend_ids);
            self.service_ids.free(freed.service_ids);
            self.endpoint_ids.free(freed.endpoint_ids);
            for table in AddressTable::ALL {
                self.n_addresses_leaving[table as usize] -= freed.n_addresses[table as usize];
            }
            self.may_read_cidrs &= !freed.service_cidrs;
            for (family, runs) in freed.runs.into_iter().enumerate() {
                self.n_leaving[family] -= freed.n_keys[family];
                for (offset, len) in runs {
                    self.space[family].free(offset, len);
                }
            }
        }
    }

    /// Whether freed entries wait for a grace period.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        !self.held_back.is_empty()
    }
}

/// The ops that change an entry of `frontends` in use.
///
/// With the flag of the external policy Local, programs ignore the run for calls to other nodes. So it is set
/// before the switch to a Local frontend's run and cleared after the switch from it.
pub(super) fn changes(id: u32, old: Frontend, new: Frontend) -> impl Iterator<Item = Op> {
    let differs = Frontend { run: new.run, ..old } != new;
    let set = differs.then_some(Op::SetFrontend { id, frontend: new });
    let switch = (old.run != new.run).then_some(Op::SwitchRun { id, run: new.run });
    let is_local = new.flags & frontend_flags::EXTERNAL_LOCAL != 0;
    let (first, second) = if is_local { (set, switch) } else { (switch, set) };
    first.into_iter().chain(second)
}

#[cfg(test)]
mod tests;
