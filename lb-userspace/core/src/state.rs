//! The agent's state as a value: objects in, plans out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use imbl::OrdMap;
use lb_common::limits;

use crate::{
    desired::{
        self, ClusterIps, Desired, FrontendAddress, PortKey, Settings, Topology, cluster_ips,
        endpoints::PortEndpoints,
        health::{self, HealthCheck},
        slow_start::SlowStart,
    },
    model::{
        Cidr, Family, Issue, IssueKind, ObjectRef, Protocol, Service, ServiceKey, Slice, Store,
        store::Changes,
    },
    packets::{
        Rules, Site, Stale,
        conntrack::{self, Entry},
        nft::{Table, TableId, Transaction},
    },
    plan::{Capacity, Encoder, Full, Plan, audit::Suspects},
    stale::{CurrentState, Fate, Flow, Flows, Search, StaleTracker},
    tables::{AddressTable, Image, MapUse},
};

/// The objects, and the maps that follow them, after one sync.
///
/// A clone costs a few references, whatever the number of objects: it shares what later syncs do not change.
#[derive(Clone, Debug)]
pub struct View {
    /// The settings.
    pub settings: Settings,
    /// Addresses of this node's interfaces.
    pub interfaces: Vec<IpAddr>,
    /// The objects.
    pub store: Store,
    /// The content of the maps.
    pub image: Image,
    /// The service ports with frontends in the maps, each with the id of its counters.
    pub ports: OrdMap<Arc<PortKey>, u32>,
    /// The endpoint ids of the image are below this number.
    pub n_endpoint_ids: u32,
}

/// The objects, the desired frontends, and the target image of the maps.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    interfaces: Vec<IpAddr>,
    store: Store,
    /// The agent's own service, which does not come from a source.
    kept: Option<(Service, Vec<Slice>)>,
    topology: Topology,
    desired: Desired,
    encoder: Encoder,
    /// What the next sync recomputes.
    dirty: Changes,
    /// Frontends that did not fit into the tables.
    refused: BTreeMap<FrontendAddress, Full>,
    /// Number of node addresses that do not fit.
    n_nodes_waiting: usize,
    cluster_ips: ClusterIps,
    /// Addresses whose flag in `cluster_ips` may change with the next sync.
    touched_ips: BTreeSet<IpAddr>,
    /// Cluster IPs that do not fit. Meanwhile no service network is in force: programs would treat these
    /// addresses as unallocated.
    ips_waiting: BTreeSet<IpAddr>,
    /// Whether service networks wait for a grace period after the removal of former ones.
    are_cidrs_waiting: bool,
    /// Former cluster IPs that wait for a grace period after the removal of service networks.
    ips_leaving: BTreeSet<IpAddr>,
    /// Keys that are missing in the maps: see [`Self::missing`].
    missing: Suspects,
    /// Whether room was freed since the last sync.
    has_new_room: bool,
    issues: BTreeMap<ServiceKey, Vec<Issue>>,
    health_checks: BTreeMap<ServiceKey, HealthCheck>,
    stale: StaleTracker,
    slow_start: SlowStart,
    packets: Rules,
    /// Until the first sync the maps may hold unused frontends of an earlier agent.
    is_first_sync: bool,
}

impl State {
    /// A state without objects that adopts maps with the content `found`.
    ///
    /// `interfaces` are the addresses of this node's interfaces.
    #[must_use]
    pub fn new(settings: Settings, interfaces: Vec<IpAddr>, capacity: Capacity, found: &Image) -> Self {
        let store = Store::new();
        let topology = Topology::new(store.nodes(), &settings, &interfaces);
        let packets = Rules::new(settings.packets, &settings.node_ports);
        Self {
            settings,
            interfaces,
            store,
            kept: None,
            topology,
            desired: Desired::new(),
            encoder: Encoder::adopt(capacity, found),
            dirty: Changes { topology: true, ..Changes::default() },
            refused: BTreeMap::new(),
            n_nodes_waiting: 0,
            cluster_ips: ClusterIps::default(),
            touched_ips: BTreeSet::new(),
            ips_waiting: BTreeSet::new(),
            are_cidrs_waiting: false,
            ips_leaving: BTreeSet::new(),
            missing: Suspects::default(),
            has_new_room: false,
            issues: BTreeMap::new(),
            health_checks: BTreeMap::new(),
            stale: StaleTracker::default(),
            slow_start: SlowStart::default(),
            packets,
            is_first_sync: true,
        }
    }

    /// Sets the agent's own service and its slices. They stay, whatever the source lists.
    pub fn keep(&mut self, service: Service, slices: Vec<Slice>) {
        self.kept = Some((service, slices));
        self.change(|_store| Changes::default());
    }

    /// Changes the objects. The next [`Self::sync`] applies it.
    pub fn change(&mut self, change: impl FnOnce(&mut Store) -> Changes) {
        let changes = change(&mut self.store);
        self.dirty.merge(changes);
        // A list of all objects removes the agent's own ones.
        if let Some((service, slices)) = &self.kept {
            self.dirty.merge(self.store.set_service(&service.key, Some(service.clone())));
            for slice in slices {
                self.dirty.merge(self.store.set_slice(&slice.key(), Some(slice.clone())));
            }
        }
    }

    /// Sets the addresses of this node's interfaces.
    pub fn set_interfaces(&mut self, interfaces: Vec<IpAddr>) {
        if self.interfaces != interfaces {
            self.interfaces = interfaces;
            self.dirty.topology = true;
        }
    }

    /// Number of frontends and addresses that are not in the maps for lack of room.
    #[must_use]
    pub fn n_refused(&self) -> usize {
        let n_missing = self.missing.services.len() + self.missing.addresses.len();
        self.refused.len() + self.n_nodes_waiting + self.ips_waiting.len() + n_missing
    }

    /// Keys of [`Self::image`] that are missing in the maps, because another program's entries fill them.
    /// Audits repair that.
    #[must_use]
    pub fn missing(&self) -> &Suspects {
        &self.missing
    }

    /// Reports keys of the last plan for which a map was full.
    pub fn miss(&mut self, keys: Suspects) {
        self.touch(&keys);
        self.missing.extend(keys);
        self.missing.retain_in(self.encoder.image());
    }

    /// Reports that an audit inserted all missing keys except these.
    pub fn found(&mut self, missing: Suspects) {
        for address in self.missing.services.difference(&missing.services) {
            self.stale.appeared(address);
        }
        let former = std::mem::replace(&mut self.missing, missing);
        self.touch(&former);
    }

    /// Marks what depends on these keys for recomputation.
    fn touch(&mut self, keys: &Suspects) {
        let ips = keys.services.iter().map(|address| address.ip);
        self.touched_ips.extend(ips.chain(keys.addresses.iter().map(|(_, ip)| *ip)));
    }

    /// Sets the time. The next [`Self::sync`] applies the shares that a slow start has changed. Without a
    /// call of this, no endpoint is new.
    pub fn advance(&mut self, now: Instant) {
        self.dirty.services.extend(self.slow_start.advance(now));
    }

    /// When [`Self::advance`] has to be called next.
    #[must_use]
    pub fn next_share_due(&self) -> Option<Instant> {
        self.slow_start.next_due()
    }

    /// Whether a sync may have an effect.
    #[must_use]
    pub fn needs_sync(&self) -> bool {
        let is_waiting = !self.refused.is_empty()
            || self.n_nodes_waiting > 0
            || !self.ips_waiting.is_empty()
            || !self.ips_leaving.is_empty()
            || self.are_cidrs_waiting;
        let is_dirty = !self.dirty.is_empty() || !self.touched_ips.is_empty();
        is_dirty || (is_waiting && self.has_new_room)
    }

    /// Computes the plan for the changes since the last sync, in time proportional to what they affect.
    ///
    /// Execute the plan before the next sync. If that fails, call [`Self::adopt`].
    #[must_use]
    pub fn sync(&mut self) -> Plan {
        let dirty = std::mem::take(&mut self.dirty);
        self.has_new_room = false;
        let mut services = dirty.services;
        if dirty.topology {
            let topology = Topology::new(self.store.nodes(), &self.settings, &self.interfaces);
            let networks = cluster_ips::merged(self.service_cidrs()).0;
            let is_all = networks != self.cluster_ips.networks() || self.is_first_sync;
            if is_all {
                self.touched_ips.extend(self.cluster_ips.iter());
                self.cluster_ips.set_networks(networks);
            }
            if is_all || topology != self.topology {
                let former = std::mem::replace(&mut self.topology, topology);
                self.n_nodes_waiting = self.encoder.set_node_addrs(&self.topology.node_addresses());
                // All services of a large cluster take longer than a change may wait.
                let affected = self.store.services().filter(|service| {
                    is_all || desired::service::is_affected(service, &former, &self.topology)
                });
                services.extend(affected.map(|service| service.key.clone()));
            }
            self.touched_ips.extend(self.cluster_ips.set_local(&self.interfaces));
            self.packets.set_site(&Site {
                node_addresses: self.topology.own_addresses().clone(),
                pods: self.topology.pods().clone(),
                networks: self.cluster_ips.networks().iter().copied().collect(),
            });
        }
        if self.n_nodes_waiting > 0 {
            self.n_nodes_waiting = self.encoder.set_node_addrs(&self.topology.node_addresses());
        }
        let mut touched: BTreeSet<FrontendAddress> = self.refused.keys().copied().collect();
        for key in services {
            touched.extend(self.compute(&key));
            let has_datagrams =
                |service: &Service| service.ports.iter().any(|port| port.protocol != Protocol::Tcp);
            if self.store.service(&key).is_some_and(has_datagrams) {
                self.packets.datagrams_changed();
            }
        }
        if std::mem::take(&mut self.is_first_sync) {
            touched.extend(self.encoder.addresses().copied());
            self.touched_ips.extend(self.cluster_ips.iter());
            self.touched_ips.extend(self.encoder.image().cluster_ips.keys());
        }
        self.touched_ips.extend(touched.iter().map(|address| address.ip));
        for address in touched {
            let of_packets = self.desired.packet_owner(&address);
            // The agent's own Service has endpoints on loopback.
            let kept = self.kept.as_ref().map(|(service, _)| &service.key);
            self.packets.set(address, of_packets.filter(|(owner, _)| Some(&owner.port.service) != kept));
            let (owner, was_there) =
                (self.desired.owner(&address), self.encoder.image().services.contains_key(&address));
            match self.encoder.set(address, owner) {
                Ok(()) => {
                    self.refused.remove(&address);
                    if owner.is_some() && !was_there {
                        self.stale.appeared(&address);
                    }
                }
                Err(full) => {
                    self.refused.insert(address, full);
                }
            }
        }
        self.set_cluster_ips();
        self.encoder.take_plan()
    }

    /// The service networks of the setting and of ServiceCIDRs.
    fn service_cidrs(&self) -> impl Iterator<Item = Cidr> {
        let of_setting = self.settings.service_cidrs.as_ref();
        let of_objects = of_setting.map(|_| self.store.service_cidrs().flat_map(|object| &object.cidrs));
        of_setting.into_iter().flatten().chain(of_objects.into_iter().flatten()).copied()
    }

    /// Sets `cluster_ips` and `service_cidrs`, which decide about calls to undefined ports and unallocated
    /// addresses.
    fn set_cluster_ips(&mut self) {
        let mut ips = std::mem::take(&mut self.touched_ips);
        ips.append(&mut self.ips_waiting);
        ips.append(&mut self.ips_leaving);
        for ip in ips {
            let flag = self.cluster_ips.flag(ip);
            self.packets.set_cluster_ip(ip, flag);
            let Some(is_served) = flag else {
                if self.image().cluster_ips.contains_key(&ip) {
                    self.ips_leaving.insert(ip);
                }
                continue;
            };
            // Calls to frontends that do not fit pass unchanged instead of being refused.
            let flag = Some(is_served && !self.has_no_room(ip));
            if !self.encoder.set_address(AddressTable::ClusterIps, ip, flag) {
                self.ips_waiting.insert(ip);
            }
        }
        let is_missing = |(table, _): &(AddressTable, IpAddr)| *table == AddressTable::ClusterIps;
        let are_all_there = self.ips_waiting.is_empty() && !self.missing.addresses.iter().any(is_missing);
        let mut networks = if are_all_there { self.cluster_ips.networks() } else { &[] };
        // Cluster IPs of a former network are deleted with this plan, a new network is set with the next.
        let is_early = self.image().service_cidrs.is_empty() && !self.ips_leaving.is_empty();
        if is_early {
            networks = &[];
        }
        let has_set = self.encoder.set_service_cidrs(networks);
        self.are_cidrs_waiting =
            !has_set || (is_early && are_all_there && !self.cluster_ips.networks().is_empty());
        if !self.encoder.may_read_cidrs() {
            for ip in std::mem::take(&mut self.ips_leaving) {
                let _nothing_to_find_room_for = self.encoder.set_address(AddressTable::ClusterIps, ip, None);
            }
        }
    }

    /// Whether a frontend of an address is not in the maps for lack of room.
    fn has_no_room(&self, ip: IpAddr) -> bool {
        let all = FrontendAddress { ip, port: 0, protocol: Protocol::Tcp }..;
        let is_of_ip = |address: &FrontendAddress| address.ip == ip;
        self.refused.range(all.clone()).next().is_some_and(|(address, _)| is_of_ip(address))
            || self.missing.services.range(all).next().is_some_and(is_of_ip)
    }

    /// Computes the frontends of one service. Returns the affected addresses.
    fn compute(&mut self, key: &ServiceKey) -> BTreeSet<FrontendAddress> {
        let check = self.store.service(key).and_then(|service| {
            health::check(service, &self.store.slices_of(key), self.topology.node_name())
        });
        match check {
            Some(check) => drop(self.health_checks.insert(key.clone(), check)),
            None => drop(self.health_checks.remove(key)),
        }
        let (frontends, issues) = if let Some(service) = self.store.service(key) {
            self.slow_start.compute(service, |ramp| {
                let slices = self.store.slices_of(key);
                desired::service::frontends_at(service, slices, &self.topology, &self.settings, ramp)
            })
        } else {
            self.slow_start.forget(key);
            Default::default()
        };
        if issues.is_empty() {
            self.issues.remove(key);
        } else {
            self.issues.insert(key.clone(), issues);
        }
        self.touched_ips.extend(self.cluster_ips.set(key, self.store.service(key)));
        let touched = self.desired.set(key, frontends);
        let frontends = touched.iter().map(|address| (*address, self.desired.owner(address).is_some()));
        let selected = self.store.service(key).filter(|service| service.unselected.is_none());
        self.stale.follow(key, selected, frontends);
        touched
    }

    fn with_stale<T>(&mut self, decide: impl FnOnce(&mut StaleTracker, CurrentState<'_>) -> T) -> T {
        let (refused, dirty, is_first_sync) = (&self.refused, &self.dirty.services, self.is_first_sync);
        let missing = &self.missing.services;
        let is_behind = |frontend: &desired::Frontend| {
            let address = &frontend.address;
            let has_no_room = refused.contains_key(address) || missing.contains(address);
            is_first_sync || has_no_room || dirty.contains(&frontend.port.service)
        };
        let is_node_address = |ip| self.topology.is_node_address(ip);
        let in_force = CurrentState {
            desired: &self.desired,
            store: &self.store,
            is_behind: &is_behind,
            is_node_address: &is_node_address,
        };
        decide(&mut self.stale, in_force)
    }

    /// Begins a search for stale sockets: see [`StaleTracker::begin`].
    pub fn begin_stale_search(&mut self) {
        self.stale.begin();
    }

    /// Where to search for stale sockets: see [`StaleTracker::search`].
    #[must_use]
    pub fn search_stale(&mut self, used: &Flows, now: Instant) -> Option<Search> {
        self.with_stale(|ledger, in_force| ledger.search(used, now, in_force))
    }

    /// Reports a search as done: see [`StaleTracker::searched`].
    pub fn finish_stale_search(&mut self, search: &Search, now: Instant) {
        self.stale.searched(search, now);
    }

    /// Decides about the sockets found by a search: see [`StaleTracker::decide`].
    #[must_use]
    pub fn decide_stale(
        &mut self,
        search: &Search,
        found: &BTreeSet<Flow>,
        now: Instant,
    ) -> BTreeMap<Flow, Fate> {
        self.with_stale(|ledger, in_force| ledger.decide(search, found, now, in_force))
    }

    /// When the next known sockets are due: see [`StaleTracker::next_due`].
    #[must_use]
    pub fn next_stale_due(&mut self, now: Instant) -> Option<Instant> {
        self.with_stale(|ledger, in_force| ledger.next_due(now, in_force))
    }

    /// Reports that a grace period has passed since the plan of this number was executed ([`Plan::number`]).
    pub fn settled(&mut self, plan: u64) {
        self.has_new_room |= self.encoder.holds_back();
        self.encoder.settled(plan);
    }

    /// Whether freed entries wait for a grace period.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        self.encoder.holds_back()
    }

    /// Adopts the maps after a plan failed midway and a grace period has passed. The next sync recomputes
    /// everything.
    pub fn adopt(&mut self, capacity: Capacity, found: &Image) {
        self.encoder.start_over(capacity, found);
        self.refused.clear();
        self.missing = Suspects::default();
        self.is_first_sync = true;
        self.dirty.topology = true;
    }

    /// The changes of the packets' rules since the last call: see [`Rules::take_changes`].
    #[must_use]
    pub fn take_packet_changes(&mut self) -> Transaction {
        self.packets.take_changes()
    }

    /// The tables of the packets' rules as of the last sync, which the kernel's are made equal to: see
    /// [`Rules::adopt`].
    #[must_use]
    pub fn adopt_packet_tables(&mut self) -> BTreeMap<TableId, Table> {
        self.packets.adopt()
    }

    /// See [`Rules::leave_out`].
    pub fn leave_out_packets(&mut self, family: Family) {
        self.packets.leave_out(family);
    }

    /// See [`Rules::settle`].
    pub fn settle_packets(&mut self) {
        self.packets.settle();
    }

    /// See [`Rules::take_stale`].
    pub fn take_stale_packet_records(&mut self) -> Stale {
        self.packets.take_stale()
    }

    /// Whether a tracked flow leads to what is no endpoint of the Service that its client calls. An endpoint
    /// keeps its flows as it keeps its sockets (semantics R10). `removed`: [`Stale::removed`].
    #[must_use]
    pub fn is_stale_flow(&self, flow: &Entry, removed: &BTreeSet<FrontendAddress>) -> bool {
        conntrack::is_stale(flow, |protocol, called, answers| {
            let candidates = || self.packets.candidates(protocol, called);
            let known = candidates().find_map(|at| Some((at, self.packets.has_endpoint(&at, &answers)?)));
            let Some((at, may_have)) = known else {
                // What was not translated is another's.
                return candidates().any(|at| removed.contains(&at)).then_some(called == answers);
            };
            Some(
                may_have
                    || self.desired.packet_owner(&at).is_none_or(|(owner, _)| self.keeps(owner, &answers)),
            )
        })
    }

    /// Whether an endpoint that new calls may not reach keeps what it has. It does while its Service waits
    /// for a sync.
    fn keeps(&self, frontend: &desired::Frontend, endpoint: &SocketAddr) -> bool {
        self.dirty.services.contains(&frontend.port.service)
            || PortEndpoints::of_port(&self.store, &frontend.port).keeps_sockets(endpoint)
    }

    /// The rules for packets, as of the last sync.
    #[must_use]
    pub const fn packets(&self) -> &Rules {
        &self.packets
    }

    /// The content of the maps after the last plan is executed.
    #[must_use]
    pub fn image(&self) -> &Image {
        self.encoder.image()
    }

    /// Whether the maps hold nothing but [`Self::image`] after the last plan is executed. Before the first
    /// sync, and after [`Self::adopt`] until the next one, they may hold more.
    #[must_use]
    pub fn is_image_complete(&self) -> bool {
        !self.is_first_sync
    }

    /// What a sync has put in force. Call it between the execution of a plan and the next change: then
    /// objects and image belong together.
    #[must_use]
    pub fn view(&self) -> View {
        View {
            settings: self.settings.clone(),
            interfaces: self.interfaces.clone(),
            store: self.store.clone(),
            image: self.image().clone(),
            ports: self.encoder.service_ids().clone(),
            n_endpoint_ids: self.encoder.n_endpoint_ids(),
        }
    }

    /// How full the maps are.
    #[must_use]
    pub fn map_use(&self) -> [MapUse; 7] {
        let Capacity { services, endpoints } = self.encoder.capacity();
        let n_of = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let n_frontends = self.image().frontends.len();
        let addresses =
            |table: AddressTable| (table.map(), n_of(self.image().addresses(table).len()), table.capacity());
        [
            ("services4", self.encoder.n_services(false), services),
            ("services6", self.encoder.n_services(true), services),
            ("frontends", n_of(n_frontends), services.saturating_mul(2)),
            ("endpoints4", self.encoder.n_endpoints(false), endpoints),
            ("endpoints6", self.encoder.n_endpoints(true), endpoints),
            addresses(AddressTable::Nodes),
            addresses(AddressTable::ClusterIps),
        ]
        .map(|(map, n_entries, capacity)| MapUse { map, n_entries, capacity })
    }

    /// The health checks of services, as of the last sync.
    #[must_use]
    pub fn health_checks(&self) -> &BTreeMap<ServiceKey, HealthCheck> {
        &self.health_checks
    }

    /// The desired frontends.
    #[must_use]
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The objects.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The topology as of the last sync.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The addresses of this node's interfaces.
    #[must_use]
    pub fn interfaces(&self) -> &[IpAddr] {
        &self.interfaces
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Issues of the last sync: conflicts, full tables, addresses that are not served. Invalid objects are
    /// reported where they are read.
    pub fn issues(&self) -> impl Iterator<Item = Issue> {
        let full = self.refused.iter().filter_map(|(address, full)| {
            // Freed entries that wait for a grace period may make room shortly.
            let owner = self.desired.owner(address).filter(|_| !self.encoder.holds_back())?;
            Some(Issue::new(ObjectRef::from(&owner.port.service), full_issue(address, full)))
        });
        let missing = self.missing.services.iter().filter_map(|address| {
            let owner = self.desired.owner(address)?;
            let map = if address.ip.is_ipv6() { "services6" } else { "services4" };
            Some(Issue::new(ObjectRef::from(&owner.port.service), no_room(map, address)))
        });
        let addresses = self.missing.addresses.iter().filter_map(|(table, ip)| {
            let object = match table {
                AddressTable::Nodes => ObjectRef::node(self.topology.node_of(*ip)?),
                AddressTable::ClusterIps => ObjectRef::from(self.cluster_ips.service_of(*ip)?),
            };
            Some(Issue::new(object, no_room(table.map(), ip)))
        });
        let cluster_ips = self.ips_waiting.iter().filter_map(|ip| {
            let table = AddressTable::ClusterIps;
            let service = self.cluster_ips.service_of(*ip).filter(|_| !self.encoder.holds_back())?;
            let (map, capacity, address) = (table.map().to_owned(), table.capacity(), ip.to_string());
            Some(Issue::new(ObjectRef::from(service), IssueKind::ClusterIpsFull { map, capacity, address }))
        });
        let nodes = self.topology.left_out().map(|(node, n_left_out)| {
            let (map, capacity) = ("node_addrs".to_owned(), limits::MAX_NODE_ADDRS);
            Issue::new(ObjectRef::node(node), IssueKind::NodesFull { map, capacity, n_left_out })
        });
        let of_objects = self.issues.values().flatten().cloned().chain(self.desired.issues());
        of_objects
            .chain(full)
            .chain(missing)
            .chain(addresses)
            .chain(cluster_ips)
            .chain(nodes)
            .chain(self.service_cidrs_left_out())
    }

    /// Networks of ServiceCIDRs beyond the limit.
    fn service_cidrs_left_out(&self) -> impl Iterator<Item = Issue> {
        let (counting, n_left_out) = cluster_ips::merged(self.service_cidrs());
        let objects = self.store.service_cidrs().filter(move |_| n_left_out > 0);
        let all = objects.flat_map(|object| object.cidrs.iter().map(|network| (&object.name, network)));
        let left_out = all.filter(move |(_, network)| !counting.iter().any(|outer| outer.holds(network)));
        left_out.map(|(name, network)| {
            let (network, max) = (network.to_string(), limits::MAX_SERVICE_CIDRS);
            Issue::new(ObjectRef::service_cidr(name), IssueKind::TooManyServiceCidrs { network, max })
        })
    }
}

fn no_room(map: &str, left_out: &impl ToString) -> IssueKind {
    IssueKind::TableFull { map: map.to_owned(), left_out: left_out.to_string() }
}

fn full_issue(address: &FrontendAddress, full: &Full) -> IssueKind {
    let family = if address.ip.is_ipv6() { '6' } else { '4' };
    match *full {
        Full::Services { capacity } => IssueKind::ServicesFull {
            map: format!("services{family}"),
            capacity,
            needed: u64::from(capacity) + 1,
        },
        Full::Endpoints { capacity, needed } => {
            IssueKind::EndpointsFull { map: format!("endpoints{family}"), capacity, needed: needed.into() }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        desired::fixture,
        model::{self, Family, Protocol, Service, ServiceCidr, ServicePort, Unselected},
    };

    fn state(services: u32) -> State {
        state_over(services, &Image::default())
    }

    fn state_over(services: u32, found: &Image) -> State {
        let settings = Settings { service_cidrs: Some(vec![network()]), ..Settings::of_node("node") };
        let capacity = Capacity { services, endpoints: 16 };
        State::new(settings, Vec::new(), capacity, found)
    }

    /// The service network.
    fn network() -> Cidr {
        "10.96.0.0/16".parse().unwrap()
    }

    fn key(name: &str) -> ServiceKey {
        ServiceKey { namespace: "default".into(), name: name.into() }
    }

    fn set(state: &mut State, name: &str, last: Option<u8>) {
        let port = ServicePort { name: Arc::from(""), protocol: Protocol::Tcp, port: 80, node_port: None };
        let service = last.map(|last| Service {
            cluster_ipv4: Some(Ipv4Addr::new(10, 96, 0, last)),
            ..Service::with_ports(key(name), vec![port])
        });
        state.change(|store| store.set_service(&key(name), service));
    }

    #[test]
    fn a_view_does_not_change_and_shares_what_later_syncs_leave() {
        let mut state = state(16);
        set(&mut state, "a", Some(1));
        set(&mut state, "b", Some(2));
        let _plan = state.sync();
        let view = state.view();
        set(&mut state, "b", None);
        let _plan = state.sync();
        let services =
            |store: &Store| store.services().map(|service| service.key.clone()).collect::<Vec<_>>();
        assert_eq!(
            (services(&view.store), services(state.store())),
            (vec![key("a"), key("b")], vec![key("a")])
        );
        assert_eq!((view.image.services.len(), state.image().services.len()), (2, 1));
        assert_eq!((view.ports.len(), state.view().ports.len()), (2, 1));
        let shared = |store: &Store| Arc::as_ptr(store.shared_service(&key("a")).unwrap());
        assert_eq!(shared(&view.store), shared(state.store()));
    }

    #[test]
    fn a_full_table_names_the_service_and_is_tried_again_when_there_is_room() {
        let mut state = state(1);
        set(&mut state, "a", Some(1));
        set(&mut state, "b", Some(2));
        let _plan = state.sync();
        assert_eq!(state.image().services.len(), 1);
        let issues: Vec<String> = state.issues().map(|issue| issue.to_string()).collect();
        assert!(issues.len() == 1 && issues[0].contains("default/b"), "{issues:?}");
        assert!(!state.needs_sync(), "nothing changed: a retry has no effect");

        set(&mut state, "a", None);
        let plan = state.sync();
        assert!(
            state.image().services.is_empty(),
            "the deleted key takes room until a grace period has passed"
        );
        assert_eq!(state.issues().count(), 0, "and until then it is no issue");
        state.settled(plan.number());
        assert!(state.needs_sync());
        let _plan = state.sync();
        assert_eq!(state.image().services.len(), 1);
        assert!(!state.needs_sync());
    }

    /// It may be served by kube-proxy, which refuses undefined ports itself.
    #[test]
    fn what_has_no_room_is_left_to_the_network() {
        let (a, b) = ([10, 96, 0, 1].into(), [10, 96, 0, 2].into());
        let mut state = state(1);
        set(&mut state, "a", Some(1));
        set(&mut state, "b", Some(2));
        let plan = state.sync();
        assert_eq!(state.image().cluster_ips, [(a, true), (b, false)].into_iter().collect());
        state.settled(plan.number());
        set(&mut state, "a", None);
        let plan = state.sync();
        state.settled(plan.number());
        let _plan = state.sync();
        assert_eq!(state.image().cluster_ips, [(b, true)].into_iter().collect());

        let mut keys = Suspects::default();
        keys.services.insert(FrontendAddress { ip: b, port: 80, protocol: Protocol::Tcp });
        state.miss(keys);
        assert!(state.needs_sync());
        let _plan = state.sync();
        assert_eq!(state.image().cluster_ips, [(b, false)].into_iter().collect());
        state.found(Suspects::default());
        assert!(state.needs_sync());
        let _plan = state.sync();
        assert_eq!(state.image().cluster_ips, [(b, true)].into_iter().collect());
    }

    /// A call may read the network before its removal, and the address afterwards.
    #[test]
    fn a_cluster_ip_stays_until_its_network_is_read_no_more() {
        let ip = IpAddr::from([10, 96, 0, 1]);
        let settings = Settings { service_cidrs: Some(Vec::new()), ..state(8).settings };
        let mut state = State::new(settings, Vec::new(), Capacity::default(), &Image::default());
        set(&mut state, "a", Some(1));
        let cidr = ServiceCidr { name: "kubernetes".into(), cidrs: vec![network()] };
        state.change(|store| store.set_service_cidr("kubernetes", Some(cidr)));
        let plan = state.sync();
        state.settled(plan.number());
        assert_eq!(state.image().cluster_ips, [(ip, true)].into_iter().collect());
        state.change(|store| store.set_service_cidr("kubernetes", None));
        let plan = state.sync();
        assert!(state.image().service_cidrs.is_empty());
        assert_eq!(state.image().cluster_ips, [(ip, true)].into_iter().collect());
        assert!(!state.needs_sync(), "before a grace period has passed");
        state.settled(plan.number());
        assert!(state.needs_sync());
        let _plan = state.sync();
        assert!(state.image().cluster_ips.is_empty());
    }

    /// They apply at once, in addition to those of the setting, and not at all with `none`.
    #[test]
    fn networks_of_objects_and_of_the_setting_are_in_force_together() {
        let cidr = |name: &str, network: &str| ServiceCidr {
            name: name.into(),
            cidrs: vec![network.parse().unwrap()],
        };
        let networks = |state: &mut State| -> Vec<String> {
            // A former network was removed: a grace period must pass.
            while state.needs_sync() {
                let plan = state.sync();
                state.settled(plan.number());
            }
            state.image().service_cidrs.iter().map(ToString::to_string).collect()
        };
        let settings = [vec![], vec![network()]].map(Some).into_iter().chain([None]);
        for (service_cidrs, of_setting) in settings.zip([&[][..], &["10.96.0.0/16"], &[]]) {
            let is_off = service_cidrs.is_none();
            let settings = Settings { service_cidrs, ..state(8).settings };
            let mut state = State::new(settings, Vec::new(), Capacity::default(), &Image::default());
            set(&mut state, "a", Some(1));
            assert_eq!(networks(&mut state), of_setting);
            for (changed, of_objects) in [
                (("kubernetes", Some("10.96.0.0/12")), &["10.96.0.0/12"][..]),
                (("more", Some("10.200.0.0/24")), &["10.96.0.0/12", "10.200.0.0/24"]),
                (("kubernetes", None), &["10.200.0.0/24"]),
                (("more", None), &[]),
            ] {
                let (name, network) = changed;
                state
                    .change(|store| store.set_service_cidr(name, network.map(|network| cidr(name, network))));
                let all = of_objects.iter().chain(of_setting).map(|text| text.parse().unwrap());
                let expected = if is_off { Vec::new() } else { cluster_ips::merged(all).0 };
                let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
                assert_eq!(networks(&mut state), expected, "{changed:?}");
                let is_known = expected.iter().any(|network| network.starts_with("10.96."));
                assert_eq!(state.image().cluster_ips.len(), usize::from(is_known), "{changed:?}");
            }
            let many = (0..10).map(|n| cidr(&format!("cidr-{n}"), &format!("10.{n}.0.0/16")));
            state.change(|store| store.replace_service_cidrs(many));
            assert_eq!(networks(&mut state).len(), if is_off { 0 } else { limits::MAX_SERVICE_CIDRS });
            let issues: Vec<String> = state.issues().map(|issue| issue.to_string()).collect();
            let n_left_out = if is_off { 0 } else { 2 + of_setting.len() };
            // The network that is left out may be the setting's.
            assert!(issues.len().abs_diff(n_left_out) <= of_setting.len(), "{issues:#?}");
            assert!(issues.iter().all(|issue| issue.starts_with("ServiceCIDR cidr-")), "{issues:#?}");
        }
    }

    /// Its address stays known when its label changes, but is not served.
    #[test]
    fn a_service_of_another_proxy_is_left_alone() {
        let ip = IpAddr::from([10, 96, 0, 1]);
        let mut state = state(8);
        for is_ours in [true, false, true] {
            set(&mut state, "a", Some(1));
            if !is_ours {
                state.change(|store| {
                    let ours = store.service(&key("a")).cloned();
                    let label =
                        Some(Unselected::Labelled("service.kubernetes.io/service-proxy-name=b".into()));
                    let theirs = ours.map(|ours| Service { unselected: label, ..ours });
                    store.set_service(&key("a"), theirs)
                });
            }
            let plan = state.sync();
            assert_eq!(state.image().cluster_ips, [(ip, is_ours)].into_iter().collect());
            assert_eq!(state.image().services.len(), usize::from(is_ours));
            assert_eq!(state.image().service_cidrs, [network()]);
            state.settled(plan.number());
        }
    }

    /// Otherwise programs treat the address of a Service that does not fit as unallocated.
    #[test]
    fn no_network_is_in_force_while_a_cluster_ip_has_no_room() {
        let former = (0..limits::MAX_CLUSTER_IPS).map(|n| (IpAddr::from(Ipv4Addr::from(n)), true)).collect();
        let found = Image { cluster_ips: former, service_cidrs: vec![network()], ..Image::default() };
        let mut state = state_over(8, &found);
        set(&mut state, "a", Some(1));
        // First the network is removed, then its cluster IPs, which makes room.
        for n_former in [limits::MAX_CLUSTER_IPS as usize, 0] {
            let plan = state.sync();
            assert!(state.image().service_cidrs.is_empty());
            assert_eq!(state.image().cluster_ips.len(), n_former);
            assert_eq!(state.n_refused(), 1);
            assert!(!state.needs_sync());
            state.settled(plan.number());
            assert!(state.needs_sync());
        }
        let _plan = state.sync();
        assert_eq!(state.image().cluster_ips.len(), 1);
        assert_eq!(state.image().service_cidrs, [network()]);
        assert_eq!((state.n_refused(), state.issues().count()), (0, 0));
    }

    /// A change of another node's addresses recomputes the Services with node ports; their frontends alone
    /// depend on it.
    #[test]
    fn a_change_of_a_node_recomputes_only_affected_services() {
        for (patch, is_recomputed) in [
            (json!({}), false),
            (
                json!({"spec": {"type": "NodePort", "ports": [{"name": "", "port": 80, "nodePort": 30080}]}}),
                true,
            ),
            (json!({"spec": {"externalIPs": ["192.0.2.1"]}}), true),
        ] {
            assert_eq!(recomputes(&patch), is_recomputed, "{patch}");
        }
    }

    fn recomputes(patch: &Value) -> bool {
        let mut state = State::new(fixture::settings(), Vec::new(), Capacity::default(), &Image::default());
        let service = model::fixture::service(patch);
        let ip = service.cluster_ip(Family::V4).unwrap();
        state.change(|store| {
            let mut changes = store.replace_nodes(fixture::nodes());
            changes.merge(store.replace_services([service]));
            changes.merge(store.replace_slices([fixture::slice(&["10.1.0.1 node-a rs"])]));
            changes
        });
        let _plan = state.sync();
        let address = FrontendAddress { ip, port: 80, protocol: Protocol::Tcp };
        // Computed anew, endpoints are another allocation.
        let endpoints = |state: &State| Arc::clone(&state.desired().owner(&address).unwrap().endpoints);
        let before = endpoints(&state);
        let mut nodes = fixture::nodes();
        let other = nodes.iter_mut().find(|node| node.name != fixture::settings().node_name).unwrap();
        other.addresses.push("192.0.2.77".parse().unwrap());
        let other = other.clone();
        state.change(|store| store.set_node(&other.name, Some(other.clone())));
        let _plan = state.sync();
        assert!(state.topology().is_node_address("192.0.2.77".parse().unwrap()));
        let after = endpoints(&state);
        assert_eq!(before, after);
        !Arc::ptr_eq(&before, &after)
    }

    /// In 32 s a share grows from 10 % to 100 % of the weight.
    #[test]
    fn shares_of_new_endpoints_grow_with_the_time() {
        let start = Instant::now();
        let mut state = State::new(fixture::settings(), Vec::new(), Capacity::default(), &Image::default());
        let annotations = json!({"socklb.io/slow-start": "32s"});
        let service = model::fixture::service(&json!({"metadata": {"annotations": annotations}}));
        let ip = service.cluster_ip(Family::V4).unwrap();
        state.change(|store| {
            let mut changes = store.replace_nodes(fixture::nodes());
            changes.merge(store.replace_services([service]));
            changes
        });
        let hinted = ["10.1.0.1 - rs zone=a", "10.1.0.2 - rs zone=b"];
        for (now, what, slices, expected) in [
            (0, "the first list", Some(vec![fixture::slice(&hinted)]), None),
            (
                100,
                "an endpoint that hints have left out is not new",
                Some(vec![fixture::slice(&["10.1.0.1 - rs", "10.1.0.2 - rs"])]),
                None,
            ),
            (
                100,
                "a slice with half of the weight is new",
                Some(vec![
                    fixture::slice(&["10.1.0.1 - rs", "10.1.0.2 - rs"]),
                    fixture::weighted("50", &["10.1.0.3 - rs"]),
                ]),
                Some(&[255, 255, 13][..]),
            ),
            (101, "nothing is due", None, Some(&[255, 255, 13])),
            (102, "a step", None, Some(&[255, 255, 20])),
            (131, "the last step but one", None, Some(&[255, 255, 120])),
            (132, "all of its weight", None, Some(&[255, 255, 128])),
            (
                140,
                "weight 0",
                Some(vec![fixture::slice(&["10.1.0.1 - rs"]), fixture::weighted("0", &["10.1.0.2 - rs"])]),
                None,
            ),
            (
                150,
                "it returns",
                Some(vec![fixture::slice(&["10.1.0.1 - rs"]), fixture::weighted("100", &["10.1.0.2 - rs"])]),
                Some(&[255, 26]),
            ),
        ] {
            let due = state.next_share_due();
            let is_due = due.is_some_and(|due| due <= start + Duration::from_secs(now));
            state.advance(start + Duration::from_secs(now));
            assert_eq!(state.needs_sync(), is_due || now == 0, "{what}");
            if let Some(slices) = slices {
                state.change(|store| store.replace_slices(slices));
            }
            let _plan = state.sync();
            let address = FrontendAddress { ip, port: 80, protocol: Protocol::Tcp };
            assert_eq!(state.desired().owner(&address).unwrap().shares.as_deref(), expected, "{what}");
            assert!(!state.needs_sync(), "{what}");
        }
    }
}
