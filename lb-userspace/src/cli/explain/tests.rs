use std::collections::BTreeMap;

use expect_test::expect;
use lb_common::{
    health::Policy,
    layout::{EndpointHealth, frontend_flags},
};
use lb_core::{
    desired::{FrontendKind, PacketMode, PacketSide, PortKey},
    model::{Cidr, Protocol},
    packets::{Rules, Site, sim::Packet},
    sim::Config,
    tables::{Image, run::StoredRun},
};

use super::*;

const SECOND: u64 = 1_000_000_000;

/// A cluster IP and a node port, with two endpoints and, if these are ejected, a third.
fn simulator() -> Simulator {
    let mut image = Image::default();
    let entry = |n: u8| Entry::new(n.into(), ([10, 244, 0, n], 8080).into());
    let run = StoredRun::extended(&[(entry(1), 255), (entry(2), 255)], &[entry(3)]);
    let frontend = Frontend { run: run.at(0), health: Policy::DEFAULT.to_word(), ..Frontend::default() };
    image.runs4.insert(0, run);
    for (id, address, flags) in [(0, "10.96.0.80:80", 0), (1, "0.0.0.0:30080", frontend_flags::NODE_PORT)] {
        image.services.insert(address.parse().unwrap(), id);
        image.frontends.insert(id, Frontend { flags, ..frontend });
    }
    image.node_addrs.insert([192, 0, 2, 1].into(), true);
    let mut simulator = Simulator::new(image);
    simulator.config = Config { node_ports: (30000, 32767), ..simulator.config };
    simulator.now = 100 * SECOND;
    simulator
}

fn ejected(until: u64) -> EndpointHealth {
    let (ejected_until, failing_since) = (until * SECOND, 90 * SECOND);
    EndpointHealth { ejected_until, failing_since, failures: 3, ejections: 1, ..EndpointHealth::default() }
}

#[test]
fn why_an_endpoint_is_not_chosen() {
    let on_trial = EndpointHealth { tried_at: 99 * SECOND, ..ejected(98) };
    let refused = EndpointHealth { errno: 111, ..ejected(104) };
    let mut text = String::new();
    for (to, health) in [
        ("10.96.0.80:80", vec![]),
        ("10.96.0.80:80", vec![(1, refused)]),
        ("10.96.0.80:80", vec![(2, on_trial)]),
        ("10.96.0.80:80", vec![(1, refused), (2, ejected(98))]),
        ("10.96.0.80:80", vec![(1, refused), (2, on_trial)]),
        ("10.96.0.80:80", vec![(1, refused), (2, on_trial), (3, refused)]),
        ("192.0.2.1:30080", vec![(1, refused)]),
    ] {
        let (mut simulator, to) = (simulator(), to.parse().unwrap());
        let known = reachable(&simulator, to, Caller::default());
        assert!(known.iter().map(|entry| entry.endpoint_id).eq(1..4), "{to}: {known:?}");
        simulator.health = BTreeMap::from_iter(health).into();
        text += &explain(&simulator, None, to, Caller::default()).text();
    }
    expect![[r"
        10.96.0.80:80/tcp -> redirected: one of 2, each with the same probability
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080
          candidate  10.244.0.2:8080
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
        10.96.0.80:80/tcp -> redirected: one of 2, of which 1 is ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
        10.96.0.80:80/tcp -> redirected: one of 2, of which 1 is ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080
          candidate  10.244.0.2:8080  ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
        10.96.0.80:80/tcp -> redirected: one of 2, of which 2 are ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080  ejected until the next call, which is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
        10.96.0.80:80/tcp -> redirected: one of 1, which topology hints leave out: all 2 candidates are ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080  ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
        10.96.0.80:80/tcp -> redirected: one of 2: all are ejected, so none is avoided
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080  ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
        192.0.2.1:30080/tcp -> redirected: one of 2, of which 1 is ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080
          spill      10.244.0.3:8080
        packets -> not socklb's (--packets=off): the rules of other programs decide
    "]].assert_eq(&text);
}

/// A cluster IP with two endpoints and affinity, and a load-balancer address with source ranges whose
/// endpoint is on another node.
fn table() -> lb_core::packets::nft::Table {
    let network = |text: &str| -> Cidr { text.parse().unwrap() };
    let frontend = |at: &str, kind, policy, endpoints: &[[u8; 4]]| desired::Frontend {
        address: at.parse().unwrap(),
        kind,
        policy,
        flags: 0,
        affinity_seconds: if kind == FrontendKind::ClusterIP { 10 } else { 0 },
        health: 0,
        created: None,
        port: PortKey {
            service: ServiceKey::new("default", "web"),
            port_name: "".into(),
            protocol: Protocol::Tcp,
            ipv6: false,
        }
        .into(),
        endpoints: endpoints.iter().map(|ip| SocketAddr::from((*ip, 8080))).collect(),
        balance: Balance::Random,
        shares: None,
        spill: [].into(),
        packets: None,
    };
    let both = [[10, 244, 0, 1], [10, 244, 1, 1]];
    let inside = frontend("10.96.0.80:80", FrontendKind::ClusterIP, TrafficPolicy::Cluster, &both);
    let local = frontend("203.0.113.1:80", FrontendKind::LoadBalancer, TrafficPolicy::Local, &both);
    let any = frontend("203.0.113.2:80", FrontendKind::LoadBalancer, TrafficPolicy::Cluster, &both[..1]);
    let idle = frontend("10.96.0.90:80", FrontendKind::ClusterIP, TrafficPolicy::Cluster, &[]);
    let of_local = PacketSide {
        outside: Some([].into()),
        sources: Some([network("192.0.2.0/24")].into()),
        ..PacketSide::default()
    };
    let mut rules = Rules::new(PacketMode::All, &(30000..=32767));
    rules.set_site(&Site {
        pods: [network("10.244.0.0/24")].into(),
        networks: [network("10.96.0.0/16")].into(),
        ..Site::default()
    });
    for (frontend, side) in [
        (&inside, &PacketSide::default()),
        (&local, &of_local),
        (&any, &PacketSide::default()),
        (&idle, &PacketSide::default()),
    ] {
        rules.set(frontend.address, Some((frontend, side)));
    }
    rules.set_cluster_ip([10, 96, 0, 80].into(), Some(true));
    rules.tables().into_values().next().unwrap()
}

#[test]
fn what_a_packet_gets_and_why() {
    let table = table();
    let packet = |source: [u8; 4], to: &str, is_own| Packet {
        source: source.into(),
        destination: to.parse().unwrap(),
        protocol: 6,
        is_own,
    };
    let (outside, elsewhere, pod) = ([192, 0, 2, 1], [198, 51, 100, 1], [10, 244, 0, 9]);
    let mut text = String::new();
    for sent in [
        packet(pod, "10.96.0.80:80", false),
        packet(outside, "10.96.0.80:80", false),
        packet([192, 168, 0, 1], "10.96.0.80:80", true),
        packet(pod, "10.96.0.80:81", false),
        packet(pod, "10.96.0.90:80", false),
        packet(pod, "10.96.9.9:80", false),
        packet(outside, "203.0.113.1:80", false),
        packet(elsewhere, "203.0.113.1:80", false),
        packet(outside, "203.0.113.2:80", false),
        packet(outside, "203.0.113.3:80", false),
    ] {
        let _infallible = write!(text, "{}: {}", sent.destination, PacketPart::new(&table, sent).text());
    }
    expect![[r"
        10.96.0.80:80: packet from 10.244.0.9 -> translated: one of 2; a client keeps its endpoint until it is idle for 10 s
          endpoint   10.244.0.1:8080  sees the client's address
          endpoint   10.244.1.1:8080  sees the client's address
        10.96.0.80:80: packet from 192.0.2.1 (outside) -> translated: one of 2; a client keeps its endpoint until it is idle for 10 s
          endpoint   10.244.0.1:8080  sees the node's address
          endpoint   10.244.1.1:8080  sees the node's address
        10.96.0.80:80: packet from 192.168.0.1 (this node) -> translated: one of 2; a client keeps its endpoint until it is idle for 10 s
          endpoint   10.244.0.1:8080  sees the node's address
          endpoint   10.244.1.1:8080  sees the node's address
        10.96.0.80:81: packet from 10.244.0.9 -> refused: 10.96.0.80 is the cluster IP of a service that does not define this port
        10.96.0.90:80: packet from 10.244.0.9 -> refused: the service has no usable endpoint
        10.96.9.9:80: packet from 10.244.0.9 -> dropped: no service has 10.96.9.9, an address of the networks of cluster IPs
        203.0.113.1:80: packet from 192.0.2.1 (outside) -> dropped: no endpoint is on this node, and the policy Local lets packets from outside reach no other
        203.0.113.1:80: packet from 198.51.100.1 -> dropped: loadBalancerSourceRanges do not have 198.51.100.1
        203.0.113.2:80: packet from 192.0.2.1 (outside) -> translated: the only endpoint
          endpoint   10.244.0.1:8080  sees the node's address
        203.0.113.3:80: packet from 192.0.2.1 (outside) -> untouched: no rule of socklb is about it
    "]].assert_eq(&text);

    let packet = Some(PacketPart::new(&table, packet(outside, "203.0.113.2:80", false)));
    let to = "203.0.113.2:80".parse().unwrap();
    let explanation = Explanation { packet, ..explain(&simulator(), None, to, Caller::default()) };
    expect!["203.0.113.2:80/tcp -> untouched: no frontend has this address, port and protocol: the call passes unchanged; packet from 192.0.2.1 (outside) -> translated: the only endpoint; endpoint 10.244.0.1:8080 (sees the node's address)"].assert_eq(&explanation.line());
    let json = serde_json::to_value(&explanation).unwrap();
    let expected = serde_json::json!({
        "from": "192.0.2.1",
        "from_this_node": false,
        "verdict": "translated",
        "endpoints": [{"endpoint": "10.244.0.1:8080", "sees": "node"}],
        "affinity_seconds": 0,
        "reason": "the only endpoint",
    });
    assert_eq!((&json["verdict"], &json["packet"]), (&"untouched".into(), &expected));
}
