//! `socklb explain`: where would a call go now, and why?
//!
//! Pure. Finds the frontend with the programs' own search on the kernel's tables. The objects tell which rule
//! selected or excluded each endpoint.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use lb_common::{health::Admission, layout::Frontend};
use lb_core::{
    desired::{
        self, FrontendAddress,
        endpoints::{PortEndpoints, Scope},
    },
    ejection,
    model::{Balance, Issue, Service, ServiceKey, TrafficPolicy, address},
    sim::{Caller, Outcome, Simulator},
    state::State,
    tables::{Entry, StoredRun},
};
use serde::Serialize;

pub use self::packet::{OUTSIDE, PacketEndpoint, PacketPart};
use super::listing::{kind_name, service_text};

mod packet;

/// The answer. Field names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The call, as `address:port/protocol`.
    pub call: String,
    /// `untouched`, `refused`, `unreachable` or `redirected`.
    pub verdict: &'static str,
    /// The matching frontend, if any.
    pub frontend: Option<FrontendPart>,
    /// Every endpoint that a call may reach.
    pub candidates: Vec<SocketAddr>,
    /// The shares of calls that the candidates get, if they differ.
    pub shares: Vec<SharePart>,
    /// The candidates that calls avoid now, because connections to them failed.
    pub ejected: Vec<LeftOutPart>,
    /// The endpoints that calls reach instead while all candidates are ejected: ready ones that topology
    /// hints leave out.
    pub spill: Vec<SocketAddr>,
    /// Every known endpoint that a call may not reach, or only as `spill`.
    pub left_out: Vec<LeftOutPart>,
    /// The rule that decides, in a sentence.
    pub reason: String,
    /// What a packet gets that reaches no hook; `None` if socklb serves no packets. The caller fills it in.
    pub packet: Option<PacketPart>,
    /// Issues of this address's objects and of its Service. The caller fills them in.
    pub issues: Vec<Issue>,
}

/// The frontend of an [`Explanation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrontendPart {
    /// Namespace of the Service; empty if no object is known.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the Service port.
    pub port_name: String,
    /// `ClusterIP`, `NodePort`, `ExternalIP` or `LoadBalancer`.
    pub kind: &'static str,
    /// The traffic policy.
    pub policy: TrafficPolicy,
    /// Idle timeout of the affinity in seconds; 0 without affinity.
    pub affinity_seconds: u32,
    /// How a call chooses among the candidates: `random` or `least-connections`.
    pub balance: Balance,
}

/// The share of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SharePart {
    /// Its address.
    pub endpoint: SocketAddr,
    /// From 1 to 255, the largest one of the frontend.
    pub share: u8,
}

/// An endpoint that a call does not reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOutPart {
    /// Its address.
    pub endpoint: SocketAddr,
    /// The rule that excludes it.
    pub reason: String,
}

/// The line about packets without a table of socklb.
const NO_PACKETS: &str = "packets -> not socklb's (--packets=off): the rules of other programs decide\n";

/// Explains a call on the tables in `simulator`.
#[must_use]
pub fn explain(
    simulator: &Simulator,
    objects: Option<&State>,
    to: FrontendAddress,
    caller: Caller,
) -> Explanation {
    let call = to.to_string();
    let Some((id, frontend)) = simulator.find_frontend(to, caller) else {
        let (verdict, reason) = without_frontend(simulator, objects, to, caller);
        return Explanation {
            call,
            verdict,
            frontend: None,
            candidates: Vec::new(),
            shares: Vec::new(),
            ejected: Vec::new(),
            spill: Vec::new(),
            left_out: Vec::new(),
            reason,
            packet: None,
            issues: Vec::new(),
        };
    };
    // The key of the table: for a node port it has the wildcard address, not the called one.
    let key =
        simulator.image.services.iter().find(|(_, frontend_id)| **frontend_id == id).map(|(key, _)| *key);
    let owner =
        objects.zip(key).and_then(|(state, key)| state.desired().owner(&key).map(|owner| (state, owner)));
    let ipv6 = to.ip.to_canonical().is_ipv6();
    let run = simulator.image.stored(ipv6, frontend.run);
    let addresses = |entries: &[Entry]| {
        let mut addresses: Vec<SocketAddr> = entries.iter().map(Entry::address).collect();
        addresses.sort_unstable();
        addresses
    };
    let candidates = run.map(|run| addresses(run.endpoints())).unwrap_or_default();
    let spill = run.map(|run| addresses(run.spill())).unwrap_or_default();
    let ejected = run.map(|run| ejected(simulator, &frontend, run.endpoints())).unwrap_or_default();
    let left_out = owner.map(|(state, owner)| left_out(state, owner, to, &candidates)).unwrap_or_default();
    let (shares, balance) = (run.map(shares).unwrap_or_default(), Balance::of_flags(frontend.flags));
    let is_avoided = |entry: &Entry| frontend.health != 0 && is_avoided(simulator, entry);
    let are_avoided = run.is_some_and(|run| run.endpoints().iter().all(is_avoided));
    let may_spill = run.is_some_and(|run| !run.spill().iter().all(is_avoided));
    let reason = match (candidates.len(), frontend.affinity_seconds) {
        (0, _) if left_out.is_empty() => "the service has no endpoints: ECONNREFUSED".to_owned(),
        (0, _) => "no endpoint of the service is usable: ECONNREFUSED".to_owned(),
        (n, _) if are_avoided && may_spill => {
            format!("one of {}, which topology hints leave out: all {n} candidates are ejected", spill.len())
        }
        (1, _) => "the only usable endpoint".to_owned(),
        (n, 0) if ejected.is_empty() => format!("one of {n}, {}", choice(balance, &shares)),
        (n, 0) if are_avoided => format!("one of {n}: all are ejected, so none is avoided"),
        (n, 0) => format!("one of {n}, of which {} ejected", number(ejected.len())),
        (n, seconds) => format!("one of {n}; a client keeps its endpoint until it is idle for {seconds} s"),
    };
    Explanation {
        call,
        verdict: if candidates.is_empty() { "refused" } else { "redirected" },
        frontend: Some(FrontendPart {
            namespace: owner.map(|(_, o)| o.port.service.namespace.to_string()).unwrap_or_default(),
            name: owner.map(|(_, o)| o.port.service.name.to_string()).unwrap_or_default(),
            port_name: owner.map(|(_, o)| o.port.port_name.to_string()).unwrap_or_default(),
            kind: owner.map_or("", |(_, o)| kind_name(o.kind)),
            policy: owner.map_or(TrafficPolicy::Cluster, |(_, o)| o.policy),
            affinity_seconds: frontend.affinity_seconds,
            balance,
        }),
        candidates,
        shares,
        ejected,
        spill,
        left_out,
        reason,
        packet: None,
        issues: Vec::new(),
    }
}

/// Verdict and reason for a destination without a frontend.
fn without_frontend(
    simulator: &Simulator,
    objects: Option<&State>,
    to: FrontendAddress,
    caller: Caller,
) -> (&'static str, String) {
    let ip = to.ip.to_canonical();
    match simulator.call(to, caller, 0, 0) {
        Outcome::Refused => {
            let service = objects.and_then(|state| {
                state.store().services().find(|service| service.cluster_ip(address::family(ip)) == Some(ip))
            });
            let owner =
                service.map_or("its service".to_owned(), |service| format!("service {}", service.key));
            (
                "refused",
                format!("{ip} is the cluster IP of {owner}, which does not define this port: ECONNREFUSED"),
            )
        }
        Outcome::Unreachable => {
            let network = simulator.image.service_cidrs.iter().find(|network| network.contains(ip));
            let network = network.map(ToString::to_string).unwrap_or_default();
            ("unreachable", format!("no service has {ip}, an address of the network {network}: EHOSTUNREACH"))
        }
        Outcome::Untouched | Outcome::Endpoint(..) => {
            let unselected = objects.and_then(|state| unselected(state, ip));
            let excluded = objects.and_then(|state| excluded(state, to));
            let reason = match (unselected, excluded) {
                (Some(reason), _) => reason,
                (None, Some(service)) => format!("service {service} is excluded by its annotation"),
                (None, None) => "no frontend has this address, port and protocol".to_owned(),
            };
            ("untouched", format!("{reason}: the call passes unchanged"))
        }
    }
}

/// Why another proxy serves a cluster IP.
fn unselected(state: &State, ip: IpAddr) -> Option<String> {
    let mut services = state.store().services();
    services.find_map(|service| {
        let reason =
            service.unselected.as_ref().filter(|_| service.cluster_ip(address::family(ip)) == Some(ip))?;
        Some(format!("service {} has {ip} and {reason}, so this agent does not serve it", service.key))
    })
}

/// The excluded Service that has an address.
fn excluded(state: &State, to: FrontendAddress) -> Option<&ServiceKey> {
    let answers = |service: &&Service| {
        let served = Service { annotations: Vec::new(), ..(*service).clone() };
        let slices = state.store().slices_of(&service.key);
        let (frontends, _issues) =
            desired::service::frontends(&served, slices, state.topology(), state.settings());
        let on_nodes = FrontendAddress { ip: address::unspecified(address::family(to.ip)), ..to };
        let is_on_node = state.topology().is_node_address(to.ip);
        frontends
            .iter()
            .any(|frontend| frontend.address == to || (is_on_node && frontend.address == on_nodes))
    };
    state.store().services().filter(|service| service.is_excluded()).find(answers).map(|service| &service.key)
}

fn number(n: usize) -> String {
    if n == 1 { "1 is".to_owned() } else { format!("{n} are") }
}

/// The endpoints that a call may reach, whichever are ejected.
#[must_use]
pub fn reachable(simulator: &Simulator, to: FrontendAddress, caller: Caller) -> Vec<&Entry> {
    let frontend = simulator.find_frontend(to, caller);
    let ipv6 = to.ip.to_canonical().is_ipv6();
    let run = frontend.and_then(|(_, frontend)| simulator.image.stored(ipv6, frontend.run));
    run.map(|run| run.reachable().collect()).unwrap_or_default()
}

fn is_avoided(simulator: &Simulator, entry: &Entry) -> bool {
    let health = simulator.health.borrow().get(&entry.endpoint_id).copied().unwrap_or_default();
    health.admission(simulator.now) == Admission::Ejected
}

/// How a call chooses among endpoints that are not ejected.
fn choice(balance: Balance, shares: &[SharePart]) -> &'static str {
    match (balance, shares) {
        (Balance::Random, []) => "each with the same probability",
        (Balance::Random, _) => "each with the probability of its share",
        (Balance::LeastConnections, []) => "of four the one with the fewest open connections",
        (Balance::LeastConnections, _) => {
            "of four, drawn by their shares, the one with the fewest open connections"
        }
    }
}

/// The shares of a run's endpoints, by address; empty if they are equal.
fn shares(run: &StoredRun) -> Vec<SharePart> {
    let shares = run.shares().into_iter().flatten();
    let parts = run.endpoints().iter().zip(shares);
    let mut parts: Vec<SharePart> =
        parts.map(|(entry, share)| SharePart { endpoint: entry.address(), share }).collect();
    if parts.iter().all(|part| part.share == u8::MAX) {
        return Vec::new();
    }
    parts.sort_unstable_by_key(|part| part.endpoint);
    parts
}

/// The endpoints of a frontend that are ejected at the simulator's time.
fn ejected(simulator: &Simulator, frontend: &Frontend, entries: &[Entry]) -> Vec<LeftOutPart> {
    let health = simulator.health.borrow();
    let ejected = entries.iter().filter_map(|entry| {
        let health = health.get(&entry.endpoint_id).filter(|_| frontend.health != 0)?;
        let reason = ejection::why_avoided(health, simulator.now)?;
        Some(LeftOutPart { endpoint: entry.address(), reason })
    });
    ejected.collect()
}

/// Every endpoint of the objects that the tables lack, with the rule that excludes it.
fn left_out(
    state: &State,
    owner: &desired::Frontend,
    to: FrontendAddress,
    candidates: &[SocketAddr],
) -> Vec<LeftOutPart> {
    let scope = scope(state, owner, to);
    PortEndpoints::of_port(state.store(), &owner.port)
        .classify(scope, state.topology())
        .filter(|(endpoint, ..)| !candidates.contains(endpoint))
        .map(|(endpoint, _, reason)| LeftOutPart {
            endpoint,
            reason: reason.map_or_else(
                || "usable according to the last known objects, but not in the kernel's tables".to_owned(),
                |reason| reason.to_string(),
            ),
        })
        .collect()
}

/// The Service of the frontend's endpoints.
fn scope<'a>(state: &'a State, owner: &desired::Frontend, to: FrontendAddress) -> Scope<'a> {
    let topology = state.topology();
    match (owner.kind, owner.policy) {
        (desired::FrontendKind::ClusterIP, TrafficPolicy::Local) => Scope::Node(topology.node_name()),
        (desired::FrontendKind::NodePort, TrafficPolicy::Local) => topology
            .other_addresses()
            .find(|(address, _)| *address == to.ip)
            .map_or(Scope::Cluster, |(_, node)| Scope::Node(node)),
        _ => Scope::Cluster,
    }
}

impl FrontendPart {
    /// The Service port as text.
    fn service(&self) -> String {
        if self.name.is_empty() {
            return "of an unknown service".to_owned();
        }
        format!("of {}", service_text(&self.namespace, &self.name, &self.port_name))
    }
}

impl Explanation {
    /// The lines below the verdict: label, text, explanation.
    fn parts(&self) -> impl Iterator<Item = (&'static str, String, Option<&str>)> {
        let frontend = self.frontend.iter().map(|frontend| {
            let (kind, service, policy) = (frontend.kind, frontend.service(), frontend.policy);
            ("frontend", format!("{kind} {service}, policy {policy:?}"), None)
        });
        let candidates = self.candidates.iter().map(|endpoint| {
            let ejected = self.ejected.iter().find(|part| part.endpoint == *endpoint);
            let share = self.shares.iter().find(|part| part.endpoint == *endpoint);
            let share = share.map(|part| format!("  share {}", part.share)).unwrap_or_default();
            ("candidate", format!("{endpoint}{share}"), ejected.map(|part| part.reason.as_str()))
        });
        let spill = self.spill.iter().map(|endpoint| {
            let left_out = self.left_out.iter().find(|part| part.endpoint == *endpoint);
            ("spill", endpoint.to_string(), left_out.map(|part| part.reason.as_str()))
        });
        let left_out = self.left_out.iter().filter(|part| !self.spill.contains(&part.endpoint));
        let left_out =
            left_out.map(|part| ("left out", part.endpoint.to_string(), Some(part.reason.as_str())));
        let issues = self.issues.iter().map(|issue| ("issue", issue.to_string(), None));
        frontend.chain(candidates).chain(spill).chain(left_out).chain(issues)
    }

    /// The explanation as text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("{} -> {}: {}\n", self.call, self.verdict, self.reason);
        for (label, part, reason) in self.parts() {
            let reason = reason.map_or_else(String::new, |reason| format!("  {reason}"));
            let _infallible = writeln!(text, "  {label:<9}  {part}{reason}");
        }
        text + &self.packet.as_ref().map_or_else(|| NO_PACKETS.to_owned(), PacketPart::text)
    }

    /// The explanation in one line, without a line break.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!("{} -> {}: {}", self.call, self.verdict, self.reason);
        for (label, part, reason) in self.parts() {
            let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
            let _infallible = write!(line, "; {label} {part}{reason}");
        }
        if let Some(packet) = &self.packet {
            let _infallible = write!(line, "; {}", packet.summary());
            for (endpoint, whose) in packet.parts() {
                let _infallible = write!(line, "; endpoint {endpoint} ({whose})");
            }
        }
        line
    }
}

#[cfg(test)]
mod tests;
