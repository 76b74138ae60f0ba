//! Which sockets stay with an endpoint that no longer serves, and what becomes of them.
//!
//! # Purpose
//!
//! A connected socket goes on talking to the endpoint that its `connect()` found, whatever the tables say later. TCP notices a
//! dead peer; a resolver's UDP socket sends to nobody for hours. [`Ledger`] judges what sockets are seen to use (semantics
//! R10): which of them are to be ended, and when. Finding and ending them is the work of `kernel::sockets`.
//!
//! # Invariants
//!
//! - Level-triggered: a socket is judged by what is in force when it is found, not by the event that made it stale. So a
//!   restart, a missed event or a failed attempt leaves nothing behind.
//! - Nothing is stale before the tables are right: services that wait for a sync, or that the tables had no room for,
//!   are left alone.
//!
//! # Depends on
//!
//! `desired`, `model`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Instant,
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
    /// The address that the program called; a node port with the node's address.
    pub service: SocketAddr,
    /// The address that the socket is connected to.
    pub endpoint: SocketAddr,
}

/// What is in force.
#[derive(Clone, Copy)]
pub struct InForce<'a> {
    /// The frontends.
    pub desired: &'a Desired,
    /// The objects.
    pub store: &'a Store,
    /// Whether the tables do not follow yet what the objects say of this frontend.
    pub is_behind: &'a dyn Fn(&Frontend) -> bool,
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
    /// Sockets of these protocols.
    pub protocols: BTreeSet<Protocol>,
    /// Sockets that are connected to one of these; `None` for all.
    pub endpoints: Option<BTreeSet<SocketAddr>>,
}

/// What is known of all sockets before they are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Services and endpoints that the sockets in the table use, of whichever protocol.
    pub used: &'a BTreeSet<(SocketAddr, SocketAddr)>,
    /// Whether these are all.
    pub is_complete: bool,
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
}

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

    /// Begins a search: says where to look, or `None` if nothing can be stale.
    ///
    /// Looks everywhere if `is_thorough`, or if it is not known which sockets there are.
    #[must_use]
    pub fn search(
        &mut self,
        known: Known<'_>,
        is_thorough: bool,
        now: Instant,
        in_force: InForce<'_>,
    ) -> Option<Search> {
        self.pass += 1;
        if is_thorough || !known.is_complete {
            return Some(Search { protocols: self.ended_protocols(), endpoints: None });
        }
        let is_used = |used: &Use| known.used.contains(&(used.service, used.endpoint));
        self.since.retain(|used, _| is_used(used));
        self.forget_gone(known.used.iter().flat_map(|(service, _)| {
            [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|protocol| candidates(protocol, *service))
        }));
        let mut judge = Judge::new(self, in_force);
        let (mut protocols, mut endpoints) = (BTreeSet::new(), BTreeSet::new());
        for &(service, endpoint) in known.used {
            for protocol in judge.possible_protocols(service) {
                let used = Use { protocol, service, endpoint };
                if matches!(judge.standing(&used, now), Standing::Ends { due, .. } if due <= now)
                    || judge.has_new_deadline(&used)
                {
                    protocols.insert(protocol);
                    endpoints.insert(endpoint);
                }
            }
        }
        (!endpoints.is_empty()).then_some(Search { protocols, endpoints: Some(endpoints) })
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
        if search.endpoints.is_none() {
            self.forget_gone(found.iter().flat_map(|used| candidates(used.protocol, used.service)));
        }
        let mut judge = Judge::new(self, in_force);
        let standings: BTreeMap<Use, Standing> =
            found.iter().map(|used| (*used, judge.standing(used, now))).collect();
        let is_covered = |used: &Use| {
            search.protocols.contains(&used.protocol)
                && search.endpoints.as_ref().is_none_or(|endpoints| endpoints.contains(&used.endpoint))
        };
        self.since.retain(|used, _| found.contains(used) || !is_covered(used));
        for (used, standing) in &standings {
            if *standing == Standing::Serves {
                self.since.remove(used);
            } else {
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

    /// The protocols of which some socket may have to be ended.
    fn ended_protocols(&self) -> BTreeSet<Protocol> {
        let of_gone = self.gone.values().filter_map(|gone| gone.policy);
        let asked = self.policies.values().copied().chain(of_gone);
        let is_any_ended = asked.into_iter().any(|policy| policy != StaleConnections::Keep);
        let tcp = is_any_ended.then_some(Protocol::Tcp);
        [Protocol::Udp].into_iter().chain(tcp).collect()
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

    /// A record does not say its protocol: that of the frontends that are or were there, else either.
    fn possible_protocols(&self, service: SocketAddr) -> impl Iterator<Item = Protocol> + use<> {
        let both = [Protocol::Tcp, Protocol::Udp];
        let known = both.map(|protocol| {
            self.owner(protocol, service).is_some() || self.gone(protocol, service).is_some()
        });
        let is_unknown = known == [false; 2];
        both.into_iter().zip(known).filter(move |(_, is_known)| *is_known || is_unknown).map(|(p, _)| p)
    }

    /// Whether a time is to run that does not yet.
    fn has_new_deadline(&mut self, used: &Use) -> bool {
        !self.ledger.since.contains_key(used)
            && matches!(self.policy(used), Some((_, StaleConnections::Drain(_))))
    }

    fn standing(&mut self, used: &Use, now: Instant) -> Standing {
        let Some((service, policy)) = self.policy(used) else { return Standing::Serves };
        let since = self.ledger.since.get(used).copied().unwrap_or(now);
        let due = match policy {
            StaleConnections::Keep => None,
            StaleConnections::Reset => Some(since),
            StaleConnections::Drain(time) => since.checked_add(time),
        };
        due.map_or(Standing::Kept, |due| Standing::Ends { service: service.cloned(), due })
    }

    /// Whose policy applies to a use whose endpoint no longer serves; `None` for one that does.
    fn policy(&mut self, used: &Use) -> Option<(Option<&'a ServiceKey>, StaleConnections)> {
        let Some(frontend) = self.owner(used.protocol, used.service) else {
            let gone = self.gone(used.protocol, used.service);
            let annotation = gone.and_then(|gone| gone.policy);
            return Some((gone.map(|gone| &gone.service), policy_of(used.protocol, annotation)));
        };
        if (self.in_force.is_behind)(frontend) || self.serves(frontend, &used.endpoint) {
            return None;
        }
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
