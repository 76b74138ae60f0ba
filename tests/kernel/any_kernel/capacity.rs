//! Large sets, and full maps.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use lb_common::limits::{MAX_ADDRS_PER_NODE, MAX_NODE_ADDRS};
use lb_core::{
    model::{IssueKind, Protocol::Tcp},
    plan::Capacity,
};
use lb_kernel::Options;
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, call},
    cluster::{self, Cluster},
    server::Servers,
};
use nix::errno::Errno;

use crate::fixture::{Web, addresses, service_address, start, with_web};

/// Loopback addresses from 127.0.0.0 + `first`, all served by one server on the unspecified address.
fn loopback_endpoints(first: u32, n: u32) -> Vec<SocketAddr> {
    let base = u32::from(Ipv4Addr::new(127, 1, 0, 0)) + first;
    (base..base + n).map(|ip| SocketAddr::new(Ipv4Addr::from(ip).into(), 8080)).collect()
}

#[test]
fn a_service_may_have_a_hundred_thousand_endpoints() {
    const N: u32 = 100_000;
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let _servers = Servers::tcp([SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 8080)]);
        let mut agent = start(&Options { capacity: Capacity::default(), ..agent::options(sandbox) });
        // The sets are disjoint; the third needs the space of the first.
        for first in [0, 2 * N, 4 * N] {
            let endpoints = loopback_endpoints(first, N);
            agent.follow(&Cluster::new().serving("large", service, Tcp, &endpoints));
            assert_eq!(agent.state.issues().count(), 0);
            let reached: BTreeSet<_> = (0..300).map(|_| call(service, Tcp).unwrap()).collect();
            assert!(reached.iter().all(|server| endpoints.binary_search(server).is_ok()));
            // Of 300 numbers below 100,000, fewer than one in two hundred equals another on average.
            assert!(reached.len() > 280, "only {} endpoints answered", reached.len());
            agent.settle();
        }
    });
}

#[test]
fn services_that_do_not_fit_do_not_disturb_the_others() {
    Sandbox::test(|sandbox| {
        let [server] = addresses(Domain::V4, 8001);
        let _servers = Servers::tcp([server]);
        let capacity = Capacity { services: 4, endpoints: 64 };
        let mut agent = start(&Options { capacity, ..agent::options(sandbox) });
        let address = |n: u8| SocketAddr::new(IpAddr::from([10, 96, 0, n]), 80);
        let with = |numbers: std::ops::RangeInclusive<u8>| {
            numbers.fold(Cluster::new(), |all, n| all.serving(&format!("s{n}"), address(n), Tcp, &[server]))
        };
        let reached = || -> Vec<u8> { (1..=8).filter(|n| call(address(*n), Tcp) == Ok(server)).collect() };
        let untouched = || (1..=8).filter(|n| call(address(*n), Tcp) == Err(Errno::ENETUNREACH)).count();

        agent.follow(&with(1..=6));
        assert_eq!(reached(), [1, 2, 3, 4]);
        assert_eq!(untouched(), 4);
        let full =
            agent.state.issues().filter(|issue| matches!(issue.kind, IssueKind::ServicesFull { .. })).count();
        assert_eq!(full, 2);

        // Two are deleted. Their entries are free after a grace period, and waiting ones get them.
        agent.follow(&with(3..=6));
        agent.settle();
        agent.sync();
        assert_eq!(reached(), [3, 4, 5, 6]);
        assert_eq!(agent.state.issues().count(), 0);
    });
}

#[test]
fn endpoints_that_do_not_fit_leave_the_service_as_it_was() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let _servers = Servers::tcp([SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 8080)]);
        let capacity = Capacity { services: 4, endpoints: 8 };
        let mut agent = start(&Options { capacity, ..agent::options(sandbox) });
        let with = |endpoints: &[SocketAddr]| Cluster::new().serving("web", service, Tcp, endpoints);
        let [small, large, medium] =
            [(0, 3), (10, 9), (20, 5)].map(|(first, n)| loopback_endpoints(first, n));
        agent.follow(&with(&small));
        agent.follow(&with(&large));
        assert!(small.contains(&call(service, Tcp).unwrap()));
        let issues: Vec<_> = agent.state.issues().collect();
        assert!(
            matches!(&issues[..], [issue] if matches!(issue.kind, IssueKind::EndpointsFull { .. })),
            "{issues:?}"
        );
        agent.follow(&with(&medium));
        assert!(medium.contains(&call(service, Tcp).unwrap()));
    });
}

/// Whatever Nodes list, each has its share of the map, and services are served.
#[test]
fn too_many_node_addresses_cost_no_service() {
    with_web(2, |sandbox, Web { service, endpoints: servers, .. }| {
        let mut agent = Agent::start(sandbox);
        let base = u32::from(Ipv4Addr::new(10, 200, 0, 0));
        let node = |name: &str, first: u32, n: u32| {
            let first = base + first;
            let addresses: Vec<IpAddr> = (first..first + n).map(|ip| Ipv4Addr::from(ip).into()).collect();
            cluster::node(name, &addresses)
        };
        let mut cluster = Cluster::new().serving("web", *service, Tcp, &servers[..1]);
        cluster.set(node("hostile", 0, MAX_NODE_ADDRS + 1));
        let issues = cluster.feed(&mut agent.state);
        assert!(
            matches!(&issues[..], [issue] if matches!(issue.kind, IssueKind::TooManyAddresses { .. })),
            "{issues:?}"
        );
        agent.sync();
        assert_eq!(agent.image().node_addrs.len(), MAX_ADDRS_PER_NODE);
        assert_eq!(call(*service, Tcp), Ok(servers[0]));

        // Many Nodes that list the maximum. Some addresses replace others and wait for space.
        let n_each = u32::try_from(MAX_ADDRS_PER_NODE).unwrap();
        for (n, server) in [(MAX_NODE_ADDRS / n_each, servers[1]), (MAX_NODE_ADDRS / n_each + 8, servers[0])]
        {
            (0..n).for_each(|n| cluster.set(node(&format!("node-{n}"), n * n_each, n_each)));
            cluster.serve("web", *service, Tcp, &[server]);
            cluster.feed(&mut agent.state);
            while agent.state.needs_sync() {
                agent.sync();
                agent.settle();
                assert_eq!(call(*service, Tcp), Ok(server));
            }
            assert_eq!(agent.state.n_refused(), 0);
            assert_eq!(agent.image(), *agent.state.image());
        }
        assert_eq!(agent.image().node_addrs.len(), MAX_NODE_ADDRS as usize);
        let left_out = agent.state.issues().filter(|issue| matches!(issue.kind, IssueKind::NodesFull { .. }));
        assert!(left_out.count() >= 8);
    });
}
