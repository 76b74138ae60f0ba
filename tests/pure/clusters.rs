//! Random clusters, and the outcomes of calls in them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use k8s_openapi::{
    api::{
        core::v1::{
            LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeStatus, Service, ServicePort,
            ServiceSpec, ServiceStatus,
        },
        discovery::v1::{
            Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
        },
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use lb_core::{
    desired::{FrontendAddress, Settings},
    model::{Protocol, ingest},
    plan::Capacity,
    sim::{Caller, Config, Outcome, Simulator},
    state::State,
    tables::Image,
};
use lb_tests::cluster::{Cluster, NAMESPACE, service_cidr};
use proptest::{bool, collection::vec, option, prelude::*, sample::subsequence};

/// Node ports of the random clusters: two in the range, one outside.
const NODE_PORTS: [u16; 3] = [30_080, 30_081, 29_000];
/// Names of nodes. The first one is this node's.
const NODES: [&str; 3] = ["node", "other", "third"];
const ZONES: [&str; 2] = ["a", "b"];

/// A service. Small numbers stand for addresses, so that services sometimes claim the same ones.
#[derive(Clone, Debug)]
pub(crate) struct RandomService {
    families: Families,
    cluster_ip: u8,
    external_ips: Vec<u8>,
    load_balancer_ip: Option<u8>,
    ports: Vec<RandomPort>,
    is_internal_local: bool,
    is_external_local: bool,
    affinity: Option<i32>,
    created: i64,
    /// Whether another proxy serves it.
    is_of_others: bool,
    endpoints: Vec<RandomEndpoint>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Families {
    V4,
    V6,
    Both,
}

#[derive(Clone, Debug)]
struct RandomPort {
    name: &'static str,
    protocol: Protocol,
    number: u16,
    node_port: Option<u16>,
}

#[derive(Clone, Debug)]
struct RandomEndpoint {
    number: u8,
    node: Option<usize>,
    /// Ready, serving, terminating.
    conditions: (bool, bool, bool),
    hint_nodes: Vec<&'static str>,
    hint_zones: Vec<&'static str>,
}

#[derive(Clone, Debug)]
struct RandomNode {
    zone: Option<&'static str>,
    addresses: Vec<u8>,
}

/// All objects that decide about frontends.
#[derive(Clone, Debug)]
pub(crate) struct RandomCluster {
    services: [Option<RandomService>; 4],
    nodes: [Option<RandomNode>; 3],
    interfaces: Vec<u8>,
    has_networks: bool,
}

fn endpoint() -> BoxedStrategy<RandomEndpoint> {
    let conditions = prop_oneof![
        4 => Just((true, true, false)),
        1 => Just((false, false, false)),
        1 => Just((false, true, true)),
        1 => Just((false, false, true)),
    ];
    let hints = || {
        prop_oneof![
            3 => Just((Vec::new(), Vec::new())),
            2 => (subsequence(&NODES[..], 0..=2), subsequence(&ZONES[..], 1..=2)),
        ]
    };
    (0u8..6, option::weighted(0.8, 0..NODES.len()), conditions, hints())
        .prop_map(|(number, node, conditions, (hint_nodes, hint_zones))| RandomEndpoint {
            number,
            node,
            conditions,
            hint_nodes,
            hint_zones,
        })
        .boxed()
}

fn service() -> BoxedStrategy<RandomService> {
    let port = |name, protocol, number| {
        (Just(name), Just(protocol), Just(number), option::of(prop::sample::select(&NODE_PORTS[..])))
            .prop_map(|(name, protocol, number, node_port)| RandomPort { name, protocol, number, node_port })
    };
    let ports = (
        option::weighted(0.8, port("a", Protocol::Tcp, 80)),
        option::of(port("b", Protocol::Udp, 80)),
        option::weighted(0.3, port("c", Protocol::Tcp, 81)),
    )
        .prop_map(|(a, b, c)| [a, b, c].into_iter().flatten().collect());
    let families = prop_oneof![3 => Just(Families::V4), 1 => Just(Families::V6), 2 => Just(Families::Both)];
    let addresses = (families, 0u8..4, vec(0u8..2, 0..=2), option::weighted(0.3, 0u8..2));
    let policies =
        (any::<bool>(), any::<bool>(), option::weighted(0.3, 1i32..100), 0i64..3, bool::weighted(0.15));
    let endpoints = prop_oneof![1 => Just(Vec::new()), 4 => vec(endpoint(), 1..=5)];
    (addresses, ports, policies, endpoints)
        .prop_map(
            |(
                (families, cluster_ip, external_ips, load_balancer_ip),
                ports,
                (is_internal_local, is_external_local, affinity, created, is_of_others),
                endpoints,
            )| RandomService {
                families,
                cluster_ip,
                external_ips,
                load_balancer_ip,
                ports,
                is_internal_local,
                is_external_local,
                affinity,
                created,
                is_of_others,
                endpoints,
            },
        )
        .boxed()
}

fn node() -> BoxedStrategy<RandomNode> {
    (option::of(prop::sample::select(&ZONES[..])), vec(0u8..4, 0..=2))
        .prop_map(|(zone, addresses)| RandomNode { zone, addresses })
        .boxed()
}

/// A random cluster. Boxed like its parts: by value they are too large for the stack of a test.
pub(crate) fn cluster() -> BoxedStrategy<RandomCluster> {
    let service = || option::weighted(0.8, service());
    let node = || option::weighted(0.8, node());
    let services = [service(), service(), service(), service()];
    (services, [node(), node(), node()], vec(0u8..4, 0..=2), bool::weighted(0.8))
        .prop_map(|(services, nodes, interfaces, has_networks)| RandomCluster {
            services,
            nodes,
            interfaces,
            has_networks,
        })
        .boxed()
}

/// A cluster and its later states: each differs from the previous one in some objects only, or in one.
pub(crate) fn history(n_changes: usize) -> impl Strategy<Value = Vec<RandomCluster>> {
    let one = (0..8usize).prop_map(|one| (0..8).map(|n| n == one).collect::<Vec<bool>>());
    let change = (cluster(), prop_oneof![vec(any::<bool>(), 8), one]);
    (cluster(), vec(change, 1..=n_changes)).prop_map(|(first, changes)| {
        let mut history = vec![first];
        for (new, takes) in changes {
            let mut next = history[history.len() - 1].clone();
            for (n, service) in new.services.into_iter().enumerate() {
                if takes[n] {
                    next.services[n] = service;
                }
            }
            for (n, node) in new.nodes.into_iter().enumerate() {
                if takes[4 + n] {
                    next.nodes[n] = node;
                }
            }
            if takes[7] {
                (next.interfaces, next.has_networks) = (new.interfaces, new.has_networks);
            }
            history.push(next);
        }
        history
    })
}

fn v4(network: u8, number: u8) -> IpAddr {
    Ipv4Addr::new(10, network, 0, number).into()
}

fn v6(network: u8, number: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, network.into(), 0, 0, 0, 0, 0, number.into()).into()
}

const SERVICE_NETWORK: u8 = 96;
const EXTERNAL_NETWORK: u8 = 97;
const NODE_NETWORK: u8 = 98;

/// Endpoints of different services never share an address.
fn endpoint_network(service: usize) -> u8 {
    u8::try_from(service).unwrap()
}

impl Families {
    fn ips(self, network: u8, number: u8) -> Vec<IpAddr> {
        match self {
            Self::V4 => vec![v4(network, number)],
            Self::V6 => vec![v6(network, number)],
            Self::Both => vec![v4(network, number), v6(network, number)],
        }
    }
}

impl RandomCluster {
    /// The addresses of this node's interfaces.
    pub(crate) fn interfaces(&self) -> Vec<IpAddr> {
        self.interfaces.iter().flat_map(|number| Families::Both.ips(NODE_NETWORK, *number)).collect()
    }

    pub(crate) fn objects(&self) -> Cluster {
        let mut cluster = Cluster::new();
        for (n, service) in self.services.iter().enumerate() {
            if let Some(service) = service {
                cluster.set(service.object(n));
                service.slices(n).into_iter().for_each(|slice| cluster.set(slice));
            }
        }
        for (name, node) in NODES.iter().zip(&self.nodes) {
            if let Some(node) = node {
                cluster.set(node.object(name));
            }
        }
        if self.has_networks {
            cluster.set(service_cidr("kubernetes", &["10.96.0.0/24", "fd00:60::/112"]));
        }
        cluster
    }

    /// Applies the cluster to a state.
    pub(crate) fn feed(&self, state: &mut State) {
        self.objects().feed(state);
        state.set_interfaces(self.interfaces());
    }
}

fn named(namespace: &str, name: String) -> ObjectMeta {
    let namespace = (!namespace.is_empty()).then(|| namespace.to_owned());
    ObjectMeta { name: Some(name), namespace, ..ObjectMeta::default() }
}

/// The labels of a Service of another proxy.
fn others() -> BTreeMap<String, String> {
    [(ingest::SERVICE_PROXY_NAME.to_owned(), "other".to_owned())].into()
}

impl RandomService {
    fn object(&self, n: usize) -> Service {
        let cluster_ips = self.families.ips(SERVICE_NETWORK, self.cluster_ip);
        let texts: Vec<_> = cluster_ips.iter().map(ToString::to_string).collect();
        let families = cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned());
        let policy = |is_local| Some(if is_local { "Local" } else { "Cluster" }.to_owned());
        let external = |number: &u8| Families::Both.ips(EXTERNAL_NETWORK, *number);
        let spec = ServiceSpec {
            type_: Some("LoadBalancer".to_owned()),
            cluster_ip: texts.first().cloned(),
            cluster_ips: Some(texts),
            ip_families: Some(families.collect()),
            external_ips: Some(
                self.external_ips.iter().flat_map(external).map(|ip| ip.to_string()).collect(),
            ),
            internal_traffic_policy: policy(self.is_internal_local),
            external_traffic_policy: policy(self.is_external_local),
            session_affinity: self.affinity.map(|_seconds| "ClientIP".to_owned()),
            session_affinity_config: self.affinity.map(|seconds| {
                serde_json::from_value(serde_json::json!({"clientIP": {"timeoutSeconds": seconds}})).unwrap()
            }),
            ports: Some(self.ports.iter().map(RandomPort::object).collect()),
            ..ServiceSpec::default()
        };
        let ingress = self
            .load_balancer_ip
            .iter()
            .flat_map(external)
            .map(|ip| LoadBalancerIngress { ip: Some(ip.to_string()), ..LoadBalancerIngress::default() });
        let created = Timestamp::from_second(1_700_000_000 + self.created).unwrap();
        Service {
            metadata: ObjectMeta {
                creation_timestamp: Some(Time(created)),
                labels: self.is_of_others.then(others),
                ..named(NAMESPACE, format!("service-{n}"))
            },
            spec: Some(spec),
            status: Some(ServiceStatus {
                load_balancer: Some(LoadBalancerStatus { ingress: Some(ingress.collect()) }),
                ..ServiceStatus::default()
            }),
        }
    }

    /// Endpoints with an even number are in one slice, the others in another.
    fn slices(&self, n: usize) -> Vec<EndpointSlice> {
        let mut slices = Vec::new();
        for (family, ip) in [("IPv4", v4 as fn(u8, u8) -> IpAddr), ("IPv6", v6)] {
            for half in 0..2 {
                let endpoints = self.endpoints.iter().filter(|endpoint| endpoint.number % 2 == half);
                let ports = self.ports.iter().map(|port| EndpointPort {
                    name: Some(port.name.to_owned()),
                    protocol: Some(port.protocol.to_string()),
                    port: Some(i32::from(port.number) + 8000),
                    ..EndpointPort::default()
                });
                let mut metadata = named(NAMESPACE, format!("service-{n}-{family}-{half}").to_lowercase());
                let mut labels = if self.is_of_others { others() } else { BTreeMap::new() };
                labels.insert(ingest::SERVICE_NAME.to_owned(), format!("service-{n}"));
                metadata.labels = Some(labels);
                slices.push(EndpointSlice {
                    metadata,
                    address_type: family.to_owned(),
                    ports: Some(ports.collect()),
                    endpoints: endpoints
                        .map(|endpoint| endpoint.object(ip(endpoint_network(n), endpoint.number + 1)))
                        .collect(),
                });
            }
        }
        slices
    }
}

impl RandomPort {
    fn object(&self) -> ServicePort {
        ServicePort {
            name: Some(self.name.to_owned()),
            protocol: Some(self.protocol.to_string()),
            port: self.number.into(),
            node_port: self.node_port.map(Into::into),
            ..ServicePort::default()
        }
    }
}

impl RandomEndpoint {
    fn object(&self, ip: IpAddr) -> Endpoint {
        let (ready, serving, terminating) = self.conditions;
        let zones = self.hint_zones.iter().map(|name| ForZone { name: (*name).to_owned() });
        let nodes = self.hint_nodes.iter().map(|name| ForNode { name: (*name).to_owned() });
        Endpoint {
            addresses: vec![ip.to_string()],
            conditions: Some(EndpointConditions {
                ready: Some(ready),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            hints: Some(EndpointHints { for_zones: Some(zones.collect()), for_nodes: Some(nodes.collect()) }),
            node_name: self.node.map(|n| NODES[n].to_owned()),
            ..Endpoint::default()
        }
    }
}

impl RandomNode {
    fn object(&self, name: &str) -> Node {
        let mut metadata = named("", name.to_owned());
        metadata.labels = self.zone.map(|zone| [(ingest::ZONE.to_owned(), zone.to_owned())].into());
        let addresses = self.addresses.iter().flat_map(|number| Families::Both.ips(NODE_NETWORK, *number));
        let addresses =
            addresses.map(|ip| NodeAddress { type_: "InternalIP".to_owned(), address: ip.to_string() });
        Node {
            metadata,
            status: Some(NodeStatus { addresses: Some(addresses.collect()), ..NodeStatus::default() }),
            ..Node::default()
        }
    }
}

pub(crate) fn settings() -> Settings {
    Settings::of_node(NODES[0])
}

/// A state that adopts an image.
pub(crate) fn state(capacity: Capacity, found: &Image) -> State {
    State::new(settings(), Vec::new(), capacity, found)
}

/// A call: its destination, and whether it is from the node's own network namespace.
pub(crate) type Call = (FrontendAddress, bool);

/// Every call that may matter in any random cluster.
pub(crate) fn calls() -> Vec<Call> {
    let mut calls = Vec::new();
    let mut add = |ip: IpAddr, ports: &[u16]| {
        for &port in ports {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for on_node in [true, false] {
                    calls.push((FrontendAddress { ip, port, protocol }, on_node));
                }
            }
        }
    };
    for (network, n_ips, ports) in [
        (SERVICE_NETWORK, 4, &[80, 81][..]),
        (EXTERNAL_NETWORK, 2, &[80, 81]),
        (NODE_NETWORK, 4, &NODE_PORTS),
    ] {
        for number in 0..n_ips {
            add(v4(network, number), ports);
            add(v6(network, number), ports);
        }
    }
    for ip in [Ipv4Addr::LOCALHOST.into(), IpAddr::from(Ipv6Addr::LOCALHOST), Ipv4Addr::UNSPECIFIED.into()] {
        add(ip, &NODE_PORTS);
    }
    calls
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcomes {
    Untouched,
    Refused,
    Unreachable,
    Endpoints(BTreeSet<SocketAddr>),
}

/// The possible outcomes of a call, by the programs' own look-ups in an image.
pub(crate) fn outcomes(simulator: &Simulator, (to, on_node): Call) -> Outcomes {
    let caller = Caller { on_node, ..Caller::default() };
    let Some((_, frontend)) = simulator.find_frontend(to, caller) else {
        return match simulator.call(to, caller, 0, 0) {
            Outcome::Untouched => Outcomes::Untouched,
            Outcome::Refused => Outcomes::Refused,
            Outcome::Unreachable => Outcomes::Unreachable,
            Outcome::Endpoint(endpoint, _) => panic!("{to} reaches {endpoint} without a frontend"),
        };
    };
    let entries = simulator.image.entries(to.ip.is_ipv6(), frontend.run);
    let entries = entries.unwrap_or_else(|| panic!("{to}: no run at {:?}", frontend.run));
    if entries.is_empty() {
        return Outcomes::Refused;
    }
    Outcomes::Endpoints(entries.iter().map(|entry| entry.address).collect())
}

/// A simulator over an image, with node ports on loopback.
pub(crate) fn simulator(image: Image) -> Simulator {
    let mut simulator = Simulator::new(image);
    simulator.config = Config::default();
    simulator
}

/// The allowed outcomes of calls while a plan changes one image to another.
///
/// A call sees the old or the new state of the frontends, and, independently, the old or the new state of the
/// node addresses. If one plan changes both, a new node's address may meet a service that is about to be
/// deleted.
pub(crate) struct Allowed {
    of_states: Vec<Vec<Outcomes>>,
}

impl Allowed {
    pub(crate) fn between(before: &Image, after: &Image, calls: &[Call]) -> Self {
        Self::among(&[before.clone(), after.clone()], calls)
    }

    /// The same for several plans.
    pub(crate) fn among(images: &[Image], calls: &[Call]) -> Self {
        let nodes: BTreeSet<&BTreeMap<IpAddr, bool>> = images.iter().map(|image| &image.node_addrs).collect();
        let mixed = |frontends: &Image, nodes: &BTreeMap<IpAddr, bool>| {
            let simulator = simulator(Image { node_addrs: nodes.clone(), ..frontends.clone() });
            calls.iter().map(|call| outcomes(&simulator, *call)).collect()
        };
        let of_states =
            images.iter().flat_map(|image| nodes.iter().map(move |nodes| mixed(image, nodes))).collect();
        Self { of_states }
    }

    /// Whether all current outcomes of a call are allowed. `call` is its index.
    pub(crate) fn admits(&self, call: usize, now: &Outcomes) -> bool {
        match now {
            Outcomes::Endpoints(endpoints) => {
                endpoints.iter().all(|endpoint| self.admits_endpoint(call, endpoint))
            }
            other => self.of_states.iter().any(|outcomes| outcomes[call] == *other),
        }
    }

    /// Whether a call reaches endpoints in one of the states, but in neither an earlier nor a later one.
    pub(crate) fn comes_and_goes(&self, call: usize) -> bool {
        let is_served = |outcomes: &Vec<Outcomes>| matches!(outcomes[call], Outcomes::Endpoints(_));
        let first_absent = self.of_states.iter().position(|state| !is_served(state));
        let last_absent = self.of_states.iter().rposition(|state| !is_served(state));
        first_absent
            .zip(last_absent)
            .is_some_and(|(first, last)| self.of_states[first..last].iter().any(is_served))
    }

    /// Whether a call may reach an endpoint.
    pub(crate) fn admits_endpoint(&self, call: usize, endpoint: &SocketAddr) -> bool {
        let has =
            |outcomes: &Outcomes| matches!(outcomes, Outcomes::Endpoints(set) if set.contains(endpoint));
        self.of_states.iter().any(|outcomes| has(&outcomes[call]))
    }

    /// The allowed outcomes of a call, for a message.
    pub(crate) fn describe(&self, call: usize) -> String {
        let all: Vec<_> = self.of_states.iter().map(|outcomes| format!("{:?}", outcomes[call])).collect();
        all.join(" or ")
    }
}
