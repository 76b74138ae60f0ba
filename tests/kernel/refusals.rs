//! A service without endpoints fails at once, and the program gets the error: what [`crate::matrix`] and
//! [`crate::kinds`] do not show.

use std::net::SocketAddr;

use lb_core::model::Protocol::{Tcp, Udp};
use lb_kernel::Features;
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    require,
};
use nix::errno::Errno;

use crate::fixture::{FAMILIES, addresses, connected, servers_of, service_address, services, start};

const REFUSED: Result<(), Errno> = Err(Errno::ECONNREFUSED);

/// A sandbox with an agent and a service for both protocols in each family, all with the same endpoints.
fn with_services(features: Features, test: impl FnOnce(&mut Agent) + Send) {
    Sandbox::test(|sandbox| {
        let mut agent = start(&lb_kernel::Options { features, ..agent::options(sandbox) });
        agent.follow(&with_endpoints(&[]));
        test(&mut agent);
    });
}

/// A service for both protocols in each family, with the endpoints of its family.
fn with_endpoints(endpoints: &[SocketAddr]) -> Cluster {
    services(&[Tcp, Udp], |domain| {
        let is_of_family = |endpoint: &SocketAddr| endpoint.is_ipv6() == (domain == Domain::V6);
        vec![(service_address(domain), endpoints.iter().copied().filter(is_of_family).collect())]
    })
}

/// One server in each family.
fn endpoints() -> [SocketAddr; 2] {
    FAMILIES.map(|domain| addresses::<1>(domain, 8001)[0])
}

/// On kernels before 5.18 programs cannot choose the error, so the call goes to a port where nothing listens.
#[test]
fn without_set_retval_a_refusal_takes_another_way() {
    with_services(Features { set_retval: false, ..Features::probe() }, |_agent| {
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
    with_services(Features::probe(), |agent| {
        let cluster = with_endpoints(&endpoints());
        let _servers = servers_of(&cluster);
        agent.follow(&cluster);
        let connected = Domain::ALL.map(|domain| {
            [Tcp, Udp].map(|protocol| {
                let socket = connected(domain, protocol, service_address(domain));
                socket.ask().unwrap();
                socket
            })
        });
        agent.follow(&with_endpoints(&[]));
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
    with_services(features, |_agent| {
        for domain in Domain::ALL {
            let socket = Socket::with_protocol_number(domain, Tcp, nix::libc::IPPROTO_MPTCP).unwrap();
            assert_eq!(socket.connect(service_address(domain)), Err(Errno::EPERM), "{domain:?}");
        }
    });
}

/// A program may call another address with the refused socket.
#[test]
fn a_refused_socket_can_call_again() {
    with_services(Features::probe(), |_agent| {
        let _servers = servers_of(&with_endpoints(&endpoints()));
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
