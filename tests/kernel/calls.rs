//! Which calls are redirected to an endpoint, and which pass. [`crate::matrix`] has every kind of call.

use std::net::SocketAddr;

use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_tests::{
    Sandbox,
    agent::Agent,
    cgroup::ThreadCgroup,
    client::{Domain, Socket, call},
    cluster::Cluster,
};
use nix::errno::Errno;

use crate::fixture::{addresses, servers_of, service_address, service_port, services};

/// The endpoints of [`service_address`].
fn endpoints(domain: Domain) -> [SocketAddr; 2] {
    addresses(domain, 8001)
}

/// In each family a service with these endpoints.
fn with_endpoints(protocol: Protocol, endpoints: impl Fn(Domain) -> Vec<SocketAddr>) -> Cluster {
    services(&[protocol], |domain| vec![(service_address(domain), endpoints(domain))])
}

/// A sandbox with an agent, and in each family two servers and a service with both as endpoints.
fn with_services(protocol: Protocol, test: impl FnOnce(&mut Agent, &Cluster) + Send) {
    Sandbox::test(|sandbox| {
        let cluster = with_endpoints(protocol, |domain| endpoints(domain).to_vec());
        let _servers = servers_of(&cluster);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster);
        test(&mut agent, &cluster);
    });
}

/// A program that sends several datagrams of one flow expects the same server to receive them, until that
/// server is no longer an endpoint.
#[test]
fn the_datagrams_of_a_socket_stay_together() {
    with_services(Udp, |agent, cluster| {
        for domain in Domain::ALL {
            let service = service_address(domain);
            let socket = Socket::new(domain, Udp);
            let first = socket.ask_at(service).unwrap();
            for _ in 0..32 {
                assert_eq!(socket.ask_at(service).unwrap(), first);
            }
            let is_other = |endpoint: &SocketAddr| *endpoint != first.server;
            agent.follow(&with_endpoints(Udp, |of| endpoints(of).into_iter().filter(is_other).collect()));
            let moved = socket.ask_at(service).unwrap();
            let other = endpoints(domain).into_iter().find(is_other).unwrap();
            assert_eq!((moved.server, moved.seen), (other, Some(service)));
            agent.follow(cluster);
        }
    });
}

/// Protocol and port are part of a service's address.
#[test]
fn neighbours_of_a_service_address_are_not_touched() {
    for (protocol, other_protocol) in [(Tcp, Udp), (Udp, Tcp)] {
        with_services(protocol, |_agent, _cluster| {
            for domain in Domain::ALL {
                let connect = |to, protocol| Socket::new(domain, protocol).connect(to);
                let service = service_address(domain);
                let other_port = service_port(domain, 81);
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
fn a_call_from_another_cgroup_is_not_touched() {
    with_services(Tcp, |_agent, _cluster| {
        let service = service_address(Domain::V4);
        assert!(call(service, Tcp).is_ok());
        let elsewhere = ThreadCgroup::enter().unwrap();
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        drop(elsewhere);
    });
}
