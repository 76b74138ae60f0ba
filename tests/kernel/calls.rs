//! Which calls are redirected to an endpoint, and which pass.

use std::{collections::BTreeSet, net::SocketAddr};

use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_tests::{
    Sandbox,
    agent::Agent,
    cgroup::ThreadCgroup,
    client::{Domain, Socket, call},
    cluster::{Cluster, PortOf},
    server::Servers,
};
use nix::errno::Errno;

/// The service address that tests of a domain call.
pub(crate) fn service_address(domain: Domain) -> SocketAddr {
    let text = if domain == Domain::V6 { "[fd00:96::1]:80" } else { "10.96.0.1:80" };
    text.parse().unwrap()
}

/// Loopback addresses for servers.
pub(crate) fn addresses<const N: usize>(domain: Domain, first_port: u16) -> [SocketAddr; N] {
    let mut port = first_port;
    std::array::from_fn(|_| {
        let address = SocketAddr::new(domain.loopback(), port);
        port += 1;
        address
    })
}

/// The endpoints of [`service_address`].
fn endpoints(domain: Domain) -> [SocketAddr; 2] {
    addresses(domain, 8001)
}

/// A sandbox with an agent, and in each family two servers and a service with both as endpoints.
fn with_services(protocols: &[Protocol], test: impl FnOnce(&mut Agent) + Send) {
    Sandbox::test(|sandbox| {
        let mut cluster = Cluster::new();
        let mut servers = Vec::new();
        for domain in [Domain::V4, Domain::V6] {
            for protocol in protocols {
                servers.extend(endpoints(domain).map(|endpoint| (endpoint, *protocol)));
                let name = format!("{domain:?}-{protocol}");
                cluster.serve(&name, service_address(domain), *protocol, &endpoints(domain));
            }
        }
        let _servers = Servers::start(servers);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster);
        test(&mut agent);
    });
}

/// Calls until every endpoint has answered. Fails if one does not, or another server does.
pub(crate) fn assert_spread(endpoints: &[SocketAddr], mut call: impl FnMut() -> SocketAddr) {
    let wanted: BTreeSet<_> = endpoints.iter().copied().collect();
    let mut reached = BTreeSet::new();
    // With two endpoints, 64 calls miss one of them once in 2^63 runs.
    for _ in 0..64 * endpoints.len() {
        reached.insert(call());
    }
    assert_eq!(reached, wanted);
}

#[test]
fn a_connect_reaches_each_endpoint() {
    with_services(&[Tcp, Udp], |_agent| {
        for domain in Domain::ALL {
            for protocol in [Tcp, Udp] {
                assert_spread(&endpoints(domain), || {
                    let socket = Socket::new(domain, protocol);
                    socket.connect(service_address(domain)).unwrap();
                    socket.ask().unwrap().server
                });
            }
        }
    });
}

#[test]
fn a_datagram_reaches_each_endpoint() {
    with_services(&[Udp], |_agent| {
        for domain in Domain::ALL {
            let call = || Socket::new(domain, Udp).ask_at(service_address(domain)).unwrap().server;
            assert_spread(&endpoints(domain), call);
        }
    });
}

/// A program that sends several datagrams of one flow expects the same server to receive them, until that
/// server is no longer an endpoint.
#[test]
fn the_datagrams_of_a_socket_stay_together() {
    with_services(&[Udp], |agent| {
        for domain in Domain::ALL {
            let service = service_address(domain);
            let socket = Socket::new(domain, Udp);
            let first = socket.ask_at(service).unwrap();
            for _ in 0..32 {
                assert_eq!(socket.ask_at(service).unwrap(), first);
            }
            let other = endpoints(domain).into_iter().find(|endpoint| *endpoint != first.server).unwrap();
            let mut cluster = Cluster::new();
            cluster.serve("v4-udp", service_address(Domain::V4), Udp, &endpoints(Domain::V4));
            cluster.serve("v6-udp", service_address(Domain::V6), Udp, &endpoints(Domain::V6));
            let name = if service.is_ipv4() { "v4-udp" } else { "v6-udp" };
            cluster.set_endpoints(&PortOf::udp(name), &[other]);
            agent.follow(&cluster);
            let moved = socket.ask_at(service).unwrap();
            assert_eq!((moved.server, moved.seen), (other, Some(service)));
            cluster.set_endpoints(&PortOf::udp(name), &endpoints(domain));
            agent.follow(&cluster);
        }
    });
}

/// Protocol and port are part of a service's address.
#[test]
fn neighbours_of_a_service_address_are_not_touched() {
    for (protocol, other_protocol) in [(Tcp, Udp), (Udp, Tcp)] {
        with_services(&[protocol], |_agent| {
            for domain in Domain::ALL {
                let connect = |to, protocol| Socket::new(domain, protocol).connect(to);
                let service = service_address(domain);
                let other_port = SocketAddr::new(service.ip(), 81);
                let other_address: SocketAddr =
                    if domain == Domain::V6 { "[fd00:96::2]:80" } else { "10.96.0.2:80" }.parse().unwrap();
                assert_eq!(connect(service, other_protocol), Err(Errno::ENETUNREACH));
                assert_eq!(connect(other_port, protocol), Err(Errno::ENETUNREACH));
                assert_eq!(connect(other_address, protocol), Err(Errno::ENETUNREACH));
                assert_eq!(connect(service, protocol), Ok(()), "the service itself");
                let send = |to| Socket::new(domain, Udp).send_to(b"?", to);
                assert_eq!(send(other_port), Err(Errno::ENETUNREACH));
                assert_eq!(send(other_address), Err(Errno::ENETUNREACH));
            }
        });
    }
}

#[test]
fn a_server_that_is_no_service_is_reached_as_it_is() {
    with_services(&[Tcp, Udp], |_agent| {
        for domain in Domain::ALL {
            let [server, other_server] = endpoints(domain);
            for protocol in [Tcp, Udp] {
                let socket = Socket::new(domain, protocol);
                socket.connect(server).unwrap();
                assert_eq!(socket.peer_name(), Ok(server));
                let answer = socket.ask().unwrap();
                assert_eq!(answer.server, server);
                assert!(answer.seen.is_none_or(|seen| seen == server), "{answer:?}");
            }
            let answer = Socket::new(domain, Udp).ask_at(other_server).unwrap();
            assert_eq!((answer.server, answer.seen), (other_server, Some(other_server)));
        }
    });
}

#[test]
fn a_call_from_another_cgroup_is_not_touched() {
    with_services(&[Tcp], |_agent| {
        let service = service_address(Domain::V4);
        assert!(call(service, Tcp).is_ok());
        let elsewhere = ThreadCgroup::enter().unwrap();
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        drop(elsewhere);
    });
}
