use std::net::Ipv4Addr;

use super::*;
use crate::{
    desired::fixture::{ip, nodes, settings, topology},
    model::fixture::node,
};

fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| ip(text)).collect()
}

/// Checks this node's and the other nodes' addresses that accept node ports.
fn check(setting: NodePortAddresses, interfaces: &[&str], own: &[&str], others: &[&str]) {
    let settings = Settings { node_port_addresses: setting, ..settings() };
    let interfaces: Vec<_> = interfaces.iter().map(|text| ip(text)).collect();
    let topology = Topology::new(&nodes(), &settings, &interfaces);
    let setting = &settings.node_port_addresses;
    assert_eq!(*topology.own_addresses(), ips(own), "{setting:?} {interfaces:?}");
    let found: BTreeSet<_> = topology.other_addresses().map(|(ip, _)| ip).collect();
    assert_eq!(found, ips(others), "{setting:?} {interfaces:?}");
}

const OTHERS: [&str; 4] = ["192.168.0.2", "192.168.0.3", "fd01::2", "fd01::3"];

/// R2: node ports answer on all addresses of the node, except loopback and addresses without a meaning of
/// their own.
#[test]
fn r2_all_addresses() {
    check(NodePortAddresses::All, &[], &["192.168.0.1", "fd01::1"], &OTHERS);
    check(
        NodePortAddresses::All,
        &["127.0.0.1", "::1", "192.168.0.1", "172.17.0.1", "fe80::1", "169.254.1.1", "2001:db8::1"],
        &["192.168.0.1", "172.17.0.1", "169.254.1.1", "fd01::1", "2001:db8::1"],
        &OTHERS,
    );
}

/// R2: `primary` is the first address of each family on the Node object.
#[test]
fn r2_primary_addresses() {
    let interfaces = ["192.168.0.1", "172.17.0.1"];
    check(NodePortAddresses::Primary, &interfaces, &["192.168.0.1", "fd01::1"], &OTHERS);

    let settings = Settings { node_port_addresses: NodePortAddresses::Primary, ..settings() };
    let several = node("node-a", "a", &["192.168.0.9", "fd01::9", "192.168.0.8"]);
    let topology = Topology::new([&several], &settings, &[]);
    assert_eq!(*topology.own_addresses(), ips(&["192.168.0.9", "fd01::9"]));
    // Without a Node no address is primary.
    assert!(Topology::new([], &settings, &[ip("172.17.0.1")]).own_addresses().is_empty());
}

/// R2: addresses inside the networks; a family without a network falls back to all.
#[test]
fn r2_addresses_within_networks() {
    let within =
        |texts: &[&str]| NodePortAddresses::Within(texts.iter().map(|text| text.parse().unwrap()).collect());
    let interfaces = ["192.168.0.1", "172.17.0.1", "2001:db8::1"];
    check(
        within(&["172.16.0.0/12"]),
        &interfaces,
        &["172.17.0.1", "fd01::1", "2001:db8::1"],
        &["fd01::2", "fd01::3"],
    );
    check(
        within(&["192.168.0.0/24", "2001:db8::/32"]),
        &interfaces,
        &["192.168.0.1", "2001:db8::1"],
        &["192.168.0.2", "192.168.0.3"],
    );
    check(within(&["203.0.113.0/24", "fd99::/64"]), &interfaces, &[], &[]);
    check(within(&[]), &interfaces, &["192.168.0.1", "172.17.0.1", "fd01::1", "2001:db8::1"], &OTHERS);
    check(
        within(&["192.168.0.0/31", "192.168.0.3/32"]),
        &[],
        &["192.168.0.1", "fd01::1"],
        &["192.168.0.3", "fd01::2", "fd01::3"],
    );
}

/// R2: a list with words accepts only what it names, without a fallback.
#[test]
fn r2_addresses_of_a_list_with_words() {
    let listed = |primary, texts: &[&str]| {
        let networks = texts.iter().map(|text| text.parse().unwrap()).collect();
        NodePortAddresses::Listed { primary, networks }
    };
    let interfaces = ["192.168.0.1", "172.17.0.1", "2001:db8::1"];
    check(listed(false, &[]), &interfaces, &[], &[]);
    check(
        listed(true, &["172.16.0.0/12"]),
        &interfaces,
        &["192.168.0.1", "172.17.0.1", "fd01::1"],
        &["192.168.0.2", "fd01::2", "192.168.0.3", "fd01::3"],
    );
    check(listed(false, &["172.16.0.0/12"]), &interfaces, &["172.17.0.1"], &[]);
}

/// R2: the interfaces of this node, independent of `--nodeport-addresses`.
#[test]
fn r2_addresses_of_interfaces() {
    let settings = Settings { node_port_addresses: NodePortAddresses::Primary, ..settings() };
    let interfaces = ["10.96.0.10", "127.0.0.1", "::1", "fe80::1"].map(ip);
    let topology = Topology::new(&nodes(), &settings, &interfaces);
    let is_on_interface = |text: &str| topology.is_on_interface(ip(text));
    assert!(is_on_interface("10.96.0.10"));
    // Only the Node has it, or it is a loopback, link-local or unknown address.
    for other in ["192.168.0.1", "127.0.0.1", "::1", "fe80::1", "10.96.0.11"] {
        assert!(!is_on_interface(other), "{other}");
    }
}

/// R6: every node address is known, as this node's or another's.
#[test]
fn r6_addresses_of_all_nodes() {
    let topology = topology();
    let expected: BTreeMap<_, _> = [
        ("192.168.0.1", true),
        ("192.168.0.2", false),
        ("192.168.0.3", false),
        ("fd01::1", true),
        ("fd01::2", false),
        ("fd01::3", false),
    ]
    .into_iter()
    .map(|(text, own)| (ip(text), own))
    .collect();
    assert_eq!(topology.node_addresses(), expected);
    assert_eq!(topology.addresses_of("node-b"), [ip("192.168.0.2"), ip("fd01::2")]);
    assert!(topology.addresses_of("node-a").is_empty() && topology.addresses_of("node-x").is_empty());
    assert_eq!(topology.other_nodes().collect::<Vec<_>>(), ["node-b", "node-c"]);
    assert_eq!((topology.node_name(), topology.zone()), ("node-a", Some("a")));
}

#[test]
fn an_address_that_several_nodes_list_has_one_owner() {
    let nodes = [
        node("node-c", "", &["192.168.0.7", "192.168.0.3"]),
        node("node-b", "", &["192.168.0.7", "192.168.0.1"]),
        node("node-a", "", &["192.168.0.1"]),
    ];
    let topology = Topology::new(&nodes, &settings(), &[ip("192.168.0.3")]);
    assert_eq!(*topology.own_addresses(), ips(&["192.168.0.1", "192.168.0.3"]));
    assert_eq!(topology.other_addresses().collect::<Vec<_>>(), [(ip("192.168.0.7"), "node-b")]);
    assert!(topology.addresses_of("node-c").is_empty());
}

#[test]
fn the_order_of_nodes_and_interfaces_does_not_matter() {
    let interfaces = [ip("172.17.0.1"), ip("192.168.0.1"), ip("10.9.9.9")];
    let (mut reversed, mut interfaces_reversed) = (nodes(), interfaces);
    reversed.reverse();
    interfaces_reversed.reverse();
    assert_eq!(
        Topology::new(&nodes(), &settings(), &interfaces),
        Topology::new(&reversed, &settings(), &interfaces_reversed)
    );
}

#[test]
fn a_node_that_is_about_to_go_changes_no_topology() {
    let mut nodes = nodes();
    let before = Topology::new(&nodes, &settings(), &[]);
    nodes[1].being_deleted = true;
    assert_eq!(Topology::new(&nodes, &settings(), &[]), before);
    nodes[1].zone = Some("z".into());
    assert_eq!(Topology::new(&nodes, &settings(), &[]), before);
    nodes[0].zone = Some("z".into());
    assert_ne!(Topology::new(&nodes, &settings(), &[]), before);
}

#[test]
fn room_is_shared_in_turns() {
    for (wanted, room, expected) in [
        (&[][..], 5, &[][..]),
        (&[3, 1, 2], 6, &[3, 1, 2]),
        (&[3, 1, 2], 100, &[3, 1, 2]),
        (&[3, 1, 2], 5, &[2, 1, 2]),
        (&[9, 1, 9], 10, &[5, 1, 4]),
        (&[9, 9, 9], 2, &[1, 1, 0]),
        (&[9, 0, 9], 0, &[0, 0, 0]),
        (&[40_000, 2, 2], 32_768, &[32_764, 2, 2]),
    ] {
        assert_eq!(shares(wanted, room), expected, "{wanted:?} {room}");
    }
}

/// Whatever other Nodes list, each node keeps its first addresses, and this node all of its own.
#[test]
fn r6_more_addresses_than_there_is_room_for() {
    let (n_nodes, n_each) = (600u32, 64u32);
    let mut nodes = nodes();
    let base = nodes[1].clone();
    nodes.extend((0..n_nodes).map(|n| Node {
        name: format!("node-x{n}").into(),
        addresses: (0..n_each).map(|k| Ipv4Addr::from(0x0a00_0000 + n * n_each + k).into()).collect(),
        ..base.clone()
    }));
    let topology = Topology::new(&nodes, &settings(), &[]);
    assert_eq!(topology.node_addresses().len(), MAX_NODE_ADDRS as usize);
    assert_eq!(*topology.own_addresses(), ips(&["192.168.0.1", "fd01::1"]));
    assert!(OTHERS.iter().all(|other| topology.is_node_address(ip(other))));
    let n_left_out: usize = topology.left_out().map(|(_, n)| n).sum();
    assert_eq!(n_left_out, (n_nodes * n_each) as usize + 2 + OTHERS.len() - MAX_NODE_ADDRS as usize);
    for (node, n) in topology.left_out() {
        let there = topology.addresses_of(node);
        assert_eq!((there.len() + n, there.len().abs_diff(55) <= 1), (n_each as usize, true), "{node}");
        assert!(there.iter().all(|ip| topology.node_of(*ip) == Some(node)), "{node}");
    }
}
