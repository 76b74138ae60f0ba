use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::{
    desired::{
        fixture::{endpoint, settings, topology},
        service::frontends,
    },
    model::fixture,
};

/// The Service `default/web` at 10.0.0.1 with port 53 of each protocol, and its slice. Endpoints listen on
/// port 1053.
#[derive(Default)]
struct Fixture {
    ledger: StaleTracker,
    desired: Desired,
    store: Store,
}

fn key() -> ServiceKey {
    ServiceKey::new("default", "web")
}

fn service(annotation: Option<&str>, patch: &Value) -> Service {
    let ports = json!([
        {"name": "udp", "protocol": "UDP", "port": 53, "nodePort": 30053},
        {"name": "tcp", "protocol": "TCP", "port": 53, "nodePort": 30053},
    ]);
    let base = json!({
        "metadata": {"annotations": {"socklb.io/stale-connections": annotation}},
        "spec": {"type": "NodePort", "ports": ports},
    });
    fixture::service(&fixture::patched(base, patch))
}

impl Fixture {
    /// `endpoints` have the form of [`endpoint`].
    fn new(annotation: Option<&str>, endpoints: &[&str]) -> Self {
        let mut town = Self::default();
        town.set(annotation, endpoints);
        town
    }

    fn set(&mut self, annotation: Option<&str>, endpoints: &[&str]) {
        self.set_objects(Some(service(annotation, &json!({}))), endpoints);
    }

    fn set_objects(&mut self, service: Option<Service>, endpoints: &[&str]) {
        let endpoints: Vec<_> = endpoints.iter().map(|line| endpoint(line)).collect();
        let port = |name: &str, protocol: &str| json!({"name": name, "protocol": protocol, "port": 1053});
        let ports = [port("udp", "UDP"), port("tcp", "TCP")];
        let slice = fixture::slice(&json!({"ports": ports, "endpoints": endpoints}));
        let _changes = self.store.set_service(&key(), service);
        let _changes = self.store.set_slice(&slice.key(), Some(slice));
        let of_service = self.store.service(&key()).map_or_else(Vec::new, |service| {
            frontends(service, self.store.slices_of(&key()), &topology(), &settings()).0
        });
        let touched = self.desired.set(&key(), of_service);
        let desired = &self.desired;
        let touched = touched.into_iter().map(|address| (address, desired.owner(&address).is_some()));
        self.ledger.follow(&key(), self.store.service(&key()), touched);
    }

    fn with<T>(&mut self, ask: impl FnOnce(&mut StaleTracker, CurrentState<'_>) -> T) -> T {
        let is_node_address = |ip| ip == IpAddr::from([192, 168, 0, 1]);
        let in_force = CurrentState {
            desired: &self.desired,
            store: &self.store,
            is_behind: &|_| false,
            is_node_address: &is_node_address,
        };
        ask(&mut self.ledger, in_force)
    }

    /// Decides about one flow that a search found.
    fn decide(&mut self, used: Flow, now: Instant) -> Fate {
        let search = search_of(&used);
        self.with(|ledger, in_force| ledger.decide(&search, &[used].into(), now, in_force))[&used].clone()
    }

    fn search(&mut self, used: &[Flow], now: Instant) -> Option<Search> {
        self.ledger.begin();
        let used = used.iter().map(|used| (*used, [1].into())).collect();
        self.with(|ledger, in_force| ledger.search(&used, now, in_force))
    }
}

/// The search that finds a flow.
fn search_of(used: &Flow) -> Search {
    Search {
        protocols: [used.protocol].into(),
        endpoints: [used.endpoint].into(),
        addresses: Some([used.endpoint].into()),
    }
}

fn used(protocol: Protocol, service: &str, endpoint: &str) -> Flow {
    Flow { protocol, service: Some(service.parse().unwrap()), endpoint: endpoint.parse().unwrap() }
}

/// A flow to `10.1.0.1`, an endpoint of 10.0.0.1:53.
fn first(protocol: Protocol) -> Flow {
    used(protocol, "10.0.0.1:53", "10.1.0.1:1053")
}

fn ends(due: Instant) -> Fate {
    Fate::Ends { service: Some(key()), due }
}

#[test]
fn r10_sockets_stay_with_endpoints_that_serve() {
    use Fate::{Kept, Serves};
    use Protocol::{Tcp, Udp};
    let now = Instant::now();
    let gone = &["10.1.0.2 - rs"][..];
    for (what, protocol, annotation, endpoints, expected) in [
        ("it is ready", Udp, None, &["10.1.0.1 - rs"][..], Serves),
        ("it terminates and serves", Udp, None, &["10.1.0.1 - st", "10.1.0.2 - rs"], Serves),
        ("it serves and is not ready", Udp, None, &["10.1.0.1 - s", "10.1.0.2 - rs"], Serves),
        ("it is on another node", Udp, None, &["10.1.0.1 node-b rs", "10.1.0.2 node-a rs"], Serves),
        ("it is hinted elsewhere", Udp, None, &["10.1.0.1 - rs zone=b", "10.1.0.2 - rs zone=a"], Serves),
        ("publishNotReadyAddresses", Udp, None, &["10.1.0.1 - r", "10.1.0.2 - rs"], Serves),
        ("it does not serve, another does", Udp, None, &["10.1.0.1 - -", "10.1.0.2 - rs"], ends(now)),
        ("it terminates, another serves", Udp, None, &["10.1.0.1 - t", "10.1.0.2 - rs"], ends(now)),
        ("it does not serve, nor does another", Udp, None, &["10.1.0.1 - -", "10.1.0.2 - -"], Serves),
        ("it is gone", Udp, None, gone, ends(now)),
        ("it is gone and none serves", Udp, None, &["10.1.0.2 - -"], ends(now)),
        ("all are gone", Udp, None, &[], ends(now)),
        ("TCP stays", Tcp, None, gone, Kept),
        ("TCP stays without endpoints", Tcp, None, &[], Kept),
        ("keep", Udp, Some("keep"), gone, Kept),
        ("keep", Tcp, Some("keep"), gone, Kept),
        ("reset", Udp, Some("reset"), gone, ends(now)),
        ("reset", Tcp, Some("reset"), gone, ends(now)),
        ("reset while it serves", Tcp, Some("reset"), &["10.1.0.1 - st", "10.1.0.2 - rs"], Serves),
        ("drain", Udp, Some("drain=30s"), gone, ends(now + Duration::from_secs(30))),
        ("drain", Tcp, Some("drain=30s"), gone, ends(now + Duration::from_secs(30))),
        ("drain at once", Tcp, Some("drain=0s"), gone, ends(now)),
    ] {
        let mut town = Fixture::new(annotation, endpoints);
        assert_eq!(town.decide(first(protocol), now), expected, "{what}: {protocol}");
    }
}

#[test]
fn r10_the_policy_local_ends_no_socket() {
    let now = Instant::now();
    let local = json!({"spec": {"internalTrafficPolicy": "Local"}});
    let mut town = Fixture::default();
    town.set_objects(Some(service(None, &local)), &["10.1.0.1 node-b rs"]);
    assert_eq!(town.decide(first(Protocol::Udp), now), Fate::Serves);
}

#[test]
fn r10_a_drain_lasts_from_when_the_endpoint_was_seen_to_be_gone() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let (drain, socket) = (Some("drain=30s"), first(Protocol::Tcp));
    let (there, gone) = (&["10.1.0.1 - rs"][..], &["10.1.0.2 - rs"][..]);
    let mut town = Fixture::new(drain, there);
    for (second, endpoints, expected, next) in [
        (0, there, Fate::Serves, None),
        (10, gone, ends(at(40)), Some(at(40))),
        (20, gone, ends(at(40)), Some(at(40))),
        (40, gone, ends(at(40)), None),
        // It serves again: the drain restarts.
        (50, there, Fate::Serves, None),
        (60, gone, ends(at(90)), Some(at(90))),
    ] {
        town.set(drain, endpoints);
        assert_eq!(town.decide(socket, at(second)), expected, "{second}");
        assert_eq!(town.with(|ledger, in_force| ledger.next_due(at(second), in_force)), next, "{second}");
    }
    // Another annotation applies at once, from the same start.
    town.set(Some("drain=5s"), gone);
    assert_eq!(town.decide(socket, at(61)), ends(at(65)));
    town.set(Some("keep"), gone);
    assert_eq!(town.decide(socket, at(61)), Fate::Kept);
}

#[test]
fn r10_a_service_that_is_deleted_has_said_what_becomes_of_its_sockets() {
    let now = Instant::now();
    for (annotation, tcp, udp) in [
        (None, Fate::Kept, ends(now)),
        (Some("keep"), Fate::Kept, Fate::Kept),
        (Some("reset"), ends(now), ends(now)),
    ] {
        let mut town = Fixture::new(annotation, &["10.1.0.1 - rs"]);
        town.set_objects(None, &["10.1.0.1 - rs"]);
        assert_eq!(town.decide(first(Protocol::Tcp), now), tcp, "{annotation:?}");
        assert_eq!(town.decide(first(Protocol::Udp), now), udp, "{annotation:?}");
        // It is remembered while a socket uses it, through any number of searches.
        for _ in 0..3 {
            let _somewhere = town.search(&[first(Protocol::Udp)], now);
            assert_eq!(town.decide(first(Protocol::Udp), now), udp, "{annotation:?}");
        }
        let _nowhere = town.search(&[], now);
        assert!(town.ledger.gone.is_empty());
    }
    // The service of a frontend that an earlier agent served is unknown.
    let mut town = Fixture::default();
    assert_eq!(town.decide(first(Protocol::Udp), now), Fate::Ends { service: None, due: now });
    assert_eq!(town.decide(first(Protocol::Tcp), now), Fate::Kept);
}

#[test]
fn r10_node_ports_are_frontends_on_every_node_address() {
    let now = Instant::now();
    let mut town = Fixture::new(None, &["10.1.0.2 - rs"]);
    for node in ["192.168.0.1:30053", "192.168.0.2:30053", "127.0.0.1:30053"] {
        assert_eq!(town.decide(used(Protocol::Udp, node, "10.1.0.1:1053"), now), ends(now), "{node}");
        assert_eq!(town.decide(used(Protocol::Udp, node, "10.1.0.2:1053"), now), Fate::Serves, "{node}");
    }
}

#[test]
fn nothing_is_stale_before_the_tables_follow() {
    let (now, socket) = (Instant::now(), first(Protocol::Udp));
    let town = Fixture::new(None, &["10.1.0.2 - rs"]);
    let in_force = CurrentState {
        desired: &town.desired,
        store: &town.store,
        is_behind: &|_| true,
        is_node_address: &|_| true,
    };
    let plain = Flow { service: None, endpoint: "10.0.0.1:53".parse().unwrap(), ..socket };
    let mut ledger = town.ledger.clone();
    for used in [socket, plain] {
        let standings = ledger.decide(&search_of(&used), &[used].into(), now, in_force);
        assert_eq!(standings[&used], Fate::Serves, "{used:?}");
    }
}

#[test]
fn sockets_are_looked_for_where_they_may_be_stale() {
    use Protocol::{Tcp, Udp};
    let now = Instant::now();
    let (stale, fine) = (first(Udp), used(Udp, "10.0.0.1:53", "10.1.0.2:1053"));
    let tcp = first(Tcp);
    let there = &["10.1.0.2 - rs"][..];
    let at_stale = |protocols: &[Protocol]| {
        let (protocols, endpoints) = (protocols.iter().copied().collect(), [stale.endpoint].into());
        Some(Search { protocols, endpoints, addresses: Some(BTreeSet::new()) })
    };
    for (what, annotation, known, expected) in [
        ("no flow", None, &[][..], None),
        ("nothing is stale", None, &[fine], None),
        ("a stale one", None, &[fine, stale], at_stale(&[Udp])),
        ("a stale one that is kept", Some("keep"), &[stale], None),
        ("TCP is kept", None, &[tcp], None),
        ("both protocols", Some("reset"), &[stale, tcp], at_stale(&[Tcp, Udp])),
        ("a drain begins", Some("drain=30s"), &[stale], at_stale(&[Udp])),
    ] {
        let mut town = Fixture::new(annotation, there);
        assert_eq!(town.search(known, now), expected, "{what}");
    }
    // A draining socket is searched for when its time is over, not before.
    let mut town = Fixture::new(Some("drain=30s"), there);
    let _due = town.decide(stale, now);
    assert_eq!(town.search(&[stale], now), None);
    let at_the_end = town.search(&[stale], now + Duration::from_secs(30)).unwrap();
    assert_eq!(at_the_end.endpoints, [stale.endpoint].into());
    // A drain that no connected socket starts.
    let mut town = Fixture::new(Some("drain=30s"), there);
    for expected in [true, true, false] {
        let search = town.search(&[stale], now);
        assert_eq!(search.is_some(), expected);
        search.inspect(|search| town.ledger.searched(search, now));
    }
}

/// A socket that was disconnected or destroyed keeps its record until it is closed.
#[test]
fn what_two_searches_do_not_find_is_let_be_for_a_minute() {
    let start = Instant::now();
    let (gone, there) = (&["10.1.0.2 - rs"][..], &["10.1.0.1 - rs"][..]);
    let socket = first(Protocol::Udp);
    let mut town = Fixture::new(None, gone);
    for (what, second, endpoints, cookies, is_sought) in [
        ("the first", 0, gone, &[1][..], true),
        ("the second", 1, gone, &[1], true),
        ("in vain", 2, gone, &[1], false),
        ("another socket of the flow", 2, gone, &[1, 2], true),
        ("again", 3, gone, &[1, 2], true),
        ("in vain", 4, gone, &[1, 2], false),
        ("a minute later", 64, gone, &[1, 2], true),
        ("in vain", 65, gone, &[1, 2], false),
        ("the endpoint is back", 66, there, &[1, 2], false),
        ("and gone again", 67, gone, &[1, 2], true),
    ] {
        town.set(None, endpoints);
        town.ledger.begin();
        let used: Flows = [(socket, cookies.iter().copied().collect())].into();
        // That sockets without a service are looked for too is another matter.
        town.ledger.first = Some(start + Duration::from_secs(second));
        let now = start + Duration::from_secs(second);
        let search = town.with(|ledger, in_force| ledger.search(&used, now, in_force));
        assert_eq!(search.is_some(), is_sought, "{second}: {what}");
        if let Some(search) = search {
            town.ledger.searched(&search, now);
        }
    }
}

#[test]
fn r10_sockets_are_ended_that_were_connected_before_the_address_was_a_frontend() {
    let now = Instant::now();
    for (what, protocol, annotation, peer, expected) in [
        ("a cluster IP", Protocol::Udp, None, "10.0.0.1:53", ends(now)),
        ("a node port of this node", Protocol::Udp, None, "192.168.0.1:30053", ends(now)),
        ("its port elsewhere", Protocol::Udp, None, "192.168.0.2:30053", Fate::Serves),
        ("no frontend", Protocol::Udp, None, "10.0.0.1:54", Fate::Serves),
        ("keep", Protocol::Udp, Some("keep"), "10.0.0.1:53", Fate::Kept),
        ("nothing to drain", Protocol::Udp, Some("drain=30s"), "10.0.0.1:53", ends(now)),
        ("TCP", Protocol::Tcp, None, "10.0.0.1:53", Fate::Kept),
    ] {
        let mut town = Fixture::new(annotation, &["10.1.0.1 - rs"]);
        let plain = Flow { protocol, service: None, endpoint: peer.parse().unwrap() };
        assert_eq!(town.decide(plain, now), expected, "{what}");
        assert_eq!(town.with(|ledger, in_force| ledger.next_due(now, in_force)), None, "{what}");
    }
}

/// Which sockets without a service a search covers: none, all, or those of one address.
#[test]
fn new_frontends_are_looked_for_twice_and_all_of_them_once() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let address = |text: &str| {
        let address: SocketAddr = text.parse().unwrap();
        FrontendAddress { ip: address.ip(), port: address.port(), protocol: Protocol::Udp }
    };
    let (new, node_port) = (address("10.0.0.1:53"), address("0.0.0.0:30053"));
    let tcp = FrontendAddress { protocol: Protocol::Tcp, ..address("10.0.0.1:80") };
    let only = |address: FrontendAddress| Some(Some([SocketAddr::new(address.ip, address.port)].into()));
    let mut town = Fixture::new(None, &["10.1.0.1 - rs"]);
    for (what, second, appears, is_done, expected) in [
        ("excluded cgroups are being found", 0, Some(new), true, None),
        ("what was there before", 5, None, false, Some(None)),
        ("it failed, or there was more", 6, None, true, Some(None)),
        ("what appeared at the beginning", 7, None, true, only(new)),
        ("again", 8, None, true, only(new)),
        ("nothing is new", 9, None, true, None),
        ("TCP", 10, Some(tcp), true, None),
        ("a node port", 11, Some(node_port), false, only(node_port)),
        ("it failed", 12, None, true, only(node_port)),
        ("again", 13, None, true, only(node_port)),
        ("nothing is new", 14, None, true, None),
    ] {
        if let Some(address) = appears {
            town.ledger.appeared(&address);
        }
        let search = town.search(&[], at(second));
        let addresses: Option<Option<BTreeSet<SocketAddr>>> = search.clone().map(|search| search.addresses);
        assert_eq!(addresses, expected, "{second}: {what}");
        if let Some(search) = search.filter(|_| is_done) {
            town.ledger.searched(&search, at(second));
        }
    }
}
