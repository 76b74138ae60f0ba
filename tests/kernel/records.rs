//! The peer of a socket, as programs see it: the service address that was called, never the endpoint.

use std::net::SocketAddr;

use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_tests::{
    Sandbox,
    client::{Domain, Socket},
    cluster::{Cluster, PortOf},
};
use nix::errno::Errno;
use proptest::{
    collection::vec,
    prelude::*,
    sample,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::fixture::{
    FAMILIES, addresses, connected, in_each_mode, servers_of, service_address, service_port, services, start,
};

/// In one family: two services with one endpoint each, and a server that is not a service.
#[derive(Clone, Copy)]
pub(crate) struct Scene {
    pub(crate) service: SocketAddr,
    pub(crate) endpoint: SocketAddr,
    other_service: SocketAddr,
    other_endpoint: SocketAddr,
    pub(crate) plain: SocketAddr,
}

impl Scene {
    pub(crate) fn new(domain: Domain) -> Self {
        let [endpoint, other_endpoint, plain] = addresses(domain, 8001);
        let service = service_address(domain);
        Self { service, endpoint, other_service: service_port(domain, 53), other_endpoint, plain }
    }
}

/// The services of a scene in each family. The plain servers are endpoints of no Service.
pub(crate) fn scenes(protocol: Protocol) -> Cluster {
    let mut cluster = services(&[protocol], |domain| {
        let scene = Scene::new(domain);
        vec![(scene.service, vec![scene.endpoint]), (scene.other_service, vec![scene.other_endpoint])]
    });
    let plain = FAMILIES.map(|domain| Scene::new(domain).plain);
    cluster.set_endpoints(&PortOf { service: "plain", name: "", protocol }, &plain);
    cluster
}

/// A sandbox with servers and an agent that follows a cluster, once for each home of records.
fn with_agents(cluster: &Cluster, test: impl Fn() + Sync) {
    Sandbox::test(|sandbox| {
        let _servers = servers_of(cluster);
        in_each_mode(sandbox, |options| {
            let mut agent = start(options);
            agent.follow(cluster);
            test();
        });
    });
}

/// The same in each domain, with its scene.
fn with_scenes(cluster: &Cluster, test: impl Fn(Domain, Scene) + Sync) {
    with_agents(cluster, || Domain::ALL.into_iter().for_each(|domain| test(domain, Scene::new(domain))));
}

fn connect_and_ask(socket: &Socket, to: SocketAddr, server: SocketAddr) {
    socket.connect(to).unwrap();
    assert_eq!(socket.peer_name(), Ok(to));
    let answer = socket.ask().unwrap();
    assert_eq!(answer.server, server);
    if let Some(seen) = answer.seen {
        assert_eq!(seen, to);
    }
    assert_eq!(socket.peer_name(), Ok(to), "after the answer");
}

fn ask_at(socket: &Socket, to: SocketAddr, server: SocketAddr) {
    let answer = socket.ask_at(to).unwrap();
    assert_eq!((answer.server, answer.seen), (server, Some(to)));
}

/// A resolver queries two name servers at once and accepts answers in any order.
#[test]
fn answers_of_two_services_are_told_apart() {
    with_scenes(&scenes(Udp), |domain, scene| {
        let socket = Socket::new(domain, Udp);
        let mut called = [scene.service, scene.other_service, scene.plain];
        for to in called {
            socket.send_to(b"?", to).unwrap();
        }
        let mut senders = called.map(|_| socket.receive().unwrap().1.unwrap());
        senders.sort_unstable();
        called.sort_unstable();
        assert_eq!(senders, called);
    });
}

/// [`orders_of_calls_show_whom_was_called`] has the same for UDP.
#[test]
fn a_disconnected_tcp_socket_has_no_peer_and_can_call_again() {
    with_scenes(&scenes(Tcp), |domain, scene| {
        let socket = Socket::new(domain, Tcp);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        socket.disconnect().unwrap();
        assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
        connect_and_ask(&socket, scene.plain, scene.plain);
    });
}

/// More services than a socket has records for: each answer still appears to come from the right service.
#[test]
fn a_socket_may_use_many_services() {
    let pairs = |domain| {
        addresses::<20>(domain, 8001).map(|endpoint| (service_port(domain, endpoint.port() - 8000), endpoint))
    };
    let cluster = services(&[Udp], |domain| {
        pairs(domain).into_iter().map(|(service, endpoint)| (service, vec![endpoint])).collect()
    });
    with_scenes(&cluster, |domain, _| {
        let socket = Socket::new(domain, Udp);
        for (service, endpoint) in [pairs(domain), pairs(domain)].concat() {
            ask_at(&socket, service, endpoint);
        }
    });
}

/// A peer that sends to the socket first is seen by its own address, whatever the socket called before.
#[test]
fn a_stranger_is_seen_as_it_is() {
    with_scenes(&scenes(Udp), |domain, scene| {
        let socket = Socket::new(domain, Udp);
        ask_at(&socket, scene.service, scene.endpoint);
        let stranger = Socket::new(domain, Udp);
        stranger.bind(SocketAddr::new(domain.loopback(), 9000)).unwrap();
        let mine = SocketAddr::new(domain.loopback(), socket.local_address().unwrap().port());
        stranger.send_to(b"hello", mine).unwrap();
        let (bytes, sender) = socket.receive().unwrap();
        assert_eq!((&*bytes, sender.map(|sender| sender.port())), (&b"hello"[..], Some(9000)));
    });
}

/// A connected socket may send single datagrams to other addresses; it still receives from and names its peer
/// only.
#[test]
fn a_connected_socket_keeps_its_peer_when_it_sends_elsewhere() {
    with_scenes(&scenes(Udp), |domain, scene| {
        let socket = connected(domain, Udp, scene.service);
        for elsewhere in [scene.endpoint, scene.other_service, scene.plain, scene.service] {
            for _ in 0..5 {
                socket.send_to(b"!", elsewhere).unwrap();
            }
            assert_eq!(socket.peer_name(), Ok(scene.service), "after {elsewhere}");
        }
        // Ten answers are from the peer: those to the datagrams to either of its addresses.
        for _ in 0..10 {
            assert_eq!(socket.receive().unwrap().1, Some(scene.service));
        }
    });
}

/// Calling the peer of an unconnected socket by its own address, or another service with the same endpoint,
/// does not change the endpoint that the socket uses for a service.
#[test]
fn a_socket_keeps_its_endpoint_whatever_else_it_asks() {
    let cluster = services(&[Udp], |domain| {
        let (scene, endpoints) = (Scene::new(domain), addresses::<16>(domain, 8001).to_vec());
        vec![(scene.service, endpoints.clone()), (scene.other_service, endpoints)]
    });
    with_scenes(&cluster, |domain, Scene { service, other_service, .. }| {
        let socket = Socket::new(domain, Udp);
        let first = socket.ask_at(service).unwrap();
        assert_eq!(first.seen, Some(service));
        let other = socket.ask_at(other_service).unwrap();
        for _ in 0..20 {
            // An answer from the endpoint is attributed to the address called last.
            ask_at(&socket, first.server, first.server);
            ask_at(&socket, service, first.server);
            ask_at(&socket, other_service, other.server);
            ask_at(&socket, other.server, other.server);
            ask_at(&socket, service, first.server);
        }
    });
}

fn unreachable(domain: Domain, n: u16) -> SocketAddr {
    let ip = if domain == Domain::V6 { "2001:db8::1" } else { "192.0.2.1" };
    SocketAddr::new(ip.parse().unwrap(), 1000 + n)
}

/// The number of services whose only endpoint is unreachable: more than a socket has records.
const N_FAR: u16 = 40;

/// One of them.
fn far(domain: Domain, n: u16) -> SocketAddr {
    service_port(domain, 1000 + n)
}

fn all_far(domain: Domain) -> impl Iterator<Item = (SocketAddr, Vec<SocketAddr>)> {
    (0..N_FAR).map(move |n| (far(domain, n), vec![unreachable(domain, n)]))
}

/// The service with one unreachable endpoint of two.
fn half(domain: Domain) -> SocketAddr {
    service_port(domain, 2)
}

/// In each family: a service with sixteen endpoints, another with one endpoint, those with an unreachable
/// endpoint, and one with a reachable and an unreachable endpoint.
fn many_and_far() -> Cluster {
    services(&[Udp], |domain| {
        let (scene, [lone]) = (Scene::new(domain), addresses(domain, 9001));
        let reachable = [
            (scene.service, addresses::<16>(domain, 8001).to_vec()),
            (scene.other_service, vec![lone]),
            (half(domain), vec![lone, unreachable(domain, 0)]),
        ];
        reachable.into_iter().chain(all_far(domain)).collect()
    })
}

/// `send()` names no destination. If the kernel runs the hook with the peer's address, and that is also a
/// service's, the flow of the `connect()` still applies.
#[test]
fn a_connected_socket_is_decided_once() {
    let cluster = services(&[Udp], |domain| {
        let Scene { service, endpoint, other_endpoint, plain, .. } = Scene::new(domain);
        // The endpoint's own address is also another service's external IP or node port.
        vec![(service, vec![endpoint]), (endpoint, vec![other_endpoint, plain])]
    });
    with_scenes(&cluster, |domain, Scene { service, endpoint, .. }| {
        let socket = connected(domain, Udp, service);
        for _ in 0..40 {
            let answer = socket.ask().unwrap();
            assert_eq!((answer.server, answer.seen), (endpoint, Some(service)), "{domain:?}");
        }
        assert_eq!(socket.peer_name(), Ok(service));
    });
}

/// A socket that waits for answers keeps the records of its calls when a `connect()` fails meanwhile.
#[test]
fn a_failed_connect_loses_nothing_of_an_unconnected_socket() {
    with_scenes(&many_and_far(), |domain, Scene { service, other_service, .. }| {
        let socket = Socket::new(domain, Udp);
        let first = socket.ask_at(service).unwrap().server;
        for called in [service, other_service] {
            for _ in 0..10 {
                socket.send_to(b"?", called).unwrap();
                // While IPv6 resolves the route, the socket receives only from the address of the pending
                // connect.
                socket.wait_until_readable();
                assert_eq!(socket.connect(far(domain, 0)), Err(Errno::ENETUNREACH));
                assert_eq!(socket.receive().unwrap().1, Some(called), "{domain:?}");
                assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
                ask_at(&socket, service, first);
            }
        }
        // Also if it was to the same service, and to another of its endpoints.
        let socket = loop {
            let socket = Socket::new(domain, Udp);
            if socket.send_to(b"?", half(domain)).is_ok() {
                break socket;
            }
        };
        socket.wait_until_readable();
        while socket.connect(half(domain)).is_ok() {
            socket.disconnect().unwrap();
        }
        assert_eq!(socket.receive().unwrap().1, Some(half(domain)), "{domain:?}");
        for _ in 0..10 {
            assert_eq!(socket.ask_at(half(domain)).unwrap().seen, Some(half(domain)), "{domain:?}");
        }
    });
}

/// Answers that arrived before a `connect()` are read after it, and are from the services that were called.
#[test]
fn answers_before_a_connect_are_from_whom_was_asked() {
    with_scenes(&scenes(Udp), |domain, Scene { service, other_service, other_endpoint, .. }| {
        let socket = Socket::new(domain, Udp);
        socket.bind(SocketAddr::new(domain.loopback(), 0)).unwrap();
        socket.send_to(b"?", service).unwrap();
        socket.wait_until_readable();
        socket.connect(other_service).unwrap();
        assert_eq!(socket.receive().unwrap().1, Some(service));
        assert_eq!(socket.peer_name(), Ok(other_service));
        let answer = socket.ask().unwrap();
        assert_eq!((answer.server, answer.seen), (other_endpoint, Some(other_service)));
    });
}

/// An `AF_INET6` socket accepts `sockaddr_in` too: the other family's hooks see its peer as well.
#[test]
fn a_call_in_the_form_of_the_other_family_leaves_the_peer() {
    with_agents(&many_and_far(), || {
        let service = Scene::new(Domain::V6).service;
        let other_service = Scene::new(Domain::V4).other_service;
        let socket = connected(Domain::V6, Udp, service);
        assert_eq!(socket.connect_as(Domain::V4, far(Domain::V4, 0)), Err(Errno::ENETUNREACH));
        assert_eq!(socket.peer_name(), Ok(service));
        assert_eq!(socket.ask().unwrap().seen, Some(service));

        // A datagram to another address does not change a connected socket's records.
        socket.send_to_as(Domain::V4, b"?", other_service).unwrap();
        assert_eq!(socket.ask().unwrap().seen, Some(service));

        let mapped = Socket::new(Domain::Mapped, Udp);
        mapped.connect_as(Domain::V4, other_service).unwrap();
        assert_eq!(mapped.peer_name(), Ok(other_service));
        assert_eq!(mapped.ask().unwrap().seen, Some(other_service));
        mapped.send_to_as(Domain::V4, b"?", other_service).unwrap();
        assert_eq!(mapped.receive().unwrap().1, Some(other_service));
    });
}

/// A connected socket that sends to its own service with `sendto()` reaches its peer.
#[test]
fn a_connected_socket_reaches_its_peer_by_the_service_too() {
    with_scenes(&many_and_far(), |domain, Scene { service, other_service, .. }| {
        let socket = connected(domain, Udp, other_service);
        for _ in 0..4 {
            socket.connect(service).unwrap();
            let peer = socket.ask().unwrap().server;
            for _ in 0..10 {
                assert_eq!(socket.connect(far(domain, 0)), Err(Errno::ENETUNREACH));
                ask_at(&socket, service, peer);
            }
        }
    });
}

/// An endpoint that is removed and added again gets a new id. A socket that reaches it by chance keeps it.
#[test]
fn datagrams_stay_together_also_at_an_endpoint_that_came_back() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let with = |endpoints: &[SocketAddr]| Cluster::new().serving("one", service, Udp, endpoints);
        let cluster = with(&addresses::<2>(Domain::V4, 8001));
        let _servers = servers_of(&cluster);
        in_each_mode(sandbox, |options| {
            let mut agent = start(options);
            agent.follow(&cluster);
            // Half of them reach the endpoint that they had.
            let sockets: [Socket; 16] = std::array::from_fn(|_| Socket::new(Domain::V4, Udp));
            for socket in &sockets {
                let _answer = socket.ask_at(service).unwrap();
            }
            agent.follow(&with(&[]));
            agent.follow(&cluster);
            for socket in &sockets {
                let first = socket.ask_at(service).unwrap();
                for _ in 0..10 {
                    assert_eq!(socket.ask_at(service).unwrap(), first);
                }
            }
        });
    });
}

/// `IPV6_ADDRFORM` converts an IPv6 socket that is connected to an IPv4 service to IPv4.
#[test]
fn a_socket_that_changes_its_family_sees_the_service() {
    for protocol in [Tcp, Udp] {
        with_agents(&scenes(protocol), || {
            let scene = Scene::new(Domain::Mapped);
            let socket = Socket::new(Domain::Mapped, protocol);
            connect_and_ask(&socket, scene.service, scene.endpoint);
            let socket = socket.into_v4().unwrap();
            assert_eq!(socket.peer_name(), Ok(scene.service));
            if protocol == Udp {
                assert_eq!(socket.ask().unwrap().seen, Some(scene.service));
                connect_and_ask(&socket, scene.other_service, scene.other_endpoint);
                connect_and_ask(&socket, scene.endpoint, scene.endpoint);
            }
        });
    }
}

/// It does not matter whether a socket is older than the agent, or already had a cookie.
#[test]
fn older_sockets_see_the_service_too() {
    Sandbox::test(|sandbox| {
        let cluster = scenes(Udp);
        let _servers = servers_of(&cluster);
        in_each_mode(sandbox, |options| {
            let sockets = Domain::ALL.map(|domain| {
                let scene = Scene::new(domain);
                let [fresh, asking, connected] = [(); 3].map(|()| Socket::new(domain, Udp));
                ask_at(&asking, scene.plain, scene.plain);
                assert_ne!(asking.cookie(), 0);
                connect_and_ask(&connected, scene.endpoint, scene.endpoint);
                (domain, scene, [fresh, asking, connected])
            });
            start(options).follow(&cluster);
            for (domain, scene, [fresh, asking, connected]) in &sockets {
                assert_eq!(connected.peer_name(), Ok(scene.endpoint), "{domain:?}");
                assert_eq!(connected.ask().unwrap().seen, Some(scene.endpoint), "{domain:?}");
                ask_at(asking, scene.plain, scene.plain);
                for socket in [fresh, asking] {
                    ask_at(socket, scene.service, scene.endpoint);
                    ask_at(socket, scene.endpoint, scene.endpoint);
                }
                for socket in [fresh, asking, connected] {
                    connect_and_ask(socket, scene.other_service, scene.other_endpoint);
                    connect_and_ask(socket, scene.service, scene.endpoint);
                }
            }
        });
    });
}

/// An action of a program on its UDP socket; numbers index [`targets`].
#[derive(Clone, Copy, Debug)]
enum Step {
    Connect(usize),
    Disconnect,
    /// A `connect()` with an address that is too short, which the kernel refuses.
    Short(usize),
    /// A `connect()` to an unreachable address: of the service with this number, or without a service.
    Fail(Option<u16>),
    /// A datagram, a failing `connect()`, and the answer; only while the socket has no peer.
    SendAndFail(usize),
    /// A datagram and its answer; to an address only while the socket has no peer.
    Ask(usize),
}

use Step::{Ask, Connect, Disconnect, Fail, SendAndFail, Short};

/// Numbers of the first endpoint, and of the server that is not a service, among [`targets`].
const ENDPOINT: usize = 6;
const PLAIN: usize = 9;

/// For a domain: six services, two for each of three endpoints, these endpoints, and a plain server.
fn targets(domain: Domain) -> [SocketAddr; PLAIN + 1] {
    let servers: [SocketAddr; 4] = addresses(domain, 8001);
    std::array::from_fn(|n| match n.checked_sub(ENDPOINT) {
        Some(server) => servers[server],
        None => service_port(domain, 101 + u16::try_from(n).unwrap()),
    })
}

/// The server that answers at a target.
const fn server_of(target: usize) -> usize {
    if target < ENDPOINT { ENDPOINT + target % 3 } else { target }
}

/// Runs steps. The peer is that of the last successful `connect()`; an answer is from the address that was
/// called.
fn walk(what: &str, domain: Domain, steps: &[Step]) {
    let targets = targets(domain);
    let socket = Socket::new(domain, Udp);
    let mut peer = None;
    // After a failed `connect()` a connected IPv4 socket sends one more datagram to its peer, and later ones
    // to the address that failed: Linux takes it from the socket's cached flow (`udp_sendmsg`).
    let mut n_asks = usize::MAX;
    for (n, step) in steps.iter().enumerate() {
        let place = format!("{what}, {domain:?}, step {n}: {step:?}");
        let fail = |to| assert_eq!(socket.connect(to), Err(Errno::ENETUNREACH), "{place}");
        match (*step, peer) {
            (Connect(to), _) => {
                assert_eq!(socket.connect(targets[to]), Ok(()), "{place}");
                (peer, n_asks) = (Some(to), usize::MAX);
            }
            (Disconnect, _) => {
                assert_eq!(socket.disconnect(), Ok(()), "{place}");
                peer = None;
            }
            (Short(to), _) => assert_eq!(socket.connect_short(targets[to]), Err(Errno::EINVAL), "{place}"),
            (Fail(service), _) => {
                fail(service.map_or_else(|| unreachable(domain, 0), |n| far(domain, n)));
                n_asks = 1;
            }
            (SendAndFail(to), None) => {
                assert_eq!(socket.send_to(b"?", targets[to]), Ok(()), "{place}");
                socket.wait_until_readable();
                fail(far(domain, 0));
                assert_eq!(socket.receive().map(|(_, seen)| seen), Ok(Some(targets[to])), "{place}");
            }
            (SendAndFail(_) | Ask(_), Some(_)) if n_asks == 0 => {}
            (Ask(to), None) | (SendAndFail(_) | Ask(_), Some(to)) => {
                n_asks = n_asks.saturating_sub(peer.map_or(0, |_| 1));
                let answer = if peer.is_some() { socket.ask() } else { socket.ask_at(targets[to]) };
                let answer = answer.map(|answer| (answer.server, answer.seen));
                assert_eq!(answer, Ok((targets[server_of(to)], Some(targets[to]))), "{place}");
            }
        }
        assert_eq!(socket.peer_name(), peer.map(|to| targets[to]).ok_or(Errno::ENOTCONN), "{place}");
    }
}

fn with_targets(test: impl Fn() + Sync) {
    let mut cluster = services(&[Udp], |domain| {
        let targets = targets(domain);
        (0..ENDPOINT).map(|n| (targets[n], vec![targets[server_of(n)]])).chain(all_far(domain)).collect()
    });
    cluster.set_endpoints(&PortOf::udp("plain"), &FAMILIES.map(|domain| targets(domain)[PLAIN]));
    with_agents(&cluster, test);
}

/// What programs do, and what has failed once.
#[test]
fn orders_of_calls_show_whom_was_called() {
    let asks_all = || (0..ENDPOINT).map(Ask);
    let fails_often = || (0..N_FAR).map(|n| Fail(Some(n)));
    let mut orders = vec![
        ("unconnected", [Ask(0), Ask(1), Ask(PLAIN)].repeat(3)),
        ("services with one endpoint, and it", vec![Ask(0), Ask(3), Ask(0), Ask(ENDPOINT), Ask(3)]),
        // The endpoint, called by its own address, is not a service.
        (
            "reconnected",
            [0, 1, PLAIN, 0, ENDPOINT].into_iter().flat_map(|to| [Connect(to), Ask(to)]).collect(),
        ),
        ("disconnected", {
            let again = [Disconnect, Connect(PLAIN), Ask(PLAIN)];
            let first = [Connect(0), Ask(0), Disconnect, Ask(ENDPOINT), Ask(0), Connect(1), Ask(1)];
            first.into_iter().chain(again).collect()
        }),
        ("refused for a short address", vec![Short(0), Connect(0), Ask(0), Short(1), Ask(0)]),
        ("failed without a peer", vec![Fail(Some(0)), Connect(0), Ask(0)]),
        ("failed", {
            let fails = [Some(0), None, Some(0)].into_iter().flat_map(|service| [Fail(service), Ask(0)]);
            [Connect(0), Ask(0)].into_iter().chain(fails).collect()
        }),
        // Even when all records are used.
        ("failed often", [Connect(1)].into_iter().chain(fails_often()).chain([Ask(1)]).collect()),
        ("failed often after a datagram", {
            [Ask(0), Connect(1)].into_iter().chain(fails_often()).chain([Ask(1)]).collect()
        }),
    ];
    orders.extend((0..ENDPOINT).map(|last| {
        let connected = [Connect(last), Ask(last), Disconnect];
        ("connected to the last of several", asks_all().chain(connected).chain(asks_all()).collect())
    }));
    with_targets(|| {
        for (what, steps) in &orders {
            for domain in Domain::ALL {
                walk(what, domain, steps);
            }
        }
    });
}

#[test]
fn any_order_of_calls_shows_whom_was_called() {
    let step = prop_oneof![
        (0..=PLAIN).prop_map(Connect),
        Just(Disconnect),
        (0..=PLAIN).prop_map(Short),
        prop::option::of(0..N_FAR).prop_map(Fail),
        (0..=PLAIN).prop_map(SendAndFail),
        (0..=PLAIN).prop_map(Ask),
    ];
    let steps = (sample::select(&Domain::ALL[..]), vec(step, 1..60));
    with_targets(|| {
        let config = Config { cases: 200, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let result = runner.run(&steps, |(domain, steps)| {
            walk("random", domain, &steps);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    });
}
