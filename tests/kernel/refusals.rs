//! A service without endpoints fails at once, and the program gets the error.

use std::net::SocketAddr;

use lb_core::model::Protocol::{Tcp, Udp};
use lb_kernel::Features;
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    require,
    server::Servers,
};
use nix::errno::Errno;

use crate::calls::{addresses, service_address};

const REFUSED: Result<(), Errno> = Err(Errno::ECONNREFUSED);

/// A sandbox with an agent and a service for both protocols in each family, all with the same endpoints.
fn with_services(
    features: Features,
    test: impl FnOnce(&dyn Fn(&mut Agent, &[SocketAddr]), &mut Agent) + Send,
) {
    Sandbox::test(|sandbox| {
        let options = lb_kernel::Options { features, ..agent::options(sandbox) };
        let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
        let follow = |agent: &mut Agent, endpoints: &[SocketAddr]| {
            let mut cluster = Cluster::new();
            for domain in [Domain::V4, Domain::V6] {
                for protocol in [Tcp, Udp] {
                    let of_family: Vec<_> = endpoints
                        .iter()
                        .copied()
                        .filter(|endpoint| endpoint.is_ipv6() == (domain == Domain::V6))
                        .collect();
                    cluster.serve(
                        &format!("{domain:?}{protocol}"),
                        service_address(domain),
                        protocol,
                        &of_family,
                    );
                }
            }
            agent.follow(&cluster);
        };
        follow(&mut agent, &[]);
        test(&follow, &mut agent);
    });
}

#[test]
fn a_service_without_endpoints_refuses() {
    let features = Features::probe();
    with_services(features, |_follow, _agent| {
        for domain in Domain::ALL {
            let service = service_address(domain);
            assert_eq!(Socket::new(domain, Tcp).connect(service), REFUSED, "{domain:?}");
            if features.set_retval {
                assert_eq!(Socket::new(domain, Udp).connect(service), REFUSED, "{domain:?}");
                assert_eq!(Socket::new(domain, Udp).send_to(b"?", service), REFUSED, "{domain:?}");
            }
        }
    });
}

/// On kernels before 5.18 programs cannot choose the error, so the call goes to a port where nothing listens.
#[test]
fn without_set_retval_a_refusal_takes_another_way() {
    with_services(Features { set_retval: false, ..Features::probe() }, |_follow, _agent| {
        for domain in Domain::ALL {
            let service = service_address(domain);
            assert_eq!(Socket::new(domain, Tcp).connect(service), REFUSED, "{domain:?}");
            // A datagram socket connects, and gets the error with its first datagram or the call after it.
            let socket = Socket::new(domain, Udp);
            let asked = socket.connect(service).and_then(|()| socket.ask());
            assert!(matches!(asked, Err(Errno::ECONNREFUSED | Errno::EINVAL)), "{domain:?}: {asked:?}");
            assert_eq!(Socket::new(domain, Udp).send_to(b"?", service), Err(Errno::EINVAL), "{domain:?}");
        }
    });
}

#[test]
fn a_refusal_ends_with_the_first_endpoint_and_returns_with_the_last() {
    with_services(Features::probe(), |follow, agent| {
        let endpoints = [addresses::<1>(Domain::V4, 8001), addresses(Domain::V6, 8001)].concat();
        let _servers =
            Servers::start(endpoints.iter().flat_map(|endpoint| [(*endpoint, Tcp), (*endpoint, Udp)]));
        follow(agent, &endpoints);
        let connected = Domain::ALL.map(|domain| {
            [Tcp, Udp].map(|protocol| {
                let socket = Socket::new(domain, protocol);
                socket.connect(service_address(domain)).unwrap();
                socket.ask().unwrap();
                socket
            })
        });
        follow(agent, &[]);
        for domain in Domain::ALL {
            assert_eq!(Socket::new(domain, Tcp).connect(service_address(domain)), REFUSED, "{domain:?}");
        }
        // Connected sockets stay connected: they no longer depend on the maps.
        for [tcp, udp] in &connected {
            tcp.send(b"still here").unwrap();
            assert_eq!(tcp.receive().unwrap().0, b"still here");
            udp.ask().unwrap();
        }
    });
}

/// A socket of the kernel, as NFS has, must not keep a changed address. The subflow of a multipath TCP socket
/// is such a socket.
#[test]
fn without_set_retval_a_refusal_leaves_the_kernels_clients_their_address() {
    if ![Feature::Programs, Feature::Multipath, Feature::SockFields].into_iter().all(require) {
        return;
    }
    let features = Features { set_retval: false, ..Features::probe() };
    with_services(features, |_follow, _agent| {
        for domain in Domain::ALL {
            let socket = Socket::with_protocol_number(domain, Tcp, nix::libc::IPPROTO_MPTCP).unwrap();
            assert_eq!(socket.connect(service_address(domain)), Err(Errno::EPERM), "{domain:?}");
        }
    });
}

/// A program may call another address with the refused socket.
#[test]
fn a_refused_socket_can_call_again() {
    with_services(Features::probe(), |_follow, _agent| {
        let servers = [addresses::<1>(Domain::V4, 8001), addresses(Domain::V6, 8001)].concat();
        let _servers = Servers::start(servers.iter().flat_map(|server| [(*server, Tcp), (*server, Udp)]));
        for domain in Domain::ALL {
            let [server] = addresses(domain, 8001);
            for protocol in [Tcp, Udp] {
                let socket = Socket::new(domain, protocol);
                let _refused_in_one_way_or_another = socket.connect(service_address(domain));
                socket.connect(server).unwrap();
                assert_eq!(socket.ask().unwrap().server, server);
                assert_eq!(socket.peer_name(), Ok(server));
            }
        }
    });
}
