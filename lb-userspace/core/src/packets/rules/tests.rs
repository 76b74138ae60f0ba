use std::{collections::BTreeMap, slice};

use serde_json::{Value as Json, json};

use super::*;
use crate::{
    desired::{Settings, fixture},
    model::{self, Slice, fixture as objects},
    packets::{
        Reason, conntrack,
        sim::{self, Outcome, Outcomes, Packet},
    },
    plan::Capacity,
    state::State,
    tables::Image,
};

/// An agent's state on `node-a`, and the kernel's tables.
struct Node {
    state: State,
    kernel: BTreeMap<TableId, Table>,
}

impl Node {
    fn new(mode: PacketMode) -> Self {
        let settings = Settings {
            packets: mode,
            service_cidrs: Some(vec!["10.96.0.0/16".parse().unwrap()]),
            ..fixture::settings()
        };
        let capacity = Capacity { services: 64, endpoints: 256 };
        let mut node = Self {
            state: State::new(settings, Vec::new(), capacity, &Image::default()),
            kernel: BTreeMap::new(),
        };
        let mut nodes = fixture::nodes();
        nodes[0].pod_cidrs = vec!["10.1.0.0/24".parse().unwrap(), "fd10::/64".parse().unwrap()];
        for object in nodes {
            node.state.change(|store| store.set_node(&object.name.clone(), Some(object)));
        }
        node
    }

    fn set(&mut self, patch: &Json, slices: &[Slice]) {
        let (service, _issues) = objects::ingest_service(patch);
        let service = service.unwrap();
        self.state.change(|store| store.set_service(&service.key.clone(), Some(service)));
        for slice in slices {
            self.state.change(|store| store.set_slice(&slice.key(), Some(slice.clone())));
        }
        self.sync();
    }

    /// Applies the changes, and compares the result with tables made from scratch. Returns their number.
    fn sync(&mut self) -> usize {
        let _plan = self.state.sync();
        let transaction = self.state.take_packet_changes();
        let n_changes = transaction.changes.len();
        sim::apply(&mut self.kernel, &transaction.changes).unwrap();
        assert_eq!(self.kernel, self.state.packets().tables());
        assert_eq!(self.state.take_packet_changes(), Transaction::default());
        while self.state.packets().has_leaving() {
            self.state.settle_packets();
            sim::apply(&mut self.kernel, &self.state.take_packet_changes().changes).unwrap();
            assert_eq!(self.kernel, self.state.packets().tables());
        }
        n_changes
    }

    /// Everything that can become of a packet.
    fn outcomes(&self, packet: Packet) -> Outcomes {
        let table = self.kernel.iter().find(|(id, _)| id.family == ip::family(packet.source));
        table.map_or_else(
            || sim::outcomes(&Table::default(), packet),
            |(_, table)| sim::outcomes(table, packet),
        )
    }
}

fn packet(text: &str) -> Packet {
    let [source, destination, protocol] = text.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{text}")
    };
    let protocol = match protocol {
        "tcp" => 6,
        "udp" => 17,
        _ => 132,
    };
    let source: IpAddr = source.parse().unwrap();
    let is_own = ["192.168.0.1", "fd01::1"].map(|own| own.parse::<IpAddr>().unwrap()).contains(&source);
    Packet { source, destination: destination.parse().unwrap(), protocol, is_own }
}

/// An outcome as text: `ADDRESS` or `ADDRESS masqueraded`, `rejected`, `dropped`, `passes`.
fn text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Passes => "passes".to_owned(),
        Outcome::Translated { endpoint, is_masqueraded: false } => endpoint.to_string(),
        Outcome::Translated { endpoint, is_masqueraded: true } => format!("{endpoint} masqueraded"),
        Outcome::Rejected => "rejected".to_owned(),
        Outcome::Dropped => "dropped".to_owned(),
    }
}

/// The endpoint `10.1.0.1` is on this node, `10.1.1.1` on another.
fn slice() -> Slice {
    fixture::slice(&["10.1.0.1 node-a rs", "10.1.1.1 node-b rs"])
}

fn load_balancer(spec: &Json) -> Json {
    objects::patched(
        json!({
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
                "ports": [{"port": 80, "nodePort": 30080}],
                "externalIPs": ["203.0.113.5"],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
        }),
        &json!({ "spec": spec }),
    )
}

const CLUSTER_IP: &str = "10.96.0.1:80 tcp";
const OUTSIDE: &str = "198.51.100.7";
const POD: &str = "10.1.0.9";
const ITSELF: &str = "10.1.0.1";
const THIS_NODE: &str = "192.168.0.1";

#[track_caller]
fn check(node: &Node, expected: &[(&str, &str, &[&str])]) {
    for (source, destination, outcomes) in expected {
        let found = node.outcomes(packet(&format!("{source} {destination}")));
        let found: Vec<String> = found.all.iter().map(text).collect();
        assert_eq!(found, *outcomes, "{source} to {destination}");
    }
}

#[test]
fn policy_cluster() {
    let mut node = Node::new(PacketMode::All);
    node.set(&load_balancer(&json!({})), &[slice()]);
    let both: &[&str] = &["10.1.0.1:8080", "10.1.1.1:8080"];
    let masqueraded: &[&str] = &["10.1.0.1:8080 masqueraded", "10.1.1.1:8080 masqueraded"];
    check(
        &node,
        &[
            // A pod calls as itself, except that an endpoint which calls itself sees the node.
            (POD, CLUSTER_IP, both),
            (ITSELF, CLUSTER_IP, &["10.1.0.1:8080 masqueraded", "10.1.1.1:8080"]),
            (OUTSIDE, CLUSTER_IP, masqueraded),
            (THIS_NODE, CLUSTER_IP, masqueraded),
            // The answer has to come back by this node.
            (OUTSIDE, "203.0.113.1:80 tcp", masqueraded),
            (OUTSIDE, "203.0.113.5:80 tcp", masqueraded),
            (OUTSIDE, "192.168.0.1:30080 tcp", masqueraded),
            (POD, "192.168.0.1:30080 tcp", masqueraded),
            (THIS_NODE, "192.168.0.1:30080 tcp", masqueraded),
            // What is no frontend.
            (OUTSIDE, "192.168.0.2:30080 tcp", &["passes"]),
            (OUTSIDE, "192.168.0.1:30081 tcp", &["passes"]),
            (OUTSIDE, "203.0.113.1:80 udp", &["passes"]),
            (POD, "10.96.0.1:81 tcp", &["rejected"]),
            (POD, "10.96.0.2:80 tcp", &["dropped"]),
            (POD, "10.97.0.2:80 tcp", &["passes"]),
        ],
    );
}

#[test]
fn policy_local() {
    let local = json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"});
    let mut node = Node::new(PacketMode::All);
    node.set(&load_balancer(&local), &[slice()]);
    let both: &[&str] = &["10.1.0.1:8080", "10.1.1.1:8080"];
    let masqueraded: &[&str] = &["10.1.0.1:8080 masqueraded", "10.1.1.1:8080 masqueraded"];
    check(
        &node,
        &[
            (POD, CLUSTER_IP, &["10.1.0.1:8080"]),
            (OUTSIDE, "203.0.113.1:80 tcp", &["10.1.0.1:8080"]),
            (OUTSIDE, "192.168.0.1:30080 tcp", &["10.1.0.1:8080"]),
            (POD, "203.0.113.1:80 tcp", both),
            (POD, "192.168.0.1:30080 tcp", both),
            (THIS_NODE, "203.0.113.1:80 tcp", masqueraded),
        ],
    );
    node.set(&load_balancer(&local), &[fixture::slice(&["10.1.1.1 node-b rs"])]);
    check(
        &node,
        &[
            (POD, CLUSTER_IP, &["rejected"]),
            (OUTSIDE, "203.0.113.1:80 tcp", &["dropped"]),
            (OUTSIDE, "192.168.0.1:30080 tcp", &["dropped"]),
            (POD, "203.0.113.1:80 tcp", &["10.1.1.1:8080"]),
        ],
    );
    node.set(&load_balancer(&local), &[fixture::slice(&[])]);
    let nothing: &[(&str, &str, &[&str])] = &[
        (POD, CLUSTER_IP, &["rejected"]),
        (OUTSIDE, "203.0.113.1:80 tcp", &["rejected"]),
        (OUTSIDE, "192.168.0.1:30080 tcp", &["rejected"]),
        (POD, "203.0.113.1:80 tcp", &["rejected"]),
    ];
    check(&node, nothing);
}

#[test]
fn packets_of_the_node_are_for_the_mode_all() {
    for (mode, from_outside) in [
        (PacketMode::Off, "passes"),
        (PacketMode::External, "10.1.0.1:8080 masqueraded"),
        (PacketMode::All, "10.1.0.1:8080 masqueraded"),
    ] {
        let mut node = Node::new(mode);
        node.set(&load_balancer(&json!({})), &[fixture::slice(&["10.1.0.1 node-a rs"])]);
        check(&node, &[(OUTSIDE, "203.0.113.1:80 tcp", &[from_outside])]);
        let others = if mode == PacketMode::All { from_outside } else { "passes" };
        check(&node, &[(THIS_NODE, "203.0.113.1:80 tcp", &[others]), (THIS_NODE, CLUSTER_IP, &[others])]);
        let unallocated = if mode == PacketMode::All { "dropped" } else { "passes" };
        check(&node, &[(POD, "10.96.0.2:80 tcp", &[unallocated])]);
    }
}

#[test]
fn source_ranges_hold_for_load_balancer_addresses() {
    let mut node = Node::new(PacketMode::All);
    let ranges = json!({"loadBalancerSourceRanges": ["198.51.100.0/25", "198.51.100.0/24", "192.0.2.7/32"]});
    node.set(&load_balancer(&ranges), &[fixture::slice(&["10.1.1.1 node-b rs"])]);
    let at = "203.0.113.1:80 tcp";
    check(
        &node,
        &[
            ("198.51.100.7", at, &["10.1.1.1:8080 masqueraded"]),
            ("198.51.100.200", at, &["10.1.1.1:8080 masqueraded"]),
            ("198.51.101.0", at, &["dropped"]),
            (THIS_NODE, at, &["dropped"]),
            // Other addresses are open.
            ("198.51.101.0", "203.0.113.5:80 tcp", &["10.1.1.1:8080 masqueraded"]),
            ("198.51.101.0", "192.168.0.1:30080 tcp", &["10.1.1.1:8080 masqueraded"]),
        ],
    );
    // Hooks cannot check them: sockets' calls go the packets' way.
    let limited = FrontendAddress { ip: [203, 0, 113, 1].into(), port: 80, protocol: Protocol::Tcp };
    assert!(node.state.desired().owner(&limited).is_none());
    assert!(!node.state.image().services.contains_key(&limited));
    assert_eq!(node.state.issues().count(), 0);
    // A range that admits the node admits the address itself, which may be the node's source.
    let ranges = json!({"loadBalancerSourceRanges": ["192.168.0.0/16"]});
    node.set(&load_balancer(&ranges), &[]);
    check(&node, &[("203.0.113.1", at, &["10.1.1.1:8080 masqueraded"]), (OUTSIDE, at, &["dropped"])]);
}

/// Nothing but the ranges depends on the node's addresses: the Service has no node port.
#[test]
fn source_ranges_follow_the_addresses_of_the_node() {
    let mut node = Node::new(PacketMode::All);
    let spec = json!({
        "loadBalancerSourceRanges": ["192.168.7.0/24"],
        "ports": [{"port": 80}],
        "externalIPs": [],
    });
    node.set(&load_balancer(&spec), &[fixture::slice(&["10.1.1.1 node-b rs"])]);
    let from_itself = ("203.0.113.1", "203.0.113.1:80 tcp");
    check(&node, &[(from_itself.0, from_itself.1, &["dropped"])]);
    node.state.set_interfaces(vec![[192, 168, 7, 1].into()]);
    node.sync();
    check(&node, &[(from_itself.0, from_itself.1, &["10.1.1.1:8080 masqueraded"])]);
}

#[test]
fn sctp_is_served_as_packets() {
    let ports = json!([{"port": 80, "nodePort": 30080, "protocol": "SCTP"}]);
    let service = load_balancer(&json!({ "ports": ports }));
    let endpoints = objects::slice(&json!({
        "ports": [{"name": "", "port": 8080, "protocol": "SCTP"}],
        "endpoints": [fixture::endpoint("10.1.1.1 node-b rs")],
    }));
    let mut node = Node::new(PacketMode::All);
    node.set(&service, slice::from_ref(&endpoints));
    check(
        &node,
        &[
            (POD, "10.96.0.1:80 sctp", &["10.1.1.1:8080"]),
            (OUTSIDE, "192.168.0.1:30080 sctp", &["10.1.1.1:8080 masqueraded"]),
            (POD, "10.96.0.1:80 tcp", &["rejected"]),
        ],
    );
    assert_eq!(node.state.issues().count(), 0);
    assert!(node.state.image().services.is_empty(), "no hook serves it");
    for (mode, n_issues) in [(PacketMode::External, 1), (PacketMode::Off, 1)] {
        let mut node = Node::new(mode);
        node.set(&service, slice::from_ref(&endpoints));
        assert_eq!(node.state.issues().count(), n_issues, "{mode}");
    }
}

#[test]
fn a_client_stays_with_its_endpoint_for_as_long_as_the_service_has_it() {
    for (address, map) in [("10.96.0.1:80", "affinity"), ("192.168.0.1:30080", "nodeport-affinity")] {
        let mut node = Node::new(PacketMode::All);
        let affinity = json!({"sessionAffinity": "ClientIP"});
        node.set(&load_balancer(&affinity), &[slice()]);
        let send = |node: &mut Node, source: &str, n: u32| {
            let packet = packet(&format!("{source} {address} tcp"));
            let table = node.kernel.values_mut().next().unwrap();
            match sim::send(table, packet, &mut |below| n % below) {
                Outcome::Translated { endpoint, .. } => endpoint.ip().to_string(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(send(&mut node, "10.1.0.20", 1), "10.1.1.1");
        assert_eq!(send(&mut node, "10.1.0.20", 0), "10.1.1.1", "it stays");
        assert_eq!(send(&mut node, "10.1.0.21", 0), "10.1.0.1", "another client");
        assert!(!node.state.take_stale_packet_records().clients);
        let changed = fixture::slice(&["10.1.0.1 node-a rs", "10.1.0.3 node-a rs"]);
        node.state.change(|store| store.set_slice(&changed.key(), Some(changed)));
        let _plan = node.state.sync();
        sim::apply(&mut node.kernel, &node.state.take_packet_changes().changes).unwrap();
        assert_eq!(node.state.take_stale_packet_records(), Stale { clients: true, ..Stale::default() });
        let clients = node.kernel.values_mut().next().unwrap().sets.get_mut(map).unwrap();
        assert_eq!(clients.elements.len(), 2);
        let stale = node.state.packets().stale_clients(Family::V4, &clients.elements);
        assert_eq!(stale.len(), 1);
        clients.elements.remove(&stale[0]);
        assert_eq!(send(&mut node, "10.1.0.21", 1), "10.1.0.1", "{address}: its endpoint is there");
        assert_eq!(send(&mut node, "10.1.0.20", 1), "10.1.0.3", "{address}: its endpoint is gone");
        assert_eq!(send(&mut node, "10.1.0.20", 0), "10.1.0.3", "and it stays with the new one");
    }
}

#[test]
fn a_packet_has_a_reason_and_leaves_the_tables_as_they_are() {
    let mut node = Node::new(PacketMode::All);
    let limits = json!({
        "sessionAffinity": "ClientIP",
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["198.51.100.0/25"],
    });
    node.set(&load_balancer(&limits), &[fixture::slice(&["10.1.1.1 node-b rs", "10.1.2.1 node-b rs"])]);
    node.set(
        &json!({"metadata": {"name": "idle"}, "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"]}}),
        &[],
    );
    let send = packet("10.1.0.20 10.96.0.1:80 tcp");
    let _recorded = sim::send(node.kernel.values_mut().next().unwrap(), send, &mut |_below| 0);
    let before = node.kernel.clone();
    for (sent, reason, seconds) in [
        ("10.1.0.21 10.96.0.1:80 tcp", Reason::Drawn, Some(10_800)),
        ("10.1.0.20 10.96.0.1:80 tcp", Reason::Kept, Some(10_800)),
        ("10.1.0.21 192.168.0.1:30080 tcp", Reason::Drawn, Some(10_800)),
        ("10.1.0.21 10.96.0.7:80 tcp", Reason::NoEndpoint, None),
        ("10.1.0.21 10.96.0.1:81 tcp", Reason::UndefinedPort, None),
        ("10.1.0.21 10.96.0.99:80 tcp", Reason::NoService, None),
        ("10.1.0.21 10.97.0.99:80 tcp", Reason::NoFrontend, None),
        ("198.51.100.7 192.168.0.1:30080 tcp", Reason::NoLocalEndpoint, None),
        ("198.51.100.7 203.0.113.1:80 tcp", Reason::NoLocalEndpoint, None),
        ("198.51.100.200 203.0.113.1:80 tcp", Reason::SourceRanges, None),
    ] {
        let outcomes = node.outcomes(packet(sent));
        assert_eq!(Reason::of(&outcomes), reason, "{sent}: {outcomes:?}");
        let recorded = outcomes.recorded.map(|time| time.get() / 1000);
        assert_eq!(recorded, seconds, "{sent}");
    }
    assert_eq!(node.kernel, before);
}

#[test]
fn a_change_of_endpoints_touches_elements_of_data_alone() {
    let mut node = Node::new(PacketMode::All);
    for last in 1..100 {
        let ip = format!("10.96.1.{last}");
        let name = format!("web-{last}");
        node.set(
            &json!({"metadata": {"name": name}, "spec": {"clusterIP": ip, "clusterIPs": [ip]}}),
            &[fixture::slice(&[])],
        );
    }
    let lines = ["10.1.0.1 node-a rs", "10.1.1.1 node-b rs", "10.1.2.1 node-b rs", "10.1.3.1 node-b rs"];
    node.set(&load_balancer(&json!({})), &[fixture::slice(&lines[..3])]);
    let four = fixture::slice(&lines);
    node.state.change(|store| store.set_slice(&four.key(), Some(four)));
    let _plan = node.state.sync();
    let transaction = node.state.take_packet_changes();
    let added = |(_, change): &(TableId, Change)| match change {
        Change::AddElements(set, elements) if set.ends_with("endpoints") => elements.len(),
        other => panic!("{other:?}"),
    };
    // Its four frontends have one more endpoint.
    assert_eq!(transaction.changes.iter().map(added).sum::<usize>(), 4);
    sim::apply(&mut node.kernel, &transaction.changes).unwrap();
    assert_eq!(node.kernel, node.state.packets().tables());
}

#[test]
fn nothing_of_a_service_is_left_behind() {
    let mut node = Node::new(PacketMode::All);
    node.sync();
    let before = node.kernel.clone();
    let affinity = json!({"sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local"});
    node.set(&load_balancer(&affinity), &[slice()]);
    assert_ne!(node.kernel, before);
    node.state.change(|store| store.set_service(&model::ServiceKey::new("default", "web"), None));
    node.sync();
    assert_eq!(node.kernel, before);
}

/// The Service of [`load_balancer`] with UDP in place of TCP.
fn datagrams(spec: &Json) -> Json {
    let mut service = load_balancer(spec);
    service["spec"]["ports"][0]["protocol"] = "UDP".into();
    service
}

#[test]
fn flows_are_stale_when_their_endpoint_serves_no_more_or_their_frontend_is_gone() {
    let mut node = Node::new(PacketMode::All);
    let udp_slice = |states: &[&str]| {
        let endpoints: Vec<Json> = states.iter().map(|state| fixture::endpoint(state)).collect();
        objects::slice(&json!({
            "endpoints": endpoints, "ports": [{"name": "", "protocol": "UDP", "port": 8080}],
        }))
    };
    let flow = |called: &str, answers: &str| conntrack::Entry {
        protocol: Protocol::Udp,
        source: "192.0.2.9:40000".parse().unwrap(),
        destination: called.parse().unwrap(),
        reply_source: answers.parse().unwrap(),
        id: 1,
        zone: 0,
    };
    let called = ["10.96.0.1:80", "203.0.113.1:80", "192.168.0.1:30080"];
    let check = |node: &mut Node, of_endpoint: &[(&str, bool)]| {
        let stale = node.state.take_stale_packet_records();
        assert!(stale.flows);
        for (called, (answers, expected)) in
            called.iter().flat_map(|called| of_endpoint.iter().map(move |endpoint| (called, endpoint)))
        {
            let found = node.state.is_stale_flow(&flow(called, answers), &stale.removed);
            assert_eq!(found, *expected, "{called} by {answers}");
        }
        for called in called {
            // It was not translated: stale only while there is a service.
            let is_served = node.state.packets().sizes().0 > 0;
            assert_eq!(
                node.state.is_stale_flow(&flow(called, called), &stale.removed),
                is_served,
                "{called}"
            );
        }
    };
    let local = json!({"externalTrafficPolicy": "Local"});
    node.set(&datagrams(&json!({})), &[udp_slice(&["10.1.0.1 node-a rs", "10.1.1.1 node-b rs"])]);
    check(&mut node, &[("10.1.0.1:8080", false), ("10.1.1.1:8080", false), ("10.1.1.1:8081", true)]);
    node.set(&datagrams(&local), &[udp_slice(&["10.1.0.1 node-a rs", "10.1.1.1 node-b st"])]);
    check(&mut node, &[("10.1.0.1:8080", false), ("10.1.1.1:8080", false), ("10.1.2.1:8080", true)]);
    // New connections already did not get it.
    node.set(&datagrams(&local), &[udp_slice(&["10.1.0.1 node-a rs", "10.1.1.1 node-b t"])]);
    check(&mut node, &[("10.1.0.1:8080", false), ("10.1.1.1:8080", true)]);
    node.set(&datagrams(&local), &[udp_slice(&["10.1.1.1 node-b t"])]);
    check(&mut node, &[("10.1.0.1:8080", true), ("10.1.1.1:8080", false)]);
    node.set(&datagrams(&local), &[udp_slice(&[])]);
    check(&mut node, &[("10.1.0.1:8080", true), ("10.1.1.1:8080", true)]);
    let before = frontends_of(Family::V4, &node.state.packets().tables()[&super::table_id(Family::V4)]);
    assert_eq!(before, BTreeSet::new());
    node.set(&datagrams(&local), &[udp_slice(&["10.1.0.1 node-a rs"])]);
    let stale = node.state.take_stale_packet_records();
    assert!(stale.removed.is_empty());
    let table = &node.state.packets().tables()[&super::table_id(Family::V4)];
    let of_table = frontends_of(Family::V4, table);
    node.state.change(|store| store.set_service(&model::ServiceKey::new("default", "web"), None));
    node.sync();
    let stale = node.state.take_stale_packet_records();
    // As another agent finds them.
    assert_eq!(stale.removed, of_table);
    for called in called {
        assert!(node.state.is_stale_flow(&flow(called, "10.1.0.1:8080"), &stale.removed));
        assert!(!node.state.is_stale_flow(&flow(called, called), &stale.removed), "{called} is another's");
        assert!(!node.state.is_stale_flow(&flow(called, "10.1.0.1:8080"), &BTreeSet::new()));
    }
}

#[test]
fn ipv6() {
    let mut node = Node::new(PacketMode::All);
    let service = json!({
        "spec": {
            "type": "NodePort", "clusterIP": "fd96::1", "clusterIPs": ["fd96::1"], "ipFamilies": ["IPv6"],
            "ports": [{"port": 80, "nodePort": 30080}], "sessionAffinity": "ClientIP",
        },
    });
    let slice = objects::slice(&json!({
        "addressType": "IPv6",
        "endpoints": [fixture::endpoint("fd10::1 node-a rs"), fixture::endpoint("fd11::1 node-b rs")],
    }));
    node.set(&service, &[slice]);
    check(
        &node,
        &[
            ("fd10::9", "[fd96::1]:80 tcp", &["[fd10::1]:8080", "[fd11::1]:8080"]),
            ("fd10::1", "[fd96::1]:80 tcp", &["[fd10::1]:8080 masqueraded", "[fd11::1]:8080"]),
            (
                "2001:db8::1",
                "[fd01::1]:30080 tcp",
                &["[fd10::1]:8080 masqueraded", "[fd11::1]:8080 masqueraded"],
            ),
        ],
    );
}

#[test]
fn a_family_that_the_kernel_cannot_have_is_left_out() {
    let mut node = Node::new(PacketMode::All);
    node.state.leave_out_packets(Family::V6);
    node.set(&load_balancer(&json!({})), &[slice()]);
    assert_eq!(node.kernel.keys().map(|id| id.family).collect::<Vec<_>>(), [Family::V4]);
    check(&node, &[(POD, CLUSTER_IP, &["10.1.0.1:8080", "10.1.1.1:8080"])]);
    check(&node, &[("fd10::9", "[fd96::1]:80 tcp", &["passes"])]);
}

/// What would be kept without being served grows with every Service that comes and goes.
#[test]
fn without_packets_nothing_is_kept() {
    let mut node = Node::new(PacketMode::Off);
    node.set(&load_balancer(&json!({})), &[slice()]);
    assert!(node.state.packets().families.is_empty());
}

#[test]
fn masqueraded_datagrams_have_no_node_port() {
    for (node_ports, expected) in [
        (30000..=32767, Some(32768..=65535)),
        (50000..=60000, Some(1024..=49999)),
        (1..=65000, Some(65001..=65535)),
        (1024..=65535, None),
        (1..=1, Some(1024..=65535)),
    ] {
        assert_eq!(skeleton::ports_without(&node_ports), expected, "{node_ports:?}");
    }
}
