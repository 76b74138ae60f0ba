//! Every kind of socket with every kind of destination, in every family, with either home of records.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::api::core::v1::Service;
use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_kernel::Features;
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Answer, Domain, Socket},
    cluster::{self, Cluster, PortOf},
};
use nix::errno::Errno;

use crate::fixture::{FAMILIES, addresses, in_each_mode, servers_of, services};

const NODE_PORT: u16 = 30080;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `connect()` on a fresh socket.
    Connects(Protocol),
    /// `sendto()` on a fresh socket.
    Sends,
    /// `connect()` on a datagram socket that is connected to another service.
    Reconnects,
    /// A call with a socket that was connected to another service and then disconnected: TCP connects, UDP
    /// sends.
    Disconnected(Protocol),
}

impl Way {
    const ALL: [Self; 6] = [
        Self::Connects(Tcp),
        Self::Connects(Udp),
        Self::Sends,
        Self::Reconnects,
        Self::Disconnected(Tcp),
        Self::Disconnected(Udp),
    ];

    const fn protocol(self) -> Protocol {
        match self {
            Self::Connects(protocol) | Self::Disconnected(protocol) => protocol,
            Self::Sends | Self::Reconnects => Udp,
        }
    }

    const fn is_connected(self) -> bool {
        !matches!(self, Self::Sends | Self::Disconnected(Udp))
    }

    /// Calls, and checks the socket's peer before and after the answer.
    fn call(self, domain: Domain, to: SocketAddr) -> Result<Answer, Errno> {
        let socket = Socket::new(domain, self.protocol());
        if matches!(self, Self::Reconnects | Self::Disconnected(_)) {
            let before = Destination::Other.address(domain);
            socket.connect(before)?;
            assert_eq!((socket.ask()?.server, socket.peer_name()), (other_endpoint(domain), Ok(before)));
        }
        if let Self::Disconnected(_) = self {
            socket.disconnect()?;
            assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
        }
        if !self.is_connected() {
            let answer = socket.ask_at(to)?;
            assert_eq!((answer.seen, socket.peer_name()), (Some(to), Err(Errno::ENOTCONN)));
            return Ok(answer);
        }
        socket.connect(to)?;
        if socket.peer_name() == Err(Errno::ENOTCONN) {
            // A refusal before kernel 5.18: connected to port 0, which is no peer.
            return socket.ask();
        }
        assert_eq!(socket.peer_name(), Ok(to), "before the first byte");
        let answer = socket.ask()?;
        assert!(answer.seen.is_none_or(|seen| seen == to), "{answer:?}");
        assert_eq!(socket.peer_name(), Ok(to));
        Ok(answer)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    /// A cluster IP with two endpoints.
    Service,
    /// A server that is not a service.
    Server,
    /// A cluster IP without endpoints.
    Empty,
    /// A cluster IP with two endpoints and session affinity.
    Sticky,
    /// A node port on an address of this node.
    OwnNode,
    /// A node port on an address of another node.
    OtherNode,
    /// A node port on loopback.
    Loopback,
    /// The service that a socket called before.
    Other,
}

impl Destination {
    const ALL: [Self; 7] = [
        Self::Service,
        Self::Server,
        Self::Empty,
        Self::Sticky,
        Self::OwnNode,
        Self::OtherNode,
        Self::Loopback,
    ];

    fn address(self, domain: Domain) -> SocketAddr {
        let is_v6 = domain == Domain::V6;
        let cluster_ip = |host: u8| -> IpAddr {
            let text = if is_v6 { format!("fd00:96::{host}") } else { format!("10.96.0.{host}") };
            text.parse().unwrap()
        };
        match self {
            Self::Service => SocketAddr::new(cluster_ip(1), 80),
            Self::Empty => SocketAddr::new(cluster_ip(2), 80),
            Self::Sticky => SocketAddr::new(cluster_ip(3), 80),
            Self::Other => SocketAddr::new(cluster_ip(4), 80),
            Self::Server => addresses::<1>(domain, 8010)[0],
            Self::OwnNode => SocketAddr::new(node_addresses(1)[usize::from(is_v6)], NODE_PORT),
            Self::OtherNode => SocketAddr::new(node_addresses(2)[usize::from(is_v6)], NODE_PORT),
            Self::Loopback => SocketAddr::new(domain.loopback(), NODE_PORT),
        }
    }
}

fn node_addresses(host: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 0, 0, host]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, host.into()])]
}

fn endpoints(domain: Domain) -> [SocketAddr; 2] {
    addresses(domain, 8001)
}

fn other_endpoint(domain: Domain) -> SocketAddr {
    addresses::<1>(domain, 8005)[0]
}

/// All objects, in both families and for both protocols. The plain servers are endpoints of no Service.
fn objects() -> Cluster {
    let mut cluster = services(&[Tcp, Udp], |domain| {
        vec![
            (Destination::Service.address(domain), endpoints(domain).to_vec()),
            (Destination::Empty.address(domain), vec![]),
            (Destination::Other.address(domain), vec![other_endpoint(domain)]),
        ]
    });
    cluster.set(cluster::node("node", &node_addresses(1)));
    cluster.set(cluster::node("other", &node_addresses(2)));
    for protocol in [Tcp, Udp] {
        let plain = PortOf { service: "plain", name: "", protocol };
        cluster.set_endpoints(&plain, &FAMILIES.map(|domain| Destination::Server.address(domain)));
        for domain in FAMILIES {
            let mut special = |what: &str, number, change: &dyn Fn(Service) -> Service| {
                let name = format!("{what}-{domain:?}-{protocol}").to_lowercase();
                let ip = Destination::Sticky.address(domain).ip();
                cluster.set(change(cluster::service(&name, &[ip], &[cluster::port("", protocol, number)])));
                cluster.set_endpoints(&PortOf { service: &name, name: "", protocol }, &endpoints(domain));
            };
            special("sticky", 80, &|service| cluster::with_affinity(service, Some(10_800)));
            special("node-port", 81, &|service| cluster::with_node_port(service, NODE_PORT));
        }
    }
    cluster
}

/// Calls until every endpoint has answered. Fails if one does not, or another server does.
fn assert_spread(endpoints: &[SocketAddr], mut call: impl FnMut() -> SocketAddr) {
    let wanted: BTreeSet<_> = endpoints.iter().copied().collect();
    let mut reached = BTreeSet::new();
    // With two endpoints, 64 calls miss one of them once in 2^63 runs.
    for _ in 0..64 * endpoints.len() {
        reached.insert(call());
    }
    assert_eq!(reached, wanted);
}

/// Whether an outcome is the expected refusal.
fn is_refusal(way: Way, outcome: &Result<Answer, Errno>, features: Features) -> bool {
    match outcome {
        Err(Errno::ECONNREFUSED) => true,
        // Before kernel 5.18 programs cannot choose the error of a datagram.
        Err(Errno::EINVAL) => !features.set_retval && way.protocol() == Udp,
        _ => false,
    }
}

#[test]
fn every_way_to_every_destination() {
    Sandbox::test(|sandbox| {
        // The other node's address is local too, so that a call that passes is detected by its answer.
        sandbox.own([node_addresses(1), node_addresses(2)].concat());
        let cluster = objects();
        let _servers = servers_of(&cluster);
        in_each_mode(sandbox, |options| {
            let interfaces = node_addresses(1).to_vec();
            let mut agent = Agent::start_with(options, agent::settings(), interfaces).unwrap();
            agent.follow(&cluster);
            for domain in Domain::ALL {
                for destination in Destination::ALL {
                    let to = destination.address(domain);
                    let mut sticky = [None; 2];
                    for way in Way::ALL {
                        let place = format!("{domain:?}, {way:?}, {destination:?}, {:?}", options.features);
                        let call = || way.call(domain, to).unwrap_or_else(|errno| panic!("{place}: {errno}"));
                        // Before kernel 5.14 the agent cannot distinguish its network namespace from the
                        // initial one. The sandbox is not the initial one, so, as in a pod, loopback is not
                        // the node's, and nothing listens there.
                        let is_pod = options.node_netns.is_none();
                        match destination {
                            // A socket without a peer gets no error.
                            Destination::Loopback if is_pod && !way.is_connected() => {}
                            Destination::Loopback if is_pod => {
                                let refused = way.call(domain, to).map(|answer| answer.server);
                                assert_eq!(refused, Err(Errno::ECONNREFUSED), "{place}");
                            }
                            Destination::Empty => {
                                let outcome = way.call(domain, to);
                                assert!(is_refusal(way, &outcome, options.features), "{place}: {outcome:?}");
                            }
                            Destination::Server => assert_eq!(call().server, to, "{place}"),
                            Destination::Sticky => {
                                // All sockets of this namespace are one client.
                                let kept = &mut sticky[usize::from(way.protocol() == Tcp)];
                                for _ in 0..16 {
                                    let server = call().server;
                                    assert_eq!(*kept.get_or_insert(server), server, "{place}");
                                }
                                assert!(
                                    kept.is_some_and(|server| endpoints(domain).contains(&server)),
                                    "{place}"
                                );
                            }
                            _ => assert_spread(&endpoints(domain), || call().server),
                        }
                    }
                }
            }
        });
    });
}
