//! Random clusters, and the outcomes of calls in them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lb_core::{
    desired::{FrontendAddress, Settings},
    model::{Cidr, Protocol, ingest},
    plan::Capacity,
    sim::{Caller, Config, Outcome, Simulator},
    state::State,
    tables::{Addresses, Entry, Image, StoredRun},
};
use lb_tests::cluster::{Cluster, NAMESPACE, Object, object, service_cidr};
use proptest::{bool, collection::vec, option, prelude::*, sample::subsequence};
use serde_json::{Value, json};

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
    source_ranges: Vec<&'static str>,
    ports: Vec<RandomPort>,
    is_internal_local: bool,
    is_external_local: bool,
    affinity: Option<i32>,
    created: u8,
    /// Whether another proxy serves it.
    is_of_others: bool,
    /// The annotation `socklb.io/balance`.
    balance: Option<&'static str>,
    /// Of the endpoints with even and with odd numbers.
    weights: [Option<u8>; 2],
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
    /// Whether the Node names the networks of its pods.
    has_pods: bool,
}

/// All objects that decide about frontends.
#[derive(Clone, Debug)]
pub(crate) struct RandomCluster {
    services: [Option<RandomService>; 4],
    nodes: [Option<RandomNode>; 3],
    interfaces: Vec<u8>,
    has_networks: bool,
}

prop_compose! {
    fn endpoint()(
        number in 0u8..6,
        node in option::weighted(0.8, 0..NODES.len()),
        conditions in prop_oneof![
            4 => Just((true, true, false)),
            1 => Just((false, false, false)),
            1 => Just((false, true, true)),
            1 => Just((false, false, true)),
        ],
        (hint_nodes, hint_zones) in prop_oneof![
            3 => Just((Vec::new(), Vec::new())),
            2 => (subsequence(&NODES[..], 0..=2), subsequence(&ZONES[..], 1..=2)),
        ],
    ) -> RandomEndpoint {
        RandomEndpoint { number, node, conditions, hint_nodes, hint_zones }
    }
}

prop_compose! {
    fn port(name: &'static str, protocol: Protocol, number: u16)(
        node_port in option::of(prop::sample::select(&NODE_PORTS[..])),
    ) -> RandomPort {
        RandomPort { name, protocol, number, node_port }
    }
}

prop_compose! {
    fn service()(
        families in prop_oneof![3 => Just(Families::V4), 1 => Just(Families::V6), 2 => Just(Families::Both)],
        cluster_ip in 0u8..4,
        external_ips in vec(0u8..2, 0..=2),
        load_balancer_ip in option::weighted(0.3, 0u8..2),
        source_ranges in prop_oneof![2 => Just(Vec::new()), 1 => subsequence(&SOURCE_RANGES[..], 1..=3)],
        ports in (
            option::weighted(0.8, port("a", Protocol::Tcp, 80)),
            option::of(port("b", Protocol::Udp, 80)),
            option::weighted(0.3, port("c", Protocol::Tcp, 81)),
            option::weighted(0.2, port("d", Protocol::Sctp, 80)),
        ),
        [is_internal_local, is_external_local] in any::<[bool; 2]>(),
        affinity in option::weighted(0.3, 1i32..100),
        created in 0u8..3,
        is_of_others in bool::weighted(0.15),
        balance in option::weighted(0.3, Just("least-connections")),
        weights in [(); 2].map(|()| option::weighted(0.2, prop::sample::select(&WEIGHTS[..]))),
        endpoints in prop_oneof![1 => Just(Vec::new()), 4 => vec(endpoint(), 1..=5)],
    ) -> RandomService {
        let ports = [ports.0, ports.1, ports.2, ports.3].into_iter().flatten().collect();
        RandomService {
            families, cluster_ip, external_ips, load_balancer_ip, source_ranges, ports, is_internal_local,
            is_external_local, affinity, created, is_of_others, balance, weights, endpoints,
        }
    }
}

prop_compose! {
    fn node()(
        zone in option::of(prop::sample::select(&ZONES[..])),
        addresses in vec(0u8..4, 0..=2),
        has_pods: bool,
    ) -> RandomNode {
        RandomNode { zone, addresses, has_pods }
    }
}

prop_compose! {
    fn unboxed_cluster()(
        services in [(); 4].map(|()| option::weighted(0.8, service().boxed())),
        nodes in [(); 3].map(|()| option::weighted(0.8, node())),
        interfaces in vec(0u8..4, 0..=2),
        has_networks in bool::weighted(0.8),
    ) -> RandomCluster {
        RandomCluster { services, nodes, interfaces, has_networks }
    }
}

/// A random cluster. Boxed like its services: by value they are too large for the stack of a test.
pub(crate) fn cluster() -> BoxedStrategy<RandomCluster> {
    unboxed_cluster().boxed()
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

/// Weights of slices; without one it is 100.
const WEIGHTS: [u8; 3] = [0, 50, 200];

const SOURCE_RANGES: [&str; 6] =
    ["198.51.100.0/24", "198.51.100.7/32", "10.98.0.0/16", "::/0", "2001:db8::/32", "fd00:62::1/128"];
/// The networks of the endpoints of the first two services, as those of pods of this node.
pub(crate) const POD_NETWORKS: [&str; 2] = ["10.0.0.0/15", "fd00::/31"];

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

    /// The addresses of this node: of its interfaces, and as its Node has them.
    pub(crate) fn node_addresses(&self) -> BTreeSet<IpAddr> {
        let listed = self.nodes[0].iter().flat_map(|node| &node.addresses);
        let listed = listed.flat_map(|number| Families::Both.ips(NODE_NETWORK, *number));
        self.interfaces().into_iter().chain(listed).collect()
    }

    /// The networks of this node's pods, if its Node names them.
    pub(crate) fn pods(&self) -> Vec<Cidr> {
        let is_known = self.nodes[0].as_ref().is_some_and(|node| node.has_pods);
        let networks = POD_NETWORKS.iter().filter(|_| is_known);
        networks.map(|network| network.parse().unwrap()).collect()
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

fn parsed(value: &Value) -> Object {
    object(value).unwrap()
}

fn named(names: &[&str]) -> Vec<Value> {
    names.iter().map(|name| json!({"name": name})).collect()
}

impl RandomService {
    /// The label of a Service of another proxy.
    fn proxy(&self) -> Option<&'static str> {
        self.is_of_others.then_some("other")
    }

    fn object(&self, n: usize) -> Object {
        let external = |numbers: &[u8]| -> Vec<IpAddr> {
            numbers.iter().flat_map(|number| Families::Both.ips(EXTERNAL_NETWORK, *number)).collect()
        };
        let cluster_ips = self.families.ips(SERVICE_NETWORK, self.cluster_ip);
        let families = cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" });
        let ingress = external(self.load_balancer_ip.as_slice()).into_iter().map(|ip| json!({"ip": ip}));
        let policy = |is_local| if is_local { "Local" } else { "Cluster" };
        let ports = self.ports.iter().map(|RandomPort { name, protocol, number, node_port }| {
            json!({"name": name, "protocol": protocol.to_string(), "port": number, "nodePort": node_port})
        });
        parsed(&json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "namespace": NAMESPACE,
                "name": format!("service-{n}"),
                "creationTimestamp": format!("2023-11-14T22:13:2{}Z", self.created),
                "labels": self.proxy().map(|proxy| json!({ingest::SERVICE_PROXY_NAME: proxy})),
                "annotations": self.balance.map(|balance| json!({"socklb.io/balance": balance})),
            },
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": cluster_ips[0],
                "clusterIPs": cluster_ips,
                "ipFamilies": families.collect::<Vec<_>>(),
                "externalIPs": external(&self.external_ips),
                "internalTrafficPolicy": policy(self.is_internal_local),
                "externalTrafficPolicy": policy(self.is_external_local),
                "loadBalancerSourceRanges": self.source_ranges,
                "sessionAffinity": self.affinity.map(|_seconds| "ClientIP"),
                "sessionAffinityConfig":
                    self.affinity.map(|seconds| json!({"clientIP": {"timeoutSeconds": seconds}})),
                "ports": ports.collect::<Vec<_>>(),
            },
            "status": {"loadBalancer": {"ingress": ingress.collect::<Vec<_>>()}},
        }))
    }

    /// Endpoints with an even number are in one slice, the others in another.
    fn slices(&self, n: usize) -> Vec<Object> {
        let ports = self.ports.iter().map(|RandomPort { name, protocol, number, .. }| {
            json!({"name": name, "protocol": protocol.to_string(), "port": number + 8000})
        });
        let ports: Vec<Value> = ports.collect();
        let mut labels = json!({ingest::SERVICE_NAME: format!("service-{n}")});
        if let Some(proxy) = self.proxy() {
            labels[ingest::SERVICE_PROXY_NAME] = proxy.into();
        }
        let families = [("IPv4", v4 as fn(u8, u8) -> IpAddr), ("IPv6", v6)];
        let slices = families.into_iter().flat_map(|family| [(family, 0), (family, 1)]);
        let slices = slices.map(|((family, ip), half)| {
            let endpoints = self.endpoints.iter().filter(|endpoint| endpoint.number % 2 == half);
            let object =
                |endpoint: &RandomEndpoint| endpoint.object(ip(endpoint_network(n), endpoint.number + 1));
            parsed(&json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": NAMESPACE,
                    "name": format!("service-{n}-{family}-{half}").to_lowercase(),
                    "labels": labels,
                    "annotations": self.weights[usize::from(half)]
                        .map(|weight| json!({"socklb.io/weight": weight.to_string()})),
                },
                "addressType": family,
                "ports": ports,
                "endpoints": endpoints.map(object).collect::<Vec<_>>(),
            }))
        });
        slices.collect()
    }
}

impl RandomEndpoint {
    fn object(&self, ip: IpAddr) -> Value {
        let (ready, serving, terminating) = self.conditions;
        json!({
            "addresses": [ip],
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "hints": {"forZones": named(&self.hint_zones), "forNodes": named(&self.hint_nodes)},
            "nodeName": self.node.map(|n| NODES[n]),
        })
    }
}

impl RandomNode {
    fn object(&self, name: &str) -> Object {
        let addresses = self.addresses.iter().flat_map(|number| Families::Both.ips(NODE_NETWORK, *number));
        let addresses = addresses.map(|ip| json!({"type": "InternalIP", "address": ip}));
        parsed(&json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": self.zone.map(|zone| json!({ingest::ZONE: zone}))},
            "spec": {"podCIDRs": self.has_pods.then_some(POD_NETWORKS)},
            "status": {"addresses": addresses.collect::<Vec<_>>()},
        }))
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
    // An endpoint to fall back to may be reached, too: every state of health is possible.
    let spill = simulator.image.stored(to.ip.is_ipv6(), frontend.run).map(StoredRun::spill);
    let entries = entries.iter().chain(spill.unwrap_or_default());
    Outcomes::Endpoints(entries.map(Entry::address).collect())
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
        let nodes: BTreeSet<&Addresses> = images.iter().map(|image| &image.node_addrs).collect();
        let mixed = |frontends: &Image, nodes: &Addresses| {
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
