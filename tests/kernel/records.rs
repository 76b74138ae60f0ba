//! The peer of a socket, as programs see it: the service address that was called, never the endpoint.

use std::net::SocketAddr;

use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_kernel::pins;
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    server::Servers,
};
use nix::errno::Errno;
use proptest::{
    collection::vec,
    prelude::*,
    sample,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::calls::{addresses, service_address};

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
        Self { service, endpoint, other_service: SocketAddr::new(service.ip(), 53), other_endpoint, plain }
    }
}

/// A sandbox with an agent and a scene in each family, once for each home of records.
fn with_scenes(protocol: Protocol, test: impl Fn(Domain, &Scene) + Sync) {
    let (cluster, servers) = scenes(protocol);
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            test(domain, &Scene::new(domain));
        }
    });
}

/// The services and servers of a scene in each family.
pub(crate) fn scenes(protocol: Protocol) -> (Cluster, Vec<(SocketAddr, Protocol)>) {
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let scene = Scene::new(domain);
        servers.extend([scene.endpoint, scene.other_endpoint, scene.plain].map(|server| (server, protocol)));
        cluster.serve(&format!("one-{domain:?}"), scene.service, protocol, &[scene.endpoint]);
        cluster.serve(&format!("two-{domain:?}"), scene.other_service, protocol, &[scene.other_endpoint]);
    }
    (cluster, servers)
}

/// A sandbox with servers and an agent that follows a cluster, once for each home of records.
fn with_agents(cluster: &Cluster, servers: &[(SocketAddr, Protocol)], test: impl Fn() + Sync) {
    Sandbox::test(|sandbox| {
        let _servers = Servers::start(servers.iter().copied());
        for options in agent::modes(sandbox) {
            let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            agent.follow(cluster);
            test();
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
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

#[test]
fn a_connected_socket_sees_the_service() {
    for protocol in [Tcp, Udp] {
        with_scenes(protocol, |domain, scene| {
            connect_and_ask(&Socket::new(domain, protocol), scene.service, scene.endpoint);
        });
    }
}

#[test]
fn an_unconnected_socket_sees_the_service_that_it_asked() {
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        for _ in 0..3 {
            ask_at(&socket, scene.service, scene.endpoint);
            ask_at(&socket, scene.other_service, scene.other_endpoint);
            ask_at(&socket, scene.plain, scene.plain);
        }
        assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
    });
}

/// A resolver queries two name servers at once and accepts answers in any order.
#[test]
fn answers_of_two_services_are_told_apart() {
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        socket.send_to(b"?", scene.service).unwrap();
        socket.send_to(b"?", scene.other_service).unwrap();
        socket.send_to(b"?", scene.plain).unwrap();
        let mut senders: Vec<_> = (0..3).map(|_| socket.receive().unwrap().1.unwrap()).collect();
        senders.sort_unstable();
        let mut called = vec![scene.service, scene.other_service, scene.plain];
        called.sort_unstable();
        assert_eq!(senders, called);
    });
}

/// Two service addresses with the same endpoint, called in sequence through one socket.
#[test]
fn an_answer_is_from_the_service_asked_last() {
    let mut cluster = Cluster::new();
    let scenes = [Domain::V4, Domain::V6].map(Scene::new);
    for scene in &scenes {
        cluster.serve(&format!("one-{}", scene.service.is_ipv6()), scene.service, Udp, &[scene.endpoint]);
        cluster.serve(
            &format!("two-{}", scene.service.is_ipv6()),
            scene.other_service,
            Udp,
            &[scene.endpoint],
        );
    }
    with_agents(&cluster, &scenes.map(|scene| (scene.endpoint, Udp)), || {
        for domain in Domain::ALL {
            let Scene { service, endpoint, other_service, .. } = Scene::new(domain);
            let socket = Socket::new(domain, Udp);
            for to in [service, other_service, service, endpoint, other_service] {
                ask_at(&socket, to, endpoint);
            }
        }
    });
}

#[test]
fn a_reconnected_socket_sees_its_new_peer() {
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        connect_and_ask(&socket, scene.other_service, scene.other_endpoint);
        connect_and_ask(&socket, scene.plain, scene.plain);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        // The endpoint, called by its own address, is not a service.
        connect_and_ask(&socket, scene.endpoint, scene.endpoint);
    });
}

#[test]
fn a_disconnected_socket_has_no_peer_and_can_call_again() {
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        socket.disconnect().unwrap();
        assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
        ask_at(&socket, scene.endpoint, scene.endpoint);
        ask_at(&socket, scene.service, scene.endpoint);
        connect_and_ask(&socket, scene.other_service, scene.other_endpoint);
        socket.disconnect().unwrap();
        connect_and_ask(&socket, scene.plain, scene.plain);
    });
    with_scenes(Tcp, |domain, scene| {
        let socket = Socket::new(domain, Tcp);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        socket.disconnect().unwrap();
        assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
        connect_and_ask(&socket, scene.plain, scene.plain);
    });
}

/// Calls that the kernel refuses change nothing.
#[test]
fn a_call_with_a_short_address_changes_nothing() {
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        assert_eq!(socket.connect_short(scene.service), Err(Errno::EINVAL));
        assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
        connect_and_ask(&socket, scene.service, scene.endpoint);
        assert_eq!(socket.connect_short(scene.other_service), Err(Errno::EINVAL));
        assert_eq!(socket.peer_name(), Ok(scene.service));
        assert_eq!(socket.ask().unwrap().seen, Some(scene.service));
    });
}

/// More services than a socket has records for: each answer still appears to come from the right service.
#[test]
fn a_socket_may_use_many_services() {
    let pairs = |domain| {
        let endpoints: [SocketAddr; 20] = addresses(domain, 8001);
        let ip = service_address(domain).ip();
        endpoints.map(|endpoint| (SocketAddr::new(ip, endpoint.port() - 8000), endpoint))
    };
    let all = [pairs(Domain::V4), pairs(Domain::V6)].concat();
    let mut cluster = Cluster::new();
    for (service, endpoint) in &all {
        cluster.serve(&format!("{}-{}", service.is_ipv6(), service.port()), *service, Udp, &[*endpoint]);
    }
    let servers: Vec<_> = all.iter().map(|(_, endpoint)| (*endpoint, Udp)).collect();
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let socket = Socket::new(domain, Udp);
            for (service, endpoint) in [pairs(domain), pairs(domain)].concat() {
                ask_at(&socket, service, endpoint);
            }
        }
    });
}

/// A peer that sends to the socket first is seen by its own address, whatever the socket called before.
#[test]
fn a_stranger_is_seen_as_it_is() {
    with_scenes(Udp, |domain, scene| {
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
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        socket.connect(scene.service).unwrap();
        for elsewhere in [scene.endpoint, scene.other_service, scene.plain, scene.service] {
            for _ in 0..5 {
                socket.send_to(b"!", elsewhere).unwrap();
            }
            assert_eq!(socket.peer_name(), Ok(scene.service), "after {elsewhere}");
        }
        // Ten answers are from the peer: those to the datagrams to either of its addresses.
        for _ in 0..10 {
            let (_, sender) = socket.receive().unwrap();
            assert_eq!(sender, Some(scene.service));
        }
    });
}

/// Calling the peer of an unconnected socket by its own address, or another service with the same endpoint,
/// does not change the endpoint that the socket uses for a service.
#[test]
fn a_socket_keeps_its_endpoint_whatever_else_it_asks() {
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let endpoints: [SocketAddr; 16] = addresses(domain, 8001);
        let Scene { service, other_service, .. } = Scene::new(domain);
        cluster.serve(&format!("one-{domain:?}"), service, Udp, &endpoints);
        cluster.serve(&format!("two-{domain:?}"), other_service, Udp, &endpoints);
        servers.extend(endpoints.map(|endpoint| (endpoint, Udp)));
    }
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let Scene { service, other_service, .. } = Scene::new(domain);
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
        }
    });
}

fn unreachable(domain: Domain) -> SocketAddr {
    let text = if domain == Domain::V6 { "[2001:db8::1]:9" } else { "192.0.2.1:9" };
    text.parse().unwrap()
}

/// After a `connect()` that the kernel refuses once the programs have run, a datagram socket keeps its peer.
#[test]
fn a_failed_connect_leaves_the_peer_and_its_name() {
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let Scene { service, endpoint, other_service, .. } = Scene::new(domain);
        cluster.serve(&format!("one-{domain:?}"), service, Udp, &[endpoint]);
        cluster.serve(&format!("far-{domain:?}"), other_service, Udp, &[unreachable(domain)]);
        servers.push((endpoint, Udp));
    }
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let Scene { service, endpoint, other_service, .. } = Scene::new(domain);
            let socket = Socket::new(domain, Udp);
            connect_and_ask(&socket, service, endpoint);
            for failing in [other_service, unreachable(domain), other_service] {
                assert_eq!(socket.connect(failing), Err(Errno::ENETUNREACH), "{domain:?}");
                assert_eq!(socket.peer_name(), Ok(service), "{domain:?} after {failing}");
                let answer = socket.ask().unwrap();
                assert_eq!(
                    (answer.server, answer.seen),
                    (endpoint, Some(service)),
                    "{domain:?} after {failing}"
                );
            }
            // Without an earlier peer, there is none afterwards.
            let socket = Socket::new(domain, Udp);
            assert_eq!(socket.connect(other_service), Err(Errno::ENETUNREACH));
            assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
            connect_and_ask(&socket, service, endpoint);
        }
    });
}

/// `send()` names no destination. If the kernel runs the hook with the peer's address, and that is also a
/// service's, the flow of the `connect()` still applies.
#[test]
fn a_connected_socket_is_decided_once() {
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let Scene { service, endpoint, other_endpoint, plain, .. } = Scene::new(domain);
        cluster.serve(&format!("one-{domain:?}"), service, Udp, &[endpoint]);
        // The endpoint's own address is also another service's external IP or node port.
        cluster.serve(&format!("two-{domain:?}"), endpoint, Udp, &[other_endpoint, plain]);
        servers.extend([endpoint, other_endpoint, plain].map(|server| (server, Udp)));
    }
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let Scene { service, endpoint, .. } = Scene::new(domain);
            let socket = Socket::new(domain, Udp);
            socket.connect(service).unwrap();
            for _ in 0..40 {
                let answer = socket.ask().unwrap();
                assert_eq!((answer.server, answer.seen), (endpoint, Some(service)), "{domain:?}");
            }
            assert_eq!(socket.peer_name(), Ok(service));
        }
    });
}

/// In each family: a service with sixteen endpoints, another with one endpoint, one with an unreachable
/// endpoint, and one with a reachable and an unreachable endpoint.
fn many_and_far() -> (Cluster, Vec<(SocketAddr, Protocol)>) {
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let endpoints: [SocketAddr; 16] = addresses(domain, 8001);
        let [lone] = addresses(domain, 9001);
        cluster.serve(&format!("many-{domain:?}"), Scene::new(domain).service, Udp, &endpoints);
        cluster.serve(&format!("lone-{domain:?}"), Scene::new(domain).other_service, Udp, &[lone]);
        cluster.serve(&format!("far-{domain:?}"), far(domain), Udp, &[unreachable(domain)]);
        cluster.serve(&format!("half-{domain:?}"), half(domain), Udp, &[lone, unreachable(domain)]);
        servers.extend(endpoints.map(|endpoint| (endpoint, Udp)));
        servers.push((lone, Udp));
    }
    (cluster, servers)
}

/// The service with one unreachable endpoint of two.
fn half(domain: Domain) -> SocketAddr {
    SocketAddr::new(service_address(domain).ip(), 2)
}

/// The unreachable service.
fn far(domain: Domain) -> SocketAddr {
    SocketAddr::new(service_address(domain).ip(), 9)
}

/// A socket that waits for answers keeps the records of its calls when a `connect()` fails meanwhile.
#[test]
fn a_failed_connect_loses_nothing_of_an_unconnected_socket() {
    let (cluster, servers) = many_and_far();
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let Scene { service, other_service, .. } = Scene::new(domain);
            let socket = Socket::new(domain, Udp);
            let first = socket.ask_at(service).unwrap().server;
            for called in [service, other_service] {
                for _ in 0..10 {
                    socket.send_to(b"?", called).unwrap();
                    // While IPv6 resolves the route, the socket receives only from the address of the pending
                    // connect.
                    socket.wait_until_readable();
                    assert_eq!(socket.connect(far(domain)), Err(Errno::ENETUNREACH));
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
        }
    });
}

/// Answers that arrived before a `connect()` are read after it, and are from the services that were called.
#[test]
fn answers_before_a_connect_are_from_whom_was_asked() {
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        socket.bind(SocketAddr::new(domain.loopback(), 0)).unwrap();
        socket.send_to(b"?", scene.service).unwrap();
        socket.wait_until_readable();
        connect_and_ask_behind(&socket, scene.other_service, scene.other_endpoint, scene.service);
    });
}

/// Connects, and reads an answer of a service that was called before, then one of the peer.
fn connect_and_ask_behind(socket: &Socket, to: SocketAddr, server: SocketAddr, asked: SocketAddr) {
    socket.connect(to).unwrap();
    assert_eq!(socket.receive().unwrap().1, Some(asked));
    assert_eq!(socket.peer_name(), Ok(to));
    let answer = socket.ask().unwrap();
    assert_eq!((answer.server, answer.seen), (server, Some(to)));
}

/// A socket whose `connect()` fails repeatedly keeps the record of its peer, even when all records are used.
#[test]
fn many_failed_connects_leave_the_peer_and_its_name() {
    let far: Vec<_> = (0..40).collect();
    let far_of = |domain, n: u16| SocketAddr::new(service_address(domain).ip(), 1000 + n);
    let (mut cluster, servers) = many_and_far();
    for domain in [Domain::V4, Domain::V6] {
        for n in &far {
            let endpoint = SocketAddr::new(unreachable(domain).ip(), 1000 + n);
            cluster.serve(&format!("far-{domain:?}-{n}"), far_of(domain, *n), Udp, &[endpoint]);
        }
    }
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let Scene { service, other_service, .. } = Scene::new(domain);
            for asked_before in [false, true] {
                let socket = Socket::new(domain, Udp);
                if asked_before {
                    let _answer = socket.ask_at(service).unwrap();
                }
                socket.connect(other_service).unwrap();
                for n in &far {
                    assert_eq!(socket.connect(far_of(domain, *n)), Err(Errno::ENETUNREACH));
                    assert_eq!(socket.peer_name(), Ok(other_service), "{domain:?} after {n}");
                }
                assert_eq!(socket.ask().unwrap().seen, Some(other_service));
            }
        }
    });
}

/// An `AF_INET6` socket accepts `sockaddr_in` too: the other family's hooks see its peer as well.
#[test]
fn a_call_in_the_form_of_the_other_family_leaves_the_peer() {
    let (cluster, servers) = many_and_far();
    with_agents(&cluster, &servers, || {
        let service = Scene::new(Domain::V6).service;
        let other_service = Scene::new(Domain::V4).other_service;
        let socket = Socket::new(Domain::V6, Udp);
        socket.connect(service).unwrap();
        assert_eq!(socket.connect_as(Domain::V4, far(Domain::V4)), Err(Errno::ENETUNREACH));
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

/// Of several services with the same endpoint, the socket's peer is the one connected to last, however many
/// it called before.
#[test]
fn a_connected_socket_sees_the_last_of_services_with_one_endpoint() {
    let called = |domain| (1..=6_u16).map(move |n| SocketAddr::new(service_address(domain).ip(), n));
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let endpoints: [SocketAddr; 3] = addresses(domain, 8001);
        for (n, service) in called(domain).enumerate() {
            cluster.serve(&format!("{domain:?}-{n}"), service, Udp, &[endpoints[n % 3]]);
        }
        servers.extend(endpoints.map(|endpoint| (endpoint, Udp)));
    }
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            for last in called(domain) {
                let socket = Socket::new(domain, Udp);
                for service in called(domain) {
                    assert_eq!(socket.ask_at(service).unwrap().seen, Some(service));
                }
                socket.connect(last).unwrap();
                assert_eq!(socket.peer_name(), Ok(last), "{domain:?}");
                assert_eq!(socket.ask().unwrap().seen, Some(last), "{domain:?}");
                socket.disconnect().unwrap();
                for service in called(domain) {
                    assert_eq!(socket.ask_at(service).unwrap().seen, Some(service));
                }
            }
        }
    });
}

/// A connected socket that sends to its own service with `sendto()` reaches its peer.
#[test]
fn a_connected_socket_reaches_its_peer_by_the_service_too() {
    let (cluster, servers) = many_and_far();
    with_agents(&cluster, &servers, || {
        for domain in Domain::ALL {
            let Scene { service, other_service, .. } = Scene::new(domain);
            let socket = Socket::new(domain, Udp);
            socket.connect(other_service).unwrap();
            for _ in 0..4 {
                socket.connect(service).unwrap();
                let peer = socket.ask().unwrap().server;
                for _ in 0..10 {
                    assert_eq!(socket.connect(far(domain)), Err(Errno::ENETUNREACH));
                    ask_at(&socket, service, peer);
                }
            }
        }
    });
}

/// An endpoint that is removed and added again gets a new id. A socket that reaches it by chance keeps it.
#[test]
fn datagrams_stay_together_also_at_an_endpoint_that_came_back() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints: [SocketAddr; 2] = addresses(Domain::V4, 8001);
        let _servers = Servers::udp(endpoints);
        let cluster = |endpoints: &[SocketAddr]| {
            let mut cluster = Cluster::new();
            cluster.serve("one", service, Udp, endpoints);
            cluster
        };
        for options in agent::modes(sandbox) {
            let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            agent.follow(&cluster(&endpoints));
            // Half of them reach the endpoint that they had.
            let sockets: [Socket; 16] = std::array::from_fn(|_| Socket::new(Domain::V4, Udp));
            for socket in &sockets {
                let _answer = socket.ask_at(service).unwrap();
            }
            agent.follow(&cluster(&[]));
            agent.follow(&cluster(&endpoints));
            for socket in &sockets {
                let first = socket.ask_at(service).unwrap();
                for _ in 0..10 {
                    assert_eq!(socket.ask_at(service).unwrap(), first);
                }
            }
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}

/// `IPV6_ADDRFORM` converts an IPv6 socket that is connected to an IPv4 service to IPv4.
#[test]
fn a_socket_that_changes_its_family_sees_the_service() {
    for protocol in [Tcp, Udp] {
        with_scenes(protocol, |domain, scene| {
            if domain != Domain::Mapped {
                return;
            }
            let socket = Socket::new(domain, protocol);
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
        let (cluster, servers) = scenes(Udp);
        let _servers = Servers::start(servers);
        for options in agent::modes(sandbox) {
            let sockets = Domain::ALL.map(|domain| {
                let scene = Scene::new(domain);
                let [fresh, asking, connected] = [(); 3].map(|()| Socket::new(domain, Udp));
                ask_at(&asking, scene.plain, scene.plain);
                assert_ne!(asking.cookie(), 0);
                connect_and_ask(&connected, scene.endpoint, scene.endpoint);
                (domain, scene, [fresh, asking, connected])
            });
            Agent::start_with(&options, agent::settings(), Vec::new()).unwrap().follow(&cluster);
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
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}

/// An action of a program on its socket; numbers index [`targets`].
#[derive(Clone, Copy, Debug)]
enum Step {
    Connect(usize),
    Disconnect,
    /// A `connect()` to an unreachable address, which is a service's or not.
    Fail(bool),
    /// A datagram, a failing `connect()`, and the answer; only while the socket has no peer.
    SendAndFail(usize),
    /// A datagram and its answer; to an address only while the socket has no peer.
    Ask(usize),
}

/// For a domain: six services, two for each of three endpoints, and these endpoints.
fn targets(domain: Domain) -> [SocketAddr; 9] {
    let ip = service_address(domain).ip();
    let endpoints: [SocketAddr; 3] = addresses(domain, 8001);
    std::array::from_fn(|n| {
        if n < 6 { SocketAddr::new(ip, 101 + u16::try_from(n).unwrap()) } else { endpoints[n - 6] }
    })
}

/// Runs steps. The peer is that of the last successful `connect()`; an answer is from the address that was
/// called.
fn walk(domain: Domain, steps: &[Step]) {
    let targets = targets(domain);
    let socket = Socket::new(domain, Udp);
    let mut peer = Err(Errno::ENOTCONN);
    // After a failed `connect()` a connected IPv4 socket sends one more datagram to its peer, and later ones
    // to the address that failed: Linux takes it from the socket's cached flow (`udp_sendmsg`).
    let mut n_asks = usize::MAX;
    let fail = |to| assert_eq!(socket.connect(to), Err(Errno::ENETUNREACH));
    for (n, step) in steps.iter().enumerate() {
        match *step {
            Step::Connect(to) => {
                socket.connect(targets[to]).unwrap();
                (peer, n_asks) = (Ok(targets[to]), usize::MAX);
            }
            Step::Disconnect => {
                socket.disconnect().unwrap();
                peer = Err(Errno::ENOTCONN);
            }
            Step::Fail(is_service) => {
                fail(if is_service { far(domain) } else { unreachable(domain) });
                n_asks = 1;
            }
            Step::SendAndFail(to) if peer.is_err() => {
                socket.send_to(b"?", targets[to]).unwrap();
                socket.wait_until_readable();
                fail(far(domain));
                assert_eq!(socket.receive().unwrap().1, Some(targets[to]), "{domain:?}, step {n}");
            }
            Step::Ask(to) if peer.is_err() => {
                assert_eq!(
                    socket.ask_at(targets[to]).unwrap().seen,
                    Some(targets[to]),
                    "{domain:?}, step {n}"
                );
            }
            Step::SendAndFail(_) | Step::Ask(_) if n_asks == 0 => {}
            Step::SendAndFail(_) | Step::Ask(_) => {
                n_asks -= 1;
                assert_eq!(socket.ask().unwrap().seen, peer.ok(), "{domain:?}, step {n}");
            }
        }
        assert_eq!(socket.peer_name(), peer, "{domain:?}, step {n}");
    }
}

#[test]
fn any_order_of_calls_shows_whom_was_called() {
    let (mut cluster, mut servers) = (Cluster::new(), Vec::new());
    for domain in [Domain::V4, Domain::V6] {
        let targets = targets(domain);
        for n in 0..6 {
            cluster.serve(&format!("{domain:?}-{n}"), targets[n], Udp, &[targets[6 + n % 3]]);
        }
        cluster.serve(&format!("far-{domain:?}"), far(domain), Udp, &[unreachable(domain)]);
        servers.extend(targets[6..].iter().map(|endpoint| (*endpoint, Udp)));
    }
    let step = prop_oneof![
        (0..9_usize).prop_map(Step::Connect),
        Just(Step::Disconnect),
        any::<bool>().prop_map(Step::Fail),
        (0..9_usize).prop_map(Step::SendAndFail),
        (0..9_usize).prop_map(Step::Ask),
    ];
    let steps = (sample::select(&Domain::ALL[..]), vec(step, 1..60));
    with_agents(&cluster, &servers, || {
        let config = Config { cases: 200, failure_persistence: None, ..Config::default() };
        let result = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)).run(
            &steps,
            |(domain, steps)| {
                walk(domain, &steps);
                Ok(())
            },
        );
        result.unwrap_or_else(|error| panic!("{error}"));
    });
}
