//! The frontends of one service.
//!
//! # Purpose
//!
//! [`frontends`] decides for each port and family which addresses answer, and with which endpoints
//! (`pkg/proxy/serviceport.go`, `pkg/proxy/topology.go`). The caller of a socket is always on this node; what
//! differs for packets is in [`PacketSide`].
//!
//! # Invariants
//!
//! - A service has at most one frontend at an address.
//! - Frontends of a port with the same endpoints share one allocation.

use std::{collections::BTreeSet, net::IpAddr, net::SocketAddr, sync::Arc};

use lb_common::{
    health::Policy,
    layout::frontend_flags::{EXTERNAL_LOCAL, NO_LOCAL_ENDPOINT, NODE_PORT},
};

use super::{
    ExternalIps, Frontend, FrontendAddress, FrontendKind, PacketMode, PacketSide, PortKey, Settings,
    Topology,
    endpoints::{PortEndpoints, Scope, SlicePorts},
    slow_start::Ramp,
};
use crate::model::{
    Balance, Cidr, Family, Issue, IssueKind, ObjectRef, Protocol, Service, ServicePort, Slice, TrafficPolicy,
    address,
};

/// Most slice entries of all ports of a service in one family: four times the default endpoint table. An
/// object may list 20,000 ports and a slice 1,000 endpoints (`pkg/apis/discovery/validation/validation.go`):
/// without this bound, two objects of 1 MB become sets of 640 MB.
const MAX_ENTRIES: usize = 1 << 20;

/// Computes the frontends of a service, in the order of their addresses.
///
/// Per port and family with a cluster IP:
///
/// | frontend | policy Cluster | policy Local |
/// | --- | --- | --- |
/// | cluster IP (internal policy) | cluster set | this node's endpoints |
/// | external IP, load-balancer IP (external policy) | cluster set | cluster set |
/// | node port on this node's addresses (external policy) | cluster set | cluster set |
/// | node port on another node's addresses (external policy) | cluster set | that node's endpoints |
///
/// With the external policy Local a call from inside the cluster reaches the cluster set directly, unless
/// another node would answer it.
///
/// **Node ports** have one frontend at the unspecified address. The hook looks it up when the port is in
/// [`Settings::node_ports`] and the address belongs to a node. With the external policy Local it does not
/// answer for other nodes: those with endpoints get exact frontends. A node port *outside* the range is not
/// looked up this way. It gets an exact frontend for every known node address, and an issue.
///
/// **An excluded Service** (annotation `socklb.io/exclude`) has none.
///
/// **A cluster IP that an interface of this node has** gets no frontend, but an issue: a program of the node,
/// such as `NodeLocal DNSCache`, answers there. The other addresses of the Service are served.
///
/// **External IPs** get frontends if [`Settings::external_ips`] admits them; the others get an issue.
///
/// **`loadBalancerSourceRanges`** cannot be checked: the kernel chooses the caller's address only after the
/// hook of `connect()`. A load-balancer address whose ranges do not admit all clients therefore gets no
/// frontend, but an issue: the call goes to the network untranslated, where the ranges are enforced. The
/// ranges do not affect other kinds of frontends. With [`PacketMode`] other than `Off` the address has a
/// frontend for packets alone, which checks the ranges. So has every address of an SCTP port, which no hook
/// serves.
///
/// **A port with which the service would have more than 1,048,576 endpoints** in a family is left out, with
/// an issue.
#[must_use]
pub fn frontends<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice>,
    topology: &Topology,
    settings: &Settings,
) -> (Vec<Frontend>, Vec<Issue>) {
    frontends_at(service, slices, topology, settings, &mut Ramp::default())
}

/// As [`frontends`], with shares by the slow start of the Service's endpoints.
#[must_use]
pub fn frontends_at<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice>,
    topology: &Topology,
    settings: &Settings,
    ramp: &mut Ramp,
) -> (Vec<Frontend>, Vec<Issue>) {
    frontends_within(MAX_ENTRIES, service, slices, topology, settings, ramp)
}

/// Whether a change of the topology may change [`frontends`] of a service.
///
/// Most services of a cluster have a cluster IP only: addresses of other nodes do not concern them.
#[must_use]
pub fn is_affected(service: &Service, former: &Topology, now: &Topology) -> bool {
    let has_moved = |ip| former.is_on_interface(ip) != now.is_on_interface(ip);
    // Hints of endpoints name zones and nodes.
    (former.node_name(), former.zone()) != (now.node_name(), now.zone())
        || service.ports.iter().any(|port| port.node_port.is_some())
        || !service.external_ips.is_empty()
        // Ranges that admit this node admit the load balancer's address.
        || (!service.source_ranges.is_empty() && former.own_addresses() != now.own_addresses())
        || [Family::V4, Family::V6].into_iter().filter_map(|family| service.cluster_ip(family)).any(has_moved)
}

fn frontends_within<'a>(
    max_entries: usize,
    service: &Service,
    slices: impl Iterator<Item = &'a Slice>,
    topology: &Topology,
    settings: &Settings,
    ramp: &mut Ramp,
) -> (Vec<Frontend>, Vec<Issue>) {
    if !service.is_served() {
        return Default::default();
    }
    let mut builder =
        Builder { service, topology, settings, ramp, frontends: Vec::new(), issues: BTreeSet::new() };
    let slices: Vec<_> = slices.collect();
    for family in [Family::V4, Family::V6] {
        let Some(cluster_ip) = service.cluster_ip(family) else {
            continue;
        };
        let slices = SlicePorts::new(family, slices.iter().copied());
        let (mut n_entries, mut n_left_out) = (0, 0);
        for port in &service.ports {
            let n_more = slices.n_entries(port);
            if n_entries + n_more > max_entries {
                n_left_out += 1;
                continue;
            }
            n_entries += n_more;
            if port.protocol == Protocol::Sctp && settings.packets != PacketMode::All {
                let ServicePort { port, protocol, .. } = *port;
                builder.issues.insert(IssueKind::NotServed { port, protocol });
            }
            builder.add_port(port, cluster_ip, &slices.endpoints_of(port));
        }
        if n_left_out > 0 {
            builder.issues.insert(IssueKind::TooManyEndpoints { n_left_out, max: max_entries });
        }
    }
    builder.report_source_ranges();
    builder.report_external_ips();
    builder.finish()
}

/// Whether source ranges exclude some callers of a load-balancer address.
fn has_limiting_ranges(service: &Service, ip: IpAddr) -> bool {
    let mut ranges =
        service.source_ranges.iter().filter(|range| range.family() == address::family(ip)).peekable();
    if ranges.peek().is_none() {
        return service.has_unreadable_source_range;
    }
    ranges.all(|range| range.prefix_len != 0)
}

struct Builder<'a> {
    service: &'a Service,
    topology: &'a Topology,
    settings: &'a Settings,
    ramp: &'a mut Ramp,
    frontends: Vec<Frontend>,
    issues: BTreeSet<IssueKind>,
}

/// [`Frontend::endpoints`] with their [`Frontend::shares`].
#[derive(Clone, PartialEq, Eq)]
struct EndpointSet {
    endpoints: Arc<[SocketAddr]>,
    shares: Option<Arc<[u8]>>,
}

/// What all frontends of one port share.
struct Port<'a> {
    key: Arc<PortKey>,
    family: Family,
    endpoints: &'a PortEndpoints<'a>,
    cluster: EndpointSet,
    /// Of a frontend with the policy Cluster: [`Frontend::spill`].
    spill: Arc<[SocketAddr]>,
    /// For packets: those of this node. Empty if packets are not served.
    local: EndpointSet,
}

impl Builder<'_> {
    fn add_port(&mut self, port: &ServicePort, cluster_ip: IpAddr, endpoints: &PortEndpoints<'_>) {
        let family = address::family(cluster_ip);
        self.ramp.note(endpoints.taking_calls());
        let common = Port {
            key: Arc::new(PortKey {
                service: self.service.key.clone(),
                port_name: port.name.clone(),
                protocol: port.protocol,
                ipv6: family == Family::V6,
            }),
            family,
            endpoints,
            cluster: self.set(endpoints, Scope::Cluster),
            spill: endpoints.spill(self.topology),
            local: match self.settings.packets {
                PacketMode::Off => EndpointSet { endpoints: Arc::default(), shares: None },
                _ => self.set(endpoints, Scope::Node(self.topology.node_name())),
            },
        };
        if self.topology.is_on_interface(cluster_ip) {
            self.issues.insert(IssueKind::OnThisNode { address: cluster_ip.to_string() });
        } else {
            self.add_cluster_ip(&common, cluster_ip, port.port);
        }
        let load_balancer_ips =
            self.service.load_balancer_ips.iter().map(|ip| (*ip, FrontendKind::LoadBalancer));
        let external_ips = self.service.external_ips.iter().map(|ip| (*ip, FrontendKind::ExternalIP));
        for (ip, kind) in load_balancer_ips.chain(external_ips) {
            let is_open = match kind {
                FrontendKind::LoadBalancer => {
                    self.settings.packets != PacketMode::Off || !has_limiting_ranges(self.service, ip)
                }
                _ => self.is_admitted(ip),
            };
            if address::family(ip) == family && is_open {
                self.add(&common, kind, ip, port.port, common.cluster.clone(), 0);
            }
        }
        if let Some(node_port) = port.node_port {
            self.add_node_port(&common, node_port);
        }
    }

    /// Whether [`Settings::external_ips`] admits an external IP.
    fn is_admitted(&self, ip: IpAddr) -> bool {
        match self.settings.external_ips {
            ExternalIps::Any => true,
            ExternalIps::Nodes => self.topology.is_node_address(ip),
            ExternalIps::None => false,
        }
    }

    fn add_cluster_ip(&mut self, port: &Port<'_>, ip: IpAddr, number: u16) {
        let (endpoints, flags) = match self.service.internal_policy {
            TrafficPolicy::Cluster => (port.cluster.clone(), 0),
            TrafficPolicy::Local => self.endpoints_of(port, port.endpoints, self.topology.node_name()),
        };
        self.add(port, FrontendKind::ClusterIP, ip, number, endpoints, flags);
    }

    fn add_node_port(&mut self, port: &Port<'_>, number: u16) {
        let is_local = self.service.external_policy == TrafficPolicy::Local;
        let flags = if is_local { NODE_PORT | EXTERNAL_LOCAL } else { NODE_PORT };
        if !self.settings.node_ports.contains(&number) {
            self.add_node_port_outside_range(port, number, flags);
            return;
        }
        let wildcard = address::unspecified(port.family);
        self.add(port, FrontendKind::NodePort, wildcard, number, port.cluster.clone(), flags);
        if is_local {
            for (node, known) in port.endpoints.by_node() {
                // A node without a usable endpoint needs no entry: the wildcard refuses for it.
                let (endpoints, _) = self.endpoints_of(port, &known, node);
                if !endpoints.endpoints.is_empty() {
                    self.add_on_node(port, node, number, &endpoints, NODE_PORT);
                }
            }
        }
    }

    /// Adds exact frontends on all known node addresses, since the hook does not look up the wildcard for
    /// this port.
    fn add_node_port_outside_range(&mut self, port: &Port<'_>, number: u16, flags: u32) {
        let (first, last) = (*self.settings.node_ports.start(), *self.settings.node_ports.end());
        self.issues.insert(IssueKind::NodePortOutsideRange { port: number, first, last });
        for ip in self.topology.own_addresses().iter().filter(|ip| address::family(**ip) == port.family) {
            self.add(port, FrontendKind::NodePort, *ip, number, port.cluster.clone(), flags);
        }
        let (nodes, none) = (port.endpoints.by_node(), PortEndpoints::default());
        for node in self.topology.other_nodes() {
            let (endpoints, flags) = match self.service.external_policy {
                TrafficPolicy::Cluster => (port.cluster.clone(), NODE_PORT),
                TrafficPolicy::Local => {
                    let known = nodes.get(node).unwrap_or(&none);
                    let (endpoints, no_local) = self.endpoints_of(port, known, node);
                    (endpoints, NODE_PORT | no_local)
                }
            };
            self.add_on_node(port, node, number, &endpoints, flags);
        }
    }

    /// Adds exact frontends for a node port on another node's addresses.
    fn add_on_node(&mut self, port: &Port<'_>, node: &str, number: u16, set: &EndpointSet, flags: u32) {
        for ip in self.topology.addresses_of(node).iter().filter(|ip| address::family(**ip) == port.family) {
            self.add(port, FrontendKind::NodePort, *ip, number, set.clone(), flags);
        }
    }

    fn set(&self, known: &PortEndpoints<'_>, scope: Scope<'_>) -> EndpointSet {
        let endpoints = known.set(scope, self.topology);
        EndpointSet { shares: known.shares(&endpoints, self.ramp), endpoints }
    }

    /// The endpoints of one node, sharing the cluster set's allocation if equal, and [`NO_LOCAL_ENDPOINT`] if
    /// only the policy excludes all endpoints.
    fn endpoints_of(&self, port: &Port<'_>, known: &PortEndpoints<'_>, node: &str) -> (EndpointSet, u32) {
        let set = self.set(known, Scope::Node(node));
        let has_no_local = set.endpoints.is_empty() && !port.cluster.endpoints.is_empty();
        let flags = if has_no_local { NO_LOCAL_ENDPOINT } else { 0 };
        (if set == port.cluster { port.cluster.clone() } else { set }, flags)
    }

    fn add(
        &mut self,
        port: &Port<'_>,
        kind: FrontendKind,
        ip: IpAddr,
        number: u16,
        EndpointSet { endpoints, shares }: EndpointSet,
        flags: u32,
    ) {
        let policy = match kind {
            FrontendKind::ClusterIP => self.service.internal_policy,
            _ => self.service.external_policy,
        };
        let (health, balance) = match port.key.protocol {
            Protocol::Tcp => (self.service.health().map_or(0, Policy::to_word), self.service.balance()),
            _ => (0, Balance::Random),
        };
        let may_spill = policy == TrafficPolicy::Cluster && health != 0;
        let packets = self.packet_side(port, kind, ip);
        if packets.is_none() && port.key.protocol == Protocol::Sctp {
            return;
        }
        self.frontends.push(Frontend {
            address: FrontendAddress { ip, port: number, protocol: port.key.protocol },
            kind,
            policy,
            flags,
            affinity_seconds: self.service.affinity_seconds.unwrap_or(0),
            health,
            created: self.service.created,
            port: port.key.clone(),
            endpoints,
            balance,
            shares,
            spill: if may_spill { port.spill.clone() } else { Arc::default() },
            packets: packets.map(Arc::new),
        });
    }

    /// `None` if packets to the address are not served: by the setting, or because another node has it.
    fn packet_side(&self, port: &Port<'_>, kind: FrontendKind, ip: IpAddr) -> Option<PacketSide> {
        let is_served = match (self.settings.packets, kind) {
            (PacketMode::Off, _) | (PacketMode::External, FrontendKind::ClusterIP) => false,
            (_, FrontendKind::NodePort) => ip.is_unspecified() || self.topology.own_addresses().contains(&ip),
            _ => true,
        };
        let is_local =
            kind != FrontendKind::ClusterIP && self.service.external_policy == TrafficPolicy::Local;
        let is_limited = kind == FrontendKind::LoadBalancer && has_limiting_ranges(self.service, ip);
        is_served.then(|| PacketSide {
            outside: is_local.then(|| Arc::clone(&port.local.endpoints)),
            local: Arc::clone(&port.local.endpoints),
            sources: is_limited.then(|| self.sources(ip)),
        })
    }

    /// The source ranges of the address's family. The address itself counts if they admit this node, because
    /// the node's own packets to it may have it as their source (`pkg/proxy/nftables/proxier.go`).
    fn sources(&self, ip: IpAddr) -> Arc<[Cidr]> {
        let of_family =
            || self.service.source_ranges.iter().filter(|range| range.family() == address::family(ip));
        let own = self.topology.own_addresses();
        let admits_node = of_family().any(|range| own.iter().any(|own| range.contains(*own)));
        let full_length = if ip.is_ipv4() { 32 } else { 128 };
        let itself = Cidr::new(ip, full_length).filter(|_| admits_node);
        address::outermost(of_family().copied().chain(itself)).into()
    }

    fn report_source_ranges(&mut self) {
        if self.settings.packets != PacketMode::Off {
            return;
        }
        let served = |ip: &IpAddr| self.service.cluster_ip(address::family(*ip)).is_some();
        let limited: Vec<_> = self
            .service
            .load_balancer_ips
            .iter()
            .filter(|ip| served(ip))
            .copied()
            .filter(|ip| has_limiting_ranges(self.service, *ip))
            .map(|ip| ip.to_string())
            .collect();
        if !limited.is_empty() {
            self.issues.insert(IssueKind::SourceRanges { addresses: limited });
        }
    }

    fn report_external_ips(&mut self) {
        let left_out =
            |ip: &IpAddr| self.service.cluster_ip(address::family(*ip)).is_some() && !self.is_admitted(*ip);
        let left_out: Vec<_> =
            self.service.external_ips.iter().filter(|ip| left_out(ip)).map(ToString::to_string).collect();
        if !left_out.is_empty() {
            let setting = self.settings.external_ips.to_string();
            self.issues.insert(IssueKind::ExternalIps { addresses: left_out, setting });
        }
    }

    fn finish(mut self) -> (Vec<Frontend>, Vec<Issue>) {
        // One address may be an external and a load-balancer address of the service; the order of kinds
        // decides.
        self.frontends.sort_by_key(|frontend| (frontend.address, frontend.kind));
        self.frontends.dedup_by_key(|frontend| frontend.address);
        let object = ObjectRef::from(&self.service.key);
        (self.frontends, self.issues.into_iter().map(|kind| Issue::new(object.clone(), kind)).collect())
    }
}

#[cfg(test)]
mod tests;
