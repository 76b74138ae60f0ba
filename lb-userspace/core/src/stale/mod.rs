//! Which sockets stay with an endpoint that no longer serves, and what becomes of them.
//!
//! # Purpose
//!
//! A connected socket goes on talking to the endpoint that its `connect()` found, whatever the tables say later. TCP notices a
//! dead peer; a resolver's UDP socket sends to a dead address for hours. So does one that was connected to the address of a Service
//! before that was there. [`Ledger`] judges what sockets are seen to use (semantics R10): which of them are to be ended, and
//! when. Finding and ending them is the work of `kernel::sockets`.
//!
//! # Invariants
//!
//! - Level-triggered: a socket is judged by what is in force when it is found, not by the event that made it stale. So a
//!   restart, a missed event or a failed attempt leaves nothing behind.
//! - Nothing is stale before the tables are right: services that wait for a sync, or that the tables had no room for,
//!   are left alone.
//! - A search costs in proportion to what may be stale. Only once after the start it goes through all UDP sockets: an address may
//!   have become a frontend while no agent ran.
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

/// A way that at least one connected socket goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Use {
    /// Protocol of the socket.
    pub protocol: Protocol,
    /// The address that the program called; a node port with the node's address. `None` if it called the address that the socket is
    /// connected to, which was no frontend at that time.
    pub service: Option<SocketAddr>,
    /// The address that the socket is connected to.
    pub endpoint: SocketAddr,
}

/// How sockets are connected, each with the cookies of those that are.
pub type Used = BTreeMap<Use, BTreeSet<u64>>;

/// What is in force.
#[derive(Clone, Copy)]
pub struct InForce<'a> {
    /// The frontends.
    pub desired: &'a Desired,
    /// The objects.
    pub store: &'a Store,
    /// Whether the tables do not follow yet what the objects say of this frontend.
    pub is_behind: &'a dyn Fn(&Frontend) -> bool,
    /// Whether node ports answer on an address.
    pub is_node_address: &'a dyn Fn(IpAddr) -> bool,
}

/// What becomes of the sockets of a [`Use`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The endpoint serves, or it cannot be told yet.
    Serves,
    /// The endpoint does not serve, and the sockets are left alone.
    Kept,
    /// The sockets are to be ended.
    Ends {
        /// The service that was called, if it is known.
        service: Option<ServiceKey>,
        /// When.
        due: Instant,
    },
}

/// Where to look for stale sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    /// Sockets of services, of these protocols,
    pub protocols: BTreeSet<Protocol>,
    /// that are connected to one of these.
    pub endpoints: BTreeSet<SocketAddr>,
    /// UDP sockets that are connected to one of these without a service; `None` for all such. A node port has the unspecified
    /// address.
    pub addresses: Option<BTreeSet<SocketAddr>>,
}

/// A frontend that is no longer there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gone {
    service: ServiceKey,
    policy: Option<StaleConnections>,
    pass: u64,
}

/// What has to be remembered from one search to the next.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Annotations of the services that have one.
    policies: BTreeMap<ServiceKey, StaleConnections>,
    /// Frontends that are gone and may have sockets: whose they were, and what their service said.
    gone: BTreeMap<FrontendAddress, Gone>,
    /// Since when it is known that an endpoint does not serve its sockets.
    since: BTreeMap<Use, Instant>,
    /// Number of the search under way or of the last one.
    pass: u64,
    /// What the search under way goes for.
    sought: BTreeSet<(Use, u64)>,
    /// How many searches went for a socket, and when the last did.
    tried: BTreeMap<(Use, u64), (u8, Instant)>,
    /// UDP addresses that have become frontends, and how many more searches go for sockets that are connected to them.
    appeared: BTreeMap<SocketAddr, u8>,
    /// When the first search was.
    first: Option<Instant>,
    /// Whether a search went for sockets that are connected to any frontend. What appeared before this agent is not known.
    was_everywhere: bool,
}

/// Searches in a row for a socket that is stale by its record, and for those that are connected to a new frontend. The second finds
/// the one whose `connect()` was between hook and kernel; what it does not find is not connected.
const SEARCHES: u8 = 2;

/// The time to the next search for what was not found: it may have been in a network namespace that was not known.
const RETRY: Duration = Duration::from_secs(60);

/// From the first search on, the time until sockets without a service are looked for: meanwhile the agent finds the cgroups that
/// are excluded.
const SETTLING: Duration = Duration::from_secs(5);

/// What holds where no annotation says otherwise: TCP notices for itself, UDP never does.
const fn policy_of(protocol: Protocol, annotation: Option<StaleConnections>) -> StaleConnections {
    match (annotation, protocol) {
        (Some(policy), _) => policy,
        (None, Protocol::Udp) => StaleConnections::Reset,
        (None, Protocol::Tcp | Protocol::Sctp) => StaleConnections::Keep,
    }
}

/// The frontends that may have answered a call: the address itself, and its port on all node addresses.
fn candidates(protocol: Protocol, service: SocketAddr) -> [FrontendAddress; 2] {
    let any = address::unspecified(address::family(service.ip()));
    [service.ip(), any].map(|ip| FrontendAddress { ip, port: service.port(), protocol })
}

impl Ledger {
    /// Takes note of what a service says and of the frontends that it gained (`true`) or lost (`false`).
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
        // A service that is deleted has said how before; one that is still there says it now.
        let policy = if service.is_some() { annotation } else { former };
        for (address, is_there) in frontends {
            if is_there {
                self.gone.remove(&address);
            } else {
                self.gone.insert(address, Gone { service: key.clone(), policy, pass: self.pass });
            }
        }
    }

    /// An address has become a frontend in the tables.
    pub fn appeared(&mut self, address: &FrontendAddress) {
        if address.protocol == Protocol::Udp {
            self.appeared.insert(SocketAddr::new(address.ip, address.port), SEARCHES);
        }
    }

    /// Begins a search, before it is read what the sockets use.
    pub fn begin(&mut self) {
        self.pass += 1;
    }

    /// Says where to look, or `None` if nothing can be stale.
    #[must_use]
    pub fn search(&mut self, used: &Used, now: Instant, in_force: InForce<'_>) -> Option<Search> {
        self.since.retain(|since, _| used.contains_key(since));
        let services = used.keys().filter_map(|used| Some((used.protocol, used.service?)));
        self.forget_gone(services.flat_map(|(protocol, service)| candidates(protocol, service)));
        let mut judge = Judge::new(self, in_force);
        let (mut protocols, mut endpoints, mut wanted) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (used, cookies) in used {
            let is_due = matches!(judge.standing(used, now), Standing::Ends { due, .. } if due <= now);
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

    /// A search was carried out, and what is due of it is being ended.
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

    /// Judges what a search has found.
    #[must_use]
    pub fn judge(
        &mut self,
        search: &Search,
        found: &BTreeSet<Use>,
        now: Instant,
        in_force: InForce<'_>,
    ) -> BTreeMap<Use, Standing> {
        let mut judge = Judge::new(self, in_force);
        let standings: BTreeMap<Use, Standing> =
            found.iter().map(|used| (*used, judge.standing(used, now))).collect();
        let is_covered = |used: &Use| {
            search.protocols.contains(&used.protocol) && search.endpoints.contains(&used.endpoint)
        };
        self.since.retain(|used, _| found.contains(used) || !is_covered(used));
        for (used, standing) in &standings {
            if *standing == Standing::Serves {
                self.since.remove(used);
            } else if used.service.is_some() {
                self.since.entry(*used).or_insert(now);
            }
        }
        standings
    }

    /// When the next sockets are to be ended that are known and not due at `now`.
    #[must_use]
    pub fn next_due(&self, now: Instant, in_force: InForce<'_>) -> Option<Instant> {
        let mut judge = Judge::new(self, in_force);
        let dues = self.since.keys().filter_map(|used| match judge.standing(used, now) {
            Standing::Ends { due, .. } => Some(due).filter(|due| *due > now),
            Standing::Serves | Standing::Kept => None,
        });
        dues.min()
    }

    /// Forgets frontends that nobody uses. Those that went since the search began may have sockets that it did not see.
    fn forget_gone(&mut self, used: impl Iterator<Item = FrontendAddress>) {
        if self.gone.is_empty() {
            return;
        }
        let (used, pass) = (used.collect::<BTreeSet<_>>(), self.pass);
        self.gone.retain(|address, gone| gone.pass >= pass || used.contains(address));
    }
}

/// Judges any number of uses by one state of things; looks at the slices of each port once.
struct Judge<'a> {
    ledger: &'a Ledger,
    in_force: InForce<'a>,
    ports: BTreeMap<&'a PortKey, PortEndpoints<'a>>,
}

impl<'a> Judge<'a> {
    fn new(ledger: &'a Ledger, in_force: InForce<'a>) -> Self {
        Self { ledger, in_force, ports: BTreeMap::new() }
    }

    fn owner(&self, protocol: Protocol, service: SocketAddr) -> Option<&'a Frontend> {
        candidates(protocol, service).iter().find_map(|address| self.in_force.desired.owner(address))
    }

    fn gone(&self, protocol: Protocol, service: SocketAddr) -> Option<&'a Gone> {
        candidates(protocol, service).iter().find_map(|address| self.ledger.gone.get(address))
    }

    /// Whether a time is to run that does not yet.
    fn has_new_deadline(&mut self, used: &Use) -> bool {
        !self.ledger.since.contains_key(used)
            && matches!(self.policy(used), Some((_, StaleConnections::Drain(_))))
    }

    /// Whether enough searches went for a socket.
    fn is_tried(&self, used: &Use, cookie: u64, now: Instant) -> bool {
        let tried = self.ledger.tried.get(&(*used, cookie));
        tried.is_some_and(|(n_tries, last)| *n_tries >= SEARCHES && now < *last + RETRY)
    }

    fn standing(&mut self, used: &Use, now: Instant) -> Standing {
        let Some((service, policy)) = self.policy(used) else { return Standing::Serves };
        let since = self.ledger.since.get(used).copied().unwrap_or(now);
        let due = match policy {
            StaleConnections::Keep => None,
            // There is nothing to drain where nothing ever served.
            StaleConnections::Drain(time) if used.service.is_some() => since.checked_add(time),
            StaleConnections::Reset | StaleConnections::Drain(_) => Some(since),
        };
        due.map_or(Standing::Kept, |due| Standing::Ends { service: service.cloned(), due })
    }

    /// Whose policy applies to a use whose endpoint no longer serves, or is a frontend itself; `None` for any other.
    fn policy(&mut self, used: &Use) -> Option<(Option<&'a ServiceKey>, StaleConnections)> {
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
        let endpoints = self.ports.entry(key).or_insert_with(|| {
            let port =
                store.service(&key.service).and_then(|service| service.port(&key.port_name, key.protocol));
            port.map_or_else(PortEndpoints::default, |port| {
                PortEndpoints::new(port, address::family(frontend.address.ip), store.slices_of(&key.service))
            })
        });
        endpoints.keeps_sockets(endpoint)
    }
}

#[cfg(test)]
mod tests;
