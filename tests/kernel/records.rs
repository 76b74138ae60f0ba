//! What a socket says of its peer: the service address that the program called, never the endpoint behind it.

use std::net::SocketAddr;

use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    require,
    server::Servers,
};
use lb_userspace::{
    kernel::pins,
    model::Protocol::{self, Tcp, Udp},
};
use nix::errno::Errno;

use crate::calls::{addresses, service_address};

/// In one family: two services with one endpoint each, and a server that is no service.
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

/// A sandbox with an agent and a scene in each family, once for each way to keep records.
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

/// A sandbox with servers and an agent that follows a cluster, once for each way to keep records.
fn with_agents(cluster: &Cluster, servers: &[(SocketAddr, Protocol)], test: impl Fn() + Sync) {
    Sandbox::run(|sandbox| {
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
    if !require(Feature::Programs) {
        return;
    }
    for protocol in [Tcp, Udp] {
        with_scenes(protocol, |domain, scene| {
            connect_and_ask(&Socket::new(domain, protocol), scene.service, scene.endpoint);
        });
    }
}

#[test]
fn an_unconnected_socket_sees_the_service_that_it_asked() {
    if !require(Feature::Programs) {
        return;
    }
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

/// A resolver asks two name servers at once and takes answers in any order.
#[test]
fn answers_of_two_services_are_told_apart() {
    if !require(Feature::Programs) {
        return;
    }
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

/// Two service addresses with one endpoint behind both, called one after the other through one socket.
#[test]
fn an_answer_is_from_the_service_asked_last() {
    if !require(Feature::Programs) {
        return;
    }
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
    if !require(Feature::Programs) {
        return;
    }
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        connect_and_ask(&socket, scene.other_service, scene.other_endpoint);
        connect_and_ask(&socket, scene.plain, scene.plain);
        connect_and_ask(&socket, scene.service, scene.endpoint);
        // The endpoint behind the service, called by its own address, is no service.
        connect_and_ask(&socket, scene.endpoint, scene.endpoint);
    });
}

#[test]
fn a_disconnected_socket_has_no_peer_and_can_call_again() {
    if !require(Feature::Programs) {
        return;
    }
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

/// What the kernel itself refuses changes nothing.
#[test]
fn a_call_with_a_short_address_changes_nothing() {
    if !require(Feature::Programs) {
        return;
    }
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

/// More services than a socket has records for: each answer still comes from the service that was asked.
#[test]
fn a_socket_may_use_many_services() {
    if !require(Feature::Programs) {
        return;
    }
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

/// A peer that calls the socket itself is seen as it is, whatever the socket asked before.
#[test]
fn a_stranger_is_seen_as_it_is() {
    if !require(Feature::Programs) {
        return;
    }
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

/// A connected socket may send single datagrams elsewhere; it still hears and names its peer only.
#[test]
fn a_connected_socket_keeps_its_peer_when_it_sends_elsewhere() {
    if !require(Feature::Programs) {
        return;
    }
    with_scenes(Udp, |domain, scene| {
        let socket = Socket::new(domain, Udp);
        socket.connect(scene.service).unwrap();
        for elsewhere in [scene.endpoint, scene.other_service, scene.plain, scene.service] {
            for _ in 0..5 {
                socket.send_to(b"!", elsewhere).unwrap();
            }
            assert_eq!(socket.peer_name(), Ok(scene.service), "after {elsewhere}");
        }
        // Ten answers are from the peer: those to the datagrams for itself, by either of its addresses.
        for _ in 0..10 {
            let (_, sender) = socket.receive().unwrap();
            assert_eq!(sender, Some(scene.service));
        }
    });
}

/// The peer of an unconnected socket by its own address, and another service with the same endpoint: neither makes the
/// socket change the endpoint that it uses for a service.
#[test]
fn a_socket_keeps_its_endpoint_whatever_else_it_asks() {
    if !require(Feature::Programs) {
        return;
    }
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
                // An answer from the endpoint belongs to whom the socket asked last.
                ask_at(&socket, first.server, first.server);
                ask_at(&socket, service, first.server);
                ask_at(&socket, other_service, other.server);
                ask_at(&socket, other.server, other.server);
                ask_at(&socket, service, first.server);
            }
        }
    });
}

/// A `connect()` that the kernel refuses after the programs have run leaves a datagram socket its peer.
#[test]
fn a_failed_connect_leaves_the_peer_and_its_name() {
    if !require(Feature::Programs) {
        return;
    }
    // Addresses to which there is no route, behind a service and not.
    let unreachable = |domain: Domain| -> SocketAddr {
        let text = if domain == Domain::V6 { "[2001:db8::1]:9" } else { "192.0.2.1:9" };
        text.parse().unwrap()
    };
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
            // And with no peer before, there is none after.
            let socket = Socket::new(domain, Udp);
            assert_eq!(socket.connect(other_service), Err(Errno::ENETUNREACH));
            assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
            connect_and_ask(&socket, service, endpoint);
        }
    });
}

/// `send()` names no destination: where the kernel asks with the peer's address, and that is a service's too, the answer is
/// the one of the `connect()`.
#[test]
fn a_connected_socket_is_decided_once() {
    if !require(Feature::Programs) {
        return;
    }
    let mut cluster = Cluster::new();
    let mut servers = Vec::new();
    for domain in [Domain::V4, Domain::V6] {
        let Scene { service, endpoint, other_endpoint, plain, .. } = Scene::new(domain);
        cluster.serve(&format!("one-{domain:?}"), service, Udp, &[endpoint]);
        // The endpoint's own address is an external IP or a node port of another service.
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
