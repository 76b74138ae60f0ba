use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::{
    desired::{FrontendKind, PortKey, fixture::ip},
    model::{Balance, Protocol, TrafficPolicy},
};

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn address(text: &str) -> FrontendAddress {
    FrontendAddress { ip: ip(text), port: 80, protocol: Protocol::Tcp }
}

/// A frontend of a service with a creation time.
fn frontend(service: &str, kind: FrontendKind, created: Option<i64>, text: &str) -> Frontend {
    let port = PortKey { service: key(service), port_name: "".into(), protocol: Protocol::Tcp, ipv6: false };
    Frontend {
        address: address(text),
        kind,
        policy: TrafficPolicy::Cluster,
        flags: 0,
        affinity_seconds: 0,
        health: 0,
        created,
        port: Arc::new(port),
        endpoints: Arc::from([]),
        balance: Balance::Random,
        shares: None,
        packets: None,
        spill: Arc::default(),
    }
}

fn owner<'a>(desired: &'a Desired, text: &str) -> &'a str {
    desired.owner(&address(text)).map_or("nobody", |frontend| &frontend.port.service.name)
}

/// R14: kind first, then the older service, then the name; whatever the order of events.
#[test]
fn r14_the_order_of_claims() {
    use FrontendKind::{ClusterIP, ExternalIP, LoadBalancer, NodePort};
    for (a, b, winner) in [
        ((ClusterIP, Some(2)), (LoadBalancer, Some(1)), "a"),
        ((ExternalIP, Some(1)), (LoadBalancer, Some(2)), "b"),
        ((ExternalIP, Some(2)), (NodePort, Some(1)), "a"),
        ((ExternalIP, Some(2)), (ExternalIP, Some(1)), "b"),
        ((ExternalIP, None), (ExternalIP, Some(1)), "b"),
        ((ExternalIP, Some(1)), (ExternalIP, Some(1)), "a"),
        ((ExternalIP, None), (ExternalIP, None), "a"),
    ] {
        let claims = [("a", a), ("b", b)]
            .map(|(name, (kind, created))| (key(name), vec![frontend(name, kind, created, "192.0.2.1")]));
        for order in [[0, 1], [1, 0]] {
            let mut desired = Desired::new();
            for index in order {
                let (key, frontends) = claims[index].clone();
                let _ = desired.set(&key, frontends);
            }
            assert_eq!(owner(&desired, "192.0.2.1"), winner, "{a:?} {b:?}");
        }
    }
}

/// R14: losers are reported and stay in the queue; the next one follows when the owner is removed.
#[test]
fn r14_losers_are_queued_and_elected() {
    let mut desired = Desired::new();
    let claim =
        |name: &str, created| vec![frontend(name, FrontendKind::ExternalIP, Some(created), "192.0.2.1")];
    let changed = BTreeSet::from([address("192.0.2.1")]);
    assert_eq!(desired.set(&key("b"), claim("b", 2)), changed);
    assert_eq!(desired.set(&key("c"), claim("c", 3)), BTreeSet::new());
    assert_eq!(desired.set(&key("a"), claim("a", 1)), changed);
    assert_eq!(owner(&desired, "192.0.2.1"), "a");
    let issues: Vec<_> = desired.issues().map(|issue| issue.to_string()).collect();
    assert_eq!(
        issues,
        [
            "Service default/b: 192.0.2.1:80/tcp belongs to service default/a; this service does not answer \
             there: give one of them another address or port",
            "Service default/c: 192.0.2.1:80/tcp belongs to service default/a; this service does not answer \
             there: give one of them another address or port",
        ]
    );
    assert_eq!(desired.frontends_of(&key("c")).map(|(_, is_owner)| is_owner).collect::<Vec<_>>(), [false]);
    assert_eq!(desired.frontends_of(&key("a")).map(|(_, is_owner)| is_owner).collect::<Vec<_>>(), [true]);

    assert_eq!(desired.set(&key("a"), vec![]), changed);
    assert_eq!(owner(&desired, "192.0.2.1"), "b");
    assert_eq!(desired.set(&key("c"), vec![]), BTreeSet::new());
    assert_eq!(desired.issues().count(), 0);
    assert_eq!(desired.set(&key("b"), vec![]), changed);
    assert_eq!(owner(&desired, "192.0.2.1"), "nobody");
    assert!(desired.is_empty() && desired.services().next().is_none());
}

/// R14: services may share an address with different ports or protocols.
#[test]
fn r14_other_ports_of_one_address_are_no_conflict() {
    let mut desired = Desired::new();
    let tcp = frontend("a", FrontendKind::ExternalIP, None, "192.0.2.1");
    let mut udp = frontend("b", FrontendKind::ExternalIP, None, "192.0.2.1");
    udp.address.protocol = Protocol::Udp;
    let mut other = frontend("c", FrontendKind::ExternalIP, None, "192.0.2.1");
    other.address.port = 81;
    for frontend in [tcp, udp, other] {
        let service = frontend.port.service.clone();
        assert_eq!(desired.set(&service, vec![frontend]).len(), 1);
    }
    assert_eq!((desired.len(), desired.issues().count()), (3, 0));
}

/// R14: a renamed port keeps its frontend: the address changes its content and is never without an owner.
#[test]
fn r14_a_renamed_port_keeps_its_address() {
    let mut desired = Desired::new();
    let before = frontend("a", FrontendKind::ClusterIP, None, "10.0.0.1");
    let mut after = before.clone();
    after.port = Arc::new(PortKey { port_name: "http".into(), ..(*before.port).clone() });
    let _ = desired.set(&key("a"), vec![before]);
    assert_eq!(desired.set(&key("a"), vec![after]), BTreeSet::from([address("10.0.0.1")]));
    assert_eq!(&*desired.owner(&address("10.0.0.1")).unwrap().port.port_name, "http");
}

#[test]
fn only_what_changed_is_named() {
    let mut desired = Desired::new();
    let one = frontend("a", FrontendKind::ClusterIP, None, "10.0.0.1");
    let two = frontend("a", FrontendKind::ExternalIP, None, "192.0.2.1");
    let three = frontend("a", FrontendKind::ExternalIP, None, "192.0.2.2");
    let both = BTreeSet::from([address("10.0.0.1"), address("192.0.2.1")]);
    assert_eq!(desired.set(&key("a"), vec![one.clone(), two.clone()]), both);
    assert_eq!(desired.set(&key("a"), vec![two.clone(), one.clone()]), BTreeSet::new());
    let changed = desired.set(&key("a"), vec![one.clone(), three]);
    assert_eq!(changed, BTreeSet::from([address("192.0.2.1"), address("192.0.2.2")]));
    let flagged = Frontend { flags: 4, ..one };
    let changed = desired.set(&key("a"), vec![flagged]);
    assert_eq!(changed, BTreeSet::from([address("10.0.0.1"), address("192.0.2.2")]));
    assert_eq!(desired.iter().count(), 1);
}

#[test]
fn a_list_that_names_an_address_twice_gives_its_better_claim() {
    let mut desired = Desired::new();
    let external = frontend("a", FrontendKind::ExternalIP, None, "192.0.2.1");
    let balancer = frontend("a", FrontendKind::LoadBalancer, None, "192.0.2.1");
    let _ = desired.set(&key("a"), vec![external, balancer]);
    assert_eq!(desired.owner(&address("192.0.2.1")).unwrap().kind, FrontendKind::LoadBalancer);
    assert_eq!(desired.issues().count(), 0);
}

/// An event: a service claims some of four addresses.
fn any_event() -> impl Strategy<Value = (&'static str, Vec<Frontend>)> {
    let kind =
        prop::sample::select(vec![FrontendKind::ClusterIP, FrontendKind::ExternalIP, FrontendKind::NodePort]);
    let name = prop::sample::select(vec!["a", "b", "c"]);
    (name, prop::collection::vec((kind, 1u8..4, 0u32..2), 0..4)).prop_map(|(name, claims)| {
        let created = Some(i64::from(name.as_bytes()[0] % 2));
        let frontends = claims.into_iter().map(|(kind, last, flags)| Frontend {
            flags,
            ..frontend(name, kind, created, &format!("10.0.0.{last}"))
        });
        (name, frontends.collect())
    })
}

proptest! {
    /// R14: owners depend on the current claims, and `set` returns exactly the addresses that changed.
    #[test]
    fn r14_owners_do_not_depend_on_history(events in prop::collection::vec(any_event(), 0..20)) {
        let mut desired = Desired::new();
        let mut now = BTreeMap::new();
        for (name, frontends) in events {
            let before = desired.clone();
            let changed = desired.set(&key(name), frontends.clone());
            now.insert(name, frontends);

            let mut fresh = Desired::new();
            for (name, frontends) in now.iter().rev() {
                let _ = fresh.set(&key(name), frontends.clone());
            }
            prop_assert_eq!(&fresh, &desired);
            for last in 1..4 {
                let address = address(&format!("10.0.0.{last}"));
                prop_assert_eq!(before.owner(&address) != desired.owner(&address), changed.contains(&address));
            }
        }
    }
}
