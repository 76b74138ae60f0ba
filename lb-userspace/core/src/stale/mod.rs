//! Stale sockets: which connected sockets are to be destroyed, and when.
//!
//! # Purpose
//!
//! A connected socket stays with the endpoint that `connect()` chose. TCP notices a dead peer, but a
//! resolver's UDP socket may send to a dead address for hours, and so may one that was connected to a
//! Service's address before the Service existed. [`StaleTracker`] decides which flows are stale and when
//! their sockets are due (semantics R10). `kernel::sockets` finds and destroys them.
//!
//! # Invariants
//!
//! - Level-triggered: the current state decides, not the event that made a socket stale. A restart, a missed
//!   event or a failed attempt hides none.
//! - No socket is stale before the maps are up to date: sockets of services that wait for a sync or for room
//!   are kept.
//! - The cost of a search is proportional to what may be stale. One search after the start covers all UDP
//!   sockets: an address may have become a frontend while no agent ran.
//!
//! # Depends on
//!
//! `desired`, `model`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::{
    desired::{Desired, Frontend, FrontendAddress, PortKey, endpoints::PortEndpoints},
    model::{Protocol, Service, ServiceKey, StaleConnections, Store, address},
};

/// A flow that at least one connected socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// Protocol of the socket.
    pub protocol: Protocol,
    /// The address that the program called; for a node port, the node's address. `None` if the socket is
    /// connected to the called address, which was not a frontend then.
    pub service: Option<SocketAddr>,
    /// The address that the socket is connected to.
    pub endpoint: SocketAddr,
}

/// Flows, each with the cookies of its sockets.
pub type Flows = BTreeMap<Flow, BTreeSet<u64>>;

/// The state that decides which flows are stale.
#[derive(Clone, Copy)]
pub struct CurrentState<'a> {
    /// The frontends.
    pub desired: &'a Desired,
    /// The objects.
    pub store: &'a Store,
    /// Whether the maps are not up to date for this frontend.
    pub is_behind: &'a dyn Fn(&Frontend) -> bool,
    /// Whether node ports answer on an address.
    pub is_node_address: &'a dyn Fn(IpAddr) -> bool,
}

/// What to do with the sockets of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The endpoint serves, or this is not known yet.
    Serves,
    /// The endpoint does not serve, but the sockets are kept.
    Kept,
    /// The sockets are to be destroyed.
    Ends {
        /// The called service, if it is known.
        service: Option<ServiceKey>,
        /// The time at which they are destroyed.
        due: Instant,
    },
}

/// The sockets to search for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    /// Protocols of sockets with a record of a service.
    pub protocols: BTreeSet<Protocol>,
    /// Endpoints that these sockets are connected to.
    pub endpoints: BTreeSet<SocketAddr>,
    /// Addresses that UDP sockets without a service are connected to; `None` for any address. A node port has
    /// the unspecified address.
    pub addresses: Option<BTreeSet<SocketAddr>>,
}

/// A frontend that was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gone {
    service: ServiceKey,
    policy: Option<StaleConnections>,
    pass: u64,
}

/// What is remembered between searches.
#[derive(Clone, Debug, Default)]
pub struct StaleTracker {
    /// Annotations of services.
    policies: BTreeMap<ServiceKey, StaleConnections>,
    /// Removed frontends that may have sockets: their service and its annotation.
    gone: BTreeMap<FrontendAddress, Gone>,
    /// When a flow was first found with an endpoint that does not serve.
    since: BTreeMap<Flow, Instant>,
    /// Number of the current or last search.
    pass: u64,
    /// Sockets that the current search is for.
    sought: BTreeSet<(Flow, u64)>,
    /// How many searches a socket had, and when the last was.
    tried: BTreeMap<(Flow, u64), (u8, Instant)>,
    /// UDP addresses that became frontends, and how many more searches cover the sockets connected to them.
    appeared: BTreeMap<SocketAddr, u8>,
    /// Time of the first search.
    first: Option<Instant>,
    /// Whether a search has covered all frontends: those that appeared before this agent are not known.
    was_everywhere: bool,
}

/// Consecutive searches for a stale socket, and for sockets connected to a new frontend. The second finds a
/// socket whose `connect()` was between hook and kernel during the first.
const SEARCHES: u8 = 2;

/// Time to the next search for a socket that was not found. Its network namespace may have been unknown.
const RETRY: Duration = Duration::from_secs(60);

/// Time from the first search until sockets without a service are searched for. Meanwhile the agent finds the
/// excluded cgroups.
const SETTLING: Duration = Duration::from_secs(5);

/// The annotation, or the default: TCP notices a dead peer, UDP does not.
const fn policy_of(protocol: Protocol, annotation: Option<StaleConnections>) -> StaleConnections {
    match (annotation, protocol) {
        (Some(policy), _) => policy,
        (None, Protocol::Udp) => StaleConnections::Reset,
        (None, Protocol::Tcp | Protocol::Sctp) => StaleConnections::Keep,
    }
}

/// The frontends that may have answered a call: the address itself, or its port on all node addresses.
fn candidates(protocol: Protocol, service: SocketAddr) -> [FrontendAddress; 2] {
    let any = address::unspecified(address::family(service.ip()));
    [service.ip(), any].map(|ip| FrontendAddress { ip, port: service.port(), protocol })
}

impl StaleTracker {
    /// Records a service's annotation, and the frontends that it gained (`true`) or lost (`false`).
    pub fn follow(
        &mut self,
        key: &ServiceKey,
        service: Option<&Service>,
        frontends: impl IntoIterator<Item = (FrontendAddress, bool)>,
    ) {
        let annotation = service.and_then(Service::stale_connections);
        let former = match annotation {
            Some(policy) => self.policies.insert(key.clone(), policy),
            None => self.policies.remove(key),
        };
        // For a deleted service its former annotation applies.
        let policy = if service.is_some() { annotation } else { former };
        for (address, is_there) in frontends {
            if is_there {
                self.gone.remove(&address);
            } else {
                self.gone.insert(address, Gone { service: key.clone(), policy, pass: self.pass });
            }
        }
    }

    /// Reports that an address became a frontend in the maps.
    pub fn appeared(&mut self, address: &FrontendAddress) {
        if address.protocol == Protocol::Udp {
            self.appeared.insert(SocketAddr::new(address.ip, address.port), SEARCHES);
        }
    }

    /// Begins a search. Call it before reading the flows of sockets.
    pub fn begin(&mut self) {
        self.pass += 1;
    }

    /// The search for the given flows, or `None` if no socket can be stale.
    #[must_use]
    pub fn search(&mut self, used: &Flows, now: Instant, in_force: CurrentState<'_>) -> Option<Search> {
        self.since.retain(|since, _| used.contains_key(since));
        let services = used.keys().filter_map(|used| Some((used.protocol, used.service?)));
        self.forget_gone(services.flat_map(|(protocol, service)| candidates(protocol, service)));
        let mut judge = Decider::new(self, in_force);
        let (mut protocols, mut endpoints, mut wanted) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (used, cookies) in used {
            let is_due = matches!(judge.standing(used, now), Fate::Ends { due, .. } if due <= now);
            if !is_due && !judge.has_new_deadline(used) {
                continue;
            }
            wanted.extend(cookies.iter().map(|cookie| (*used, *cookie)));
            if cookies.iter().any(|cookie| !judge.is_tried(used, *cookie, now)) {
                protocols.insert(used.protocol);
                endpoints.insert(used.endpoint);
            }
        }
        self.tried.retain(|socket, _| wanted.contains(socket));
        wanted.retain(|(used, _)| endpoints.contains(&used.endpoint));
        self.sought = wanted;
        let has_settled = now >= *self.first.get_or_insert(now) + SETTLING;
        let addresses = match (has_settled, self.was_everywhere) {
            (false, _) => Some(BTreeSet::new()),
            (true, false) => None,
            (true, true) => Some(self.appeared.keys().copied().collect()),
        };
        let is_any =
            !endpoints.is_empty() || addresses.as_ref().is_none_or(|addresses| !addresses.is_empty());
        is_any.then_some(Search { protocols, endpoints, addresses })
    }

    /// Reports a search as done. The sockets that are due are being destroyed.
    pub fn searched(&mut self, search: &Search, now: Instant) {
        for socket in std::mem::take(&mut self.sought) {
            let (n_tries, _) = self.tried.get(&socket).copied().unwrap_or((0, now));
            self.tried.insert(socket, (n_tries.saturating_add(1), now));
        }
        let Some(addresses) = &search.addresses else {
            self.was_everywhere = true;
            return;
        };
        self.appeared.retain(|address, n_left| {
            *n_left -= u8::from(addresses.contains(address));
            *n_left > 0
        });
    }

    /// Decides about the flows that a search found.
    #[must_use]
    pub fn decide(
        &mut self,
        search: &Search,
        found: &BTreeSet<Flow>,
        now: Instant,
        in_force: CurrentState<'_>,
    ) -> BTreeMap<Flow, Fate> {
        let mut judge = Decider::new(self, in_force);
        let standings: BTreeMap<Flow, Fate> =
            found.iter().map(|used| (*used, judge.standing(used, now))).collect();
        let is_covered = |used: &Flow| {
            search.protocols.contains(&used.protocol) && search.endpoints.contains(&used.endpoint)
        };
        self.since.retain(|used, _| found.contains(used) || !is_covered(used));
        for (used, standing) in &standings {
            if *standing == Fate::Serves {
                self.since.remove(used);
            } else if used.service.is_some() {
                self.since.entry(*used).or_insert(now);
            }
        }
        standings
    }

    /// The earliest time after `now` at which known sockets are due.
    #[must_use]
    pub fn next_due(&self, now: Instant, in_force: CurrentState<'_>) -> Option<Instant> {
        let mut judge = Decider::new(self, in_force);
        let dues = self.since.keys().filter_map(|used| match judge.standing(used, now) {
            Fate::Ends { due, .. } => Some(due).filter(|due| *due > now),
            Fate::Serves | Fate::Kept => None,
        });
        dues.min()
    }

    /// Forgets removed frontends without sockets. The search may have missed sockets of those removed since
    /// it began.
    fn forget_gone(&mut self, used: impl Iterator<Item = FrontendAddress>) {
        if self.gone.is_empty() {
            return;
        }
        let (used, pass) = (used.collect::<BTreeSet<_>>(), self.pass);
        self.gone.retain(|address, gone| gone.pass >= pass || used.contains(address));
    }
}

/// Decides about any number of flows in one state. Unites the slices of each port once.
struct Decider<'a> {
    ledger: &'a StaleTracker,
    in_force: CurrentState<'a>,
    ports: BTreeMap<&'a PortKey, PortEndpoints<'a>>,
}

impl<'a> Decider<'a> {
    fn new(ledger: &'a StaleTracker, in_force: CurrentState<'a>) -> Self {
        Self { ledger, in_force, ports: BTreeMap::new() }
    }

    fn owner(&self, protocol: Protocol, service: SocketAddr) -> Option<&'a Frontend> {
        candidates(protocol, service).iter().find_map(|address| self.in_force.desired.owner(address))
    }

    fn gone(&self, protocol: Protocol, service: SocketAddr) -> Option<&'a Gone> {
        candidates(protocol, service).iter().find_map(|address| self.ledger.gone.get(address))
    }

    /// Whether a drain time starts with this flow.
    fn has_new_deadline(&mut self, used: &Flow) -> bool {
        !self.ledger.since.contains_key(used)
            && matches!(self.policy(used), Some((_, StaleConnections::Drain(_))))
    }

    /// Whether a socket had enough searches for now.
    fn is_tried(&self, used: &Flow, cookie: u64, now: Instant) -> bool {
        let tried = self.ledger.tried.get(&(*used, cookie));
        tried.is_some_and(|(n_tries, last)| *n_tries >= SEARCHES && now < *last + RETRY)
    }

    fn standing(&mut self, used: &Flow, now: Instant) -> Fate {
        let Some((service, policy)) = self.policy(used) else { return Fate::Serves };
        let since = self.ledger.since.get(used).copied().unwrap_or(now);
        let due = match policy {
            StaleConnections::Keep => None,
            // A socket without a service has no endpoint to drain.
            StaleConnections::Drain(time) if used.service.is_some() => since.checked_add(time),
            StaleConnections::Reset | StaleConnections::Drain(_) => Some(since),
        };
        due.map_or(Fate::Kept, |due| Fate::Ends { service: service.cloned(), due })
    }

    /// The service and policy of a flow whose endpoint no longer serves, or is itself a frontend; `None` for
    /// other flows.
    fn policy(&mut self, used: &Flow) -> Option<(Option<&'a ServiceKey>, StaleConnections)> {
        let owner = self.owner(used.protocol, used.service.unwrap_or(used.endpoint));
        let frontend = match (used.service, owner) {
            (None, frontend) => {
                let answers = |frontend: &&Frontend| {
                    !frontend.address.ip.is_unspecified()
                        || (self.in_force.is_node_address)(used.endpoint.ip())
                };
                frontend.filter(answers).filter(|frontend| !(self.in_force.is_behind)(frontend))?
            }
            (Some(service), None) => {
                let gone = self.gone(used.protocol, service);
                let annotation = gone.and_then(|gone| gone.policy);
                return Some((gone.map(|gone| &gone.service), policy_of(used.protocol, annotation)));
            }
            (Some(_), Some(frontend)) => {
                if (self.in_force.is_behind)(frontend) || self.serves(frontend, &used.endpoint) {
                    return None;
                }
                frontend
            }
        };
        let key = &frontend.port.service;
        Some((Some(key), policy_of(used.protocol, self.ledger.policies.get(key).copied())))
    }

    fn serves(&mut self, frontend: &'a Frontend, endpoint: &SocketAddr) -> bool {
        let (store, key) = (self.in_force.store, &*frontend.port);
        let endpoints = self.ports.entry(key).or_insert_with(|| PortEndpoints::of_port(store, key));
        endpoints.keeps_sockets(endpoint)
    }
}

#[cfg(test)]
mod tests;
