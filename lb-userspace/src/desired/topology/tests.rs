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

/// R2: node ports answer on all addresses of the node, except loopback and addresses without a meaning of their own.
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
    // Without a Node nothing is known to be primary.
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

/// R6: every node address is known, as ours or another's.
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
