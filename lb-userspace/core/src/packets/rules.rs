//! The tables of both families, kept with the desired state.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    mem,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    ops::RangeInclusive,
    sync::Arc,
};

use super::{
    diff,
    nft::{Change, Element, Family, Key, Name, Octets, Table, TableId, Transaction, Value},
    skeleton::{self, Form, Ground, INSIDE, Masquerade, Pick, Side, address, affinity_set},
    table_id,
};
use crate::{
    desired::{Frontend, FrontendAddress, FrontendKind, PacketMode, PacketSide},
    model::{Cidr, Protocol, TrafficPolicy, address as ip},
};

/// What the rules depend on beside the frontends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// The addresses of this node on which node ports answer.
    pub node_addresses: BTreeSet<IpAddr>,
    /// The networks of this node's pods.
    pub pods: BTreeSet<Cidr>,
    /// The networks of cluster IPs.
    pub networks: BTreeSet<Cidr>,
}

/// What the kernel may have recorded about endpoints that are no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stale {
    /// Elements of [`super::AFFINITY_MAPS`]: see [`Rules::stale_clients`].
    pub clients: bool,
    /// Flows of UDP and SCTP.
    pub flows: bool,
    /// Frontends of UDP and SCTP that were removed. What they translated is stale.
    pub removed: BTreeSet<FrontendAddress>,
}

impl Stale {
    /// Everything that lists show.
    #[must_use]
    pub const fn all() -> Self {
        Self { clients: true, flows: true, removed: BTreeSet::new() }
    }

    /// Adds what another has.
    pub fn merge(&mut self, other: Self) {
        self.clients |= other.clients;
        self.flows |= other.flows;
        self.removed.extend(other.removed);
    }
}

/// The desired tables `ip socklb` and `ip6 socklb`, and what has changed since the last transaction.
#[derive(Debug)]
pub struct Rules {
    /// Those that are served: none with [`PacketMode::Off`].
    families: Vec<FamilyRules>,
}

impl Rules {
    /// Tables without services. With [`PacketMode::Off`] there is no table.
    #[must_use]
    pub fn new(mode: PacketMode, node_ports: &RangeInclusive<u16>) -> Self {
        let families: &[Family] = if mode == PacketMode::Off { &[] } else { &[Family::V4, Family::V6] };
        Self { families: families.iter().map(|family| FamilyRules::new(mode, *family, node_ports)).collect() }
    }

    /// The tables.
    pub fn ids(&self) -> impl Iterator<Item = TableId> {
        self.families.iter().map(FamilyRules::id)
    }

    /// Leaves out a family, for which the kernel cannot have rules.
    pub fn leave_out(&mut self, family: Family) {
        self.families.retain(|rules| rules.now.family != family);
    }

    /// Sets what answers packets to an address; `None` removes it.
    pub fn set(&mut self, at: FrontendAddress, frontend: Option<(&Frontend, &PacketSide)>) {
        if let Some(rules) = self.of_mut(ip::family(at.ip)) {
            rules.set(at, frontend.map(|(frontend, packets)| Served::new(frontend, packets)));
        }
    }

    /// Sets what the rules depend on beside the frontends.
    pub fn set_site(&mut self, site: &Site) {
        for rules in &mut self.families {
            let family = rules.now.family;
            let is_of = |address: &IpAddr| ip::family(*address) == family;
            let of_family = |networks: &BTreeSet<Cidr>| {
                networks.iter().filter(|network| network.family() == family).copied().collect()
            };
            rules.now.pods = of_family(&site.pods);
            rules.now.networks = of_family(&site.networks);
            let addresses: BTreeSet<IpAddr> = site.node_addresses.iter().copied().filter(is_of).collect();
            let former = mem::replace(&mut rules.node_addresses, addresses);
            let changed: Vec<IpAddr> = former.symmetric_difference(&rules.node_addresses).copied().collect();
            for address in changed {
                rules.note("node-addresses", address, former.contains(&address));
            }
        }
    }

    /// Sets whether undefined ports of a cluster IP are refused; `None` removes it.
    pub fn set_cluster_ip(&mut self, address: IpAddr, is_refused: Option<bool>) {
        let rules = self.of_mut(ip::family(address)).filter(|rules| rules.now.mode == PacketMode::All);
        let Some(rules) = rules else { return };
        let former = match is_refused {
            Some(flag) => rules.cluster_ips.insert(address, flag),
            None => rules.cluster_ips.remove(&address),
        };
        if former != is_refused {
            rules.note("cluster-ips", address, former == Some(true));
            rules.note("other-ips", address, former == Some(false));
        }
    }

    /// The tables as they ought to be.
    #[must_use]
    pub fn tables(&self) -> BTreeMap<TableId, Table> {
        self.families.iter().map(|rules| (rules.id(), rules.table())).collect()
    }

    /// As [`Self::tables`], for a kernel whose tables become equal to them: then [`Self::take_changes`]
    /// begins there.
    #[must_use]
    pub fn adopt(&mut self) -> BTreeMap<TableId, Table> {
        for rules in &mut self.families {
            rules.before = Some(rules.ground());
            (rules.former, rules.touched) = Default::default();
        }
        self.tables()
    }

    /// The changes since the last call, as one transaction. Empty if there is none.
    ///
    /// It fits a kernel that has made all earlier ones. Otherwise compare [`Self::tables`] with the kernel's.
    #[must_use]
    pub fn take_changes(&mut self) -> Transaction {
        let mut changes = Vec::new();
        for rules in &mut self.families {
            let id = rules.id();
            changes.extend(rules.take_changes().into_iter().map(|change| (id.clone(), change)));
        }
        Transaction { changes, generation: None }
    }

    /// Whether frontends are still in sets that they have left: see [`Self::settle`].
    #[must_use]
    pub fn has_leaving(&self) -> bool {
        self.families.iter().any(|rules| !rules.leaving.is_empty())
    }

    /// Says that packets which were on their way at the last call are through. The next changes delete
    /// frontends from sets that they left before that call.
    ///
    /// A packet asks one set after the other, and a transaction may come between. So a frontend is added to
    /// its new set at once, and stays in the former one: the packet finds it in one of them.
    pub fn settle(&mut self) {
        self.families.iter_mut().for_each(FamilyRules::settle);
    }

    /// Says that endpoints of UDP or SCTP may have gone, also those that new connections did not get: flows
    /// to them are stale.
    pub fn datagrams_changed(&mut self) {
        self.families.iter_mut().for_each(|rules| rules.stale.flows = true);
    }

    /// What the kernel may have recorded about former endpoints, since the last call.
    pub fn take_stale(&mut self) -> Stale {
        let mut stale = Stale::default();
        for rules in &mut self.families {
            stale.merge(mem::take(&mut rules.stale));
        }
        stale
    }

    /// The addresses of frontends that packets to an address may be for: its own, and that of a node port.
    pub fn candidates(&self, protocol: Protocol, to: SocketAddr) -> impl Iterator<Item = FrontendAddress> {
        let family = ip::family(to.ip());
        let is_on_node = self.of(family).is_some_and(|rules| rules.node_addresses.contains(&to.ip()));
        let of_node = is_on_node.then(|| ip::unspecified(family));
        let ips = [Some(to.ip()), of_node].into_iter().flatten();
        ips.map(move |ip| FrontendAddress { ip, port: to.port(), protocol })
    }

    /// Whether new connections to a frontend may get this endpoint; `None` if there is no such frontend.
    #[must_use]
    pub fn has_endpoint(&self, at: &FrontendAddress, endpoint: &SocketAddr) -> Option<bool> {
        let served = self.of(ip::family(at.ip))?.frontends.get(at)?;
        Some(served.indexed().any(|(_, known)| known == endpoint))
    }

    /// The elements of one of [`AFFINITY_MAPS`] whose frontend does not have their endpoint for their client.
    #[must_use]
    pub fn stale_clients(&self, family: Family, recorded: &BTreeMap<Key, Element>) -> Vec<Key> {
        let Some(rules) = self.of(family) else { return Vec::new() };
        let with_affinity = || rules.frontends.iter().filter(|(_, served)| served.affinity.is_some());
        let endpoints = |side: fn(&Served) -> &Arc<[SocketAddr]>| -> BTreeSet<Vec<u8>> {
            let all = with_affinity().flat_map(|(at, served)| {
                let key = key(at);
                side(served).iter().map(move |endpoint| [&key[..], &octets(endpoint)].concat())
            });
            all.collect()
        };
        let outside = endpoints(|served| &served.endpoints);
        let inside = endpoints(|served| served.inside.as_ref().unwrap_or(&served.endpoints));
        let len = if family == Family::V4 { 4 } else { 16 };
        let is_stale = |key: &Key, element: &Element| {
            let (Some((client, frontend)), Value::Data(endpoint)) =
                (key.start.as_slice().split_at_checked(len), &element.value)
            else {
                return false;
            };
            let is_inside = rules.now.pods.iter().any(|network| {
                let (start, end) = ends(network);
                (&start[..]..=&end[..]).contains(&client)
            }) || rules.node_addresses.iter().any(|ip| address(*ip) == client);
            let endpoints = if is_inside { &inside } else { &outside };
            !endpoints.contains(&[frontend, endpoint.as_slice()].concat())
        };
        let stale = recorded.iter().filter(|(key, element)| is_stale(key, element));
        stale.map(|(key, _)| key.clone()).collect()
    }

    /// Number of frontends that packets reach, and of the elements that these have in sets.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let n_frontends = self.families.iter().map(|rules| rules.frontends.len()).sum();
        (n_frontends, self.families.iter().map(|rules| rules.n_elements).sum())
    }

    fn of(&self, family: Family) -> Option<&FamilyRules> {
        self.families.iter().find(|rules| rules.now.family == family)
    }

    fn of_mut(&mut self, family: Family) -> Option<&mut FamilyRules> {
        self.families.iter_mut().find(|rules| rules.now.family == family)
    }
}

/// A set by which a packet finds what it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Membership {
    Pick(Pick),
    Refused,
    Dropped,
}

/// What packets to a frontend get.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Served {
    form: Form,
    /// For senders outside, or for all.
    endpoints: Arc<[SocketAddr]>,
    /// For senders on this node, if they have others.
    inside: Option<Arc<[SocketAddr]>>,
    local: Arc<[SocketAddr]>,
    allowed: Option<Arc<[Cidr]>>,
    affinity: Option<NonZeroU32>,
    masquerade: Masquerade,
    /// The sets that it has left and is still in, each until the number of calls of [`Rules::settle`].
    leaving: BTreeMap<Membership, u64>,
}

impl Served {
    fn new(frontend: &Frontend, packets: &PacketSide) -> Self {
        let all = &frontend.endpoints;
        let outside = packets.outside.as_ref();
        Self {
            form: form(&frontend.address),
            endpoints: Arc::clone(outside.unwrap_or(all)),
            inside: outside.map(|_| Arc::clone(all)),
            local: Arc::clone(&packets.local),
            allowed: packets.sources.clone(),
            leaving: BTreeMap::new(),
            affinity: NonZeroU32::new(frontend.affinity_seconds),
            masquerade: match (frontend.kind, frontend.policy) {
                (FrontendKind::ClusterIP, _) => Masquerade::Strangers,
                (_, TrafficPolicy::Cluster) => Masquerade::All,
                (_, TrafficPolicy::Local) => Masquerade::Own,
            },
        }
    }

    /// The sets by which a packet finds what it gets.
    fn memberships(&self) -> impl Iterator<Item = Membership> {
        let pick = |side, n_endpoints| Pick::new(self.form, side, n_endpoints).map(Membership::Pick);
        let inside = self.inside.as_ref().and_then(|inside| pick(Side::Inside, inside.len()));
        let has_inside = inside.is_some();
        let without_endpoint = if has_inside { Membership::Dropped } else { Membership::Refused };
        let none = self.endpoints.is_empty().then_some(without_endpoint);
        pick(Side::Outside, self.endpoints.len()).into_iter().chain(inside).chain(none)
    }

    /// Those, and the ones that the frontend has left.
    fn all_memberships(&self) -> impl Iterator<Item = Membership> {
        self.memberships().chain(self.leaving.keys().copied())
    }

    /// The choices that senders have.
    fn picks(&self) -> impl Iterator<Item = Pick> {
        self.all_memberships().filter_map(|membership| match membership {
            Membership::Pick(pick) => Some(pick),
            Membership::Refused | Membership::Dropped => None,
        })
    }

    /// Stays for a while in the sets of its former state.
    fn keep_sets_of(&mut self, former: &Self, until: u64) {
        let own: BTreeSet<Membership> = self.memberships().collect();
        let left = former.memberships().map(|membership| (membership, until));
        self.leaving = former.leaving.clone().into_iter().chain(left).collect();
        self.leaving.retain(|membership, _| !own.contains(membership));
    }

    /// The sets that the frontend itself is in.
    fn sets(&self) -> impl Iterator<Item = Name> {
        let of_memberships = self.all_memberships().map(|membership| match membership {
            Membership::Pick(pick) => pick.set(),
            Membership::Refused => self.form.name("refused"),
            Membership::Dropped => self.form.name("dropped"),
        });
        let affinity = self.affinity.map(|seconds| affinity_set(self.form, seconds));
        let limited = self.allowed.as_ref().map(|_| "limited".into());
        of_memberships.chain(affinity).chain([self.form.name(self.masquerade.name())]).chain(limited)
    }

    /// The endpoints with their index.
    fn indexed(&self) -> impl Iterator<Item = (u32, &SocketAddr)> {
        let inside = self.inside.iter().flat_map(|inside| (INSIDE..).zip(inside.iter()));
        (0..).zip(self.endpoints.iter()).chain(inside)
    }

    /// Number of elements of the frontend.
    fn n_elements(&self) -> usize {
        let n_ranges = self.allowed.as_ref().map_or(0, |allowed| allowed.len());
        self.sets().count() + self.indexed().count() + n_ranges
    }

    /// Adds the elements of the frontend to a table.
    fn add_to(&self, table: &mut Table, at: &FrontendAddress) {
        let key = key(at);
        for set in self.sets() {
            add(table, &set, key.clone(), Value::None);
        }
        for (index, endpoint) in self.indexed() {
            let key = [&key[..], &index.to_ne_bytes()].concat();
            add(table, &self.form.name("endpoints"), key, Value::Data(octets(endpoint).into()));
        }
        for network in self.allowed.iter().flat_map(|allowed| allowed.iter()) {
            let (start, end) = ends(network);
            let range = Key {
                start: [&key[..], &start].concat().into(),
                end: Some([&key[..], &end].concat().into()),
            };
            insert(table, "allowed", range, Value::None);
        }
    }
}

#[derive(Debug)]
struct FamilyRules {
    /// What the kernel's table was made for, as of the last transaction; `None` before the first.
    before: Option<Ground>,
    now: Ground,
    frontends: BTreeMap<FrontendAddress, Served>,
    /// Those that are still in sets which they have left.
    leaving: BTreeSet<FrontendAddress>,
    n_settled: u64,
    /// Of `frontends` together: [`Served::n_elements`].
    n_elements: usize,
    /// The frontends that have changed, as they were.
    former: BTreeMap<FrontendAddress, Option<Served>>,
    /// How many frontends have a choice, and a time-out.
    picks: BTreeMap<Pick, usize>,
    affinities: BTreeMap<(Form, NonZeroU32), usize>,
    stale: Stale,
    /// For each endpoint on this node, how many frontends have it.
    local: BTreeMap<IpAddr, usize>,
    node_addresses: BTreeSet<IpAddr>,
    cluster_ips: BTreeMap<IpAddr, bool>,
    /// The elements of sets of addresses that may have changed, and whether they were there.
    touched: BTreeMap<(&'static str, IpAddr), bool>,
}

impl FamilyRules {
    fn new(mode: PacketMode, family: Family, node_ports: &RangeInclusive<u16>) -> Self {
        Self {
            before: None,
            now: Ground {
                family,
                mode,
                datagram_ports: skeleton::ports_without(node_ports),
                pods: BTreeSet::new(),
                networks: BTreeSet::new(),
                picks: BTreeSet::new(),
                affinities: BTreeSet::new(),
            },
            frontends: BTreeMap::new(),
            leaving: BTreeSet::new(),
            n_settled: 0,
            n_elements: 0,
            former: BTreeMap::new(),
            picks: BTreeMap::new(),
            affinities: BTreeMap::new(),
            stale: Stale::default(),
            local: BTreeMap::new(),
            node_addresses: BTreeSet::new(),
            cluster_ips: BTreeMap::new(),
            touched: BTreeMap::new(),
        }
    }

    fn id(&self) -> TableId {
        table_id(self.now.family)
    }

    fn set(&mut self, at: FrontendAddress, mut served: Option<Served>) {
        let former = self.frontends.get(&at);
        if let (Some(served), Some(former)) = (&mut served, former) {
            // It is two calls of `settle` until those that are on their way now are through for certain.
            served.keep_sets_of(former, self.n_settled + 2);
        }
        if former == served.as_ref() {
            return;
        }
        self.stale.clients |= former.is_some_and(|former| former.affinity.is_some());
        if at.protocol != Protocol::Tcp {
            // Flows may have begun before there was a frontend.
            self.stale.flows = true;
            if served.is_none() {
                self.stale.removed.insert(at);
            }
        }
        self.replace(at, served);
    }

    fn settle(&mut self) {
        self.n_settled += 1;
        for at in self.leaving.clone() {
            let Some(served) = self.frontends.get(&at) else { continue };
            let mut leaving = served.leaving.clone();
            leaving.retain(|_, until| *until > self.n_settled);
            if leaving.len() < served.leaving.len() {
                let served = Served { leaving, ..served.clone() };
                self.replace(at, Some(served));
            }
        }
    }

    fn replace(&mut self, at: FrontendAddress, served: Option<Served>) {
        if served.as_ref().is_some_and(|served| !served.leaving.is_empty()) {
            self.leaving.insert(at);
        } else {
            self.leaving.remove(&at);
        }
        if let Some(served) = &served {
            self.count(served, true);
        }
        let former = match served {
            Some(served) => self.frontends.insert(at, served),
            None => self.frontends.remove(&at),
        };
        if let Some(former) = &former {
            self.count(former, false);
        }
        // The oldest counts: it is what the kernel has.
        self.former.entry(at).or_insert(former);
    }

    fn count(&mut self, served: &Served, is_added: bool) {
        if is_added {
            self.n_elements += served.n_elements();
        } else {
            self.n_elements -= served.n_elements();
        }
        for pick in served.picks() {
            count(&mut self.picks, pick, is_added);
        }
        if let Some(seconds) = served.affinity {
            count(&mut self.affinities, (served.form, seconds), is_added);
        }
        for endpoint in served.local.iter() {
            let was_there = self.local.contains_key(&endpoint.ip());
            count(&mut self.local, endpoint.ip(), is_added);
            if was_there != self.local.contains_key(&endpoint.ip()) {
                self.note("hairpin", endpoint.ip(), was_there);
            }
        }
    }

    /// Notes that an element of a set of addresses may change, and whether it was there.
    fn note(&mut self, set: &'static str, address: IpAddr, was_there: bool) {
        self.touched.entry((set, address)).or_insert(was_there);
    }

    fn ground(&self) -> Ground {
        Ground {
            picks: self.picks.keys().copied().collect(),
            affinities: self.affinities.keys().copied().collect(),
            ..self.now.clone()
        }
    }

    fn table(&self) -> Table {
        let mut table = skeleton::table(&self.ground());
        for (at, served) in &self.frontends {
            served.add_to(&mut table, at);
        }
        for ip in self.local.keys() {
            add_address(&mut table, "hairpin", *ip);
        }
        for ip in &self.node_addresses {
            add_address(&mut table, "node-addresses", *ip);
        }
        for (ip, is_refused) in &self.cluster_ips {
            add_address(&mut table, if *is_refused { "cluster-ips" } else { "other-ips" }, *ip);
        }
        table
    }

    /// Compares the table that was with the one that is, without the elements that stay.
    fn take_changes(&mut self) -> Vec<Change> {
        let now = self.ground();
        let Some(before) = self.before.replace(now.clone()) else {
            (self.former, self.touched) = Default::default();
            return diff(None, &self.table());
        };
        let (former, touched) = (mem::take(&mut self.former), mem::take(&mut self.touched));
        if before == now && former.is_empty() && touched.is_empty() {
            return Vec::new();
        }
        // Equal chains need no comparison.
        let make = if before == now { skeleton::sets } else { skeleton::table };
        let (mut old, mut new) = (make(&before), make(&now));
        for (at, former) in &former {
            if let Some(former) = former {
                former.add_to(&mut old, at);
            }
            if let Some(served) = self.frontends.get(at) {
                served.add_to(&mut new, at);
            }
        }
        for ((set, ip), was_there) in touched {
            if was_there {
                add_address(&mut old, set, ip);
            }
            if self.has(set, ip) {
                add_address(&mut new, set, ip);
            }
        }
        diff(Some(&old), &new)
    }

    fn has(&self, set: &str, ip: IpAddr) -> bool {
        match set {
            "hairpin" => self.local.contains_key(&ip),
            "node-addresses" => self.node_addresses.contains(&ip),
            "cluster-ips" => self.cluster_ips.get(&ip) == Some(&true),
            _ => self.cluster_ips.get(&ip) == Some(&false),
        }
    }
}

/// The frontends with endpoints in a table of the kernel.
#[must_use]
pub fn frontends_of(family: Family, table: &Table) -> BTreeSet<FrontendAddress> {
    let of_form = |form: Form| {
        let set = table.sets.get(&form.name("endpoints"));
        set.into_iter()
            .flat_map(|set| set.elements.keys())
            .filter_map(move |key| frontend_of(family, form, key.start.as_slice()))
    };
    Form::ALL.into_iter().flat_map(of_form).collect()
}

/// The frontend whose [`key`] is the first part of these octets.
fn frontend_of(family: Family, form: Form, octets: &[u8]) -> Option<FrontendAddress> {
    let (ip, rest) = match (form, family) {
        (Form::NodePort, _) => (ip::unspecified(family), octets),
        (Form::Address, Family::V4) => {
            octets.split_first_chunk::<4>().map(|(ip, rest)| (IpAddr::from(*ip), rest))?
        }
        (Form::Address, Family::V6) => {
            octets.split_first_chunk::<16>().map(|(ip, rest)| (IpAddr::from(*ip), rest))?
        }
    };
    let [number, _, _, _, high, low, ..] = *rest else { return None };
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = all.into_iter().find(|protocol| protocol.number() == number)?;
    Some(FrontendAddress { ip, port: u16::from_be_bytes([high, low]), protocol })
}

/// The key of a frontend, as registers hold it.
fn key(at: &FrontendAddress) -> Vec<u8> {
    let protocol = at.protocol.number();
    let address = if form(at) == Form::Address { address(at.ip) } else { Vec::new() };
    [address, vec![protocol, 0, 0, 0], port(at.port).to_vec()].concat()
}

/// A node port has the unspecified address.
const fn form(at: &FrontendAddress) -> Form {
    if at.ip.is_unspecified() { Form::NodePort } else { Form::Address }
}

/// The address and port of an endpoint, as registers hold them.
fn octets(endpoint: &SocketAddr) -> Vec<u8> {
    [address(endpoint.ip()), port(endpoint.port()).to_vec()].concat()
}

/// A port as a register holds it.
const fn port(number: u16) -> [u8; 4] {
    let [high, low] = number.to_be_bytes();
    [high, low, 0, 0]
}

/// The first and the last address of a network.
fn ends(network: &Cidr) -> (Vec<u8>, Vec<u8>) {
    let (start, mask) = (address(network.address), address(network.mask()));
    let end = start.iter().zip(&mask).map(|(octet, mask)| octet | !mask).collect();
    (start, end)
}

fn add(table: &mut Table, set: &str, key: impl Into<Octets>, value: Value) {
    insert(table, set, Key::from(key), value);
}

fn add_address(table: &mut Table, set: &str, ip: IpAddr) {
    let octets = address(ip);
    let key = if set == "hairpin" { [&octets[..], &octets].concat() } else { octets };
    add(table, set, key, Value::None);
}

/// Sets that the mode has no use for do not exist.
fn insert(table: &mut Table, set: &str, key: Key, value: Value) {
    if let Some(set) = table.sets.get_mut(set) {
        set.elements.insert(key, value.into());
    }
}

fn count<K: Ord>(counts: &mut BTreeMap<K, usize>, key: K, is_added: bool) {
    let n = counts.entry(key);
    match (n, is_added) {
        (entry, true) => *entry.or_default() += 1,
        (Entry::Occupied(mut entry), false) if *entry.get() > 1 => *entry.get_mut() -= 1,
        (Entry::Occupied(entry), false) => drop(entry.remove()),
        (Entry::Vacant(_), false) => {}
    }
}

#[cfg(test)]
mod tests;
