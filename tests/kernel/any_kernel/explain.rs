//! `socklb explain` names exactly the endpoints that calls reach.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use lb_core::{desired::FrontendAddress, model::Protocol, sim::Caller};
use lb_kernel::Features;
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::call,
    netns::NetNs,
    server::Servers,
};
use lb_userspace::cli::explain::{Explanation, explain};
use nix::errno::Errno;
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

use crate::clusters::{self, RandomCluster, calls, cluster};

/// The number of destinations that are explained and called.
const N_DESTINATIONS: usize = 10_000;
/// The most calls until every endpoint of a frontend is reached. One of five is missed once in 10^96 times.
const MAX_CALLS: usize = 1000;

/// The server that a call without redirection reaches: that of a loopback address without frontend.
fn reached_untouched(to: FrontendAddress) -> Option<SocketAddr> {
    let ip = if to.ip == Ipv4Addr::UNSPECIFIED { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { to.ip };
    ip.is_loopback().then_some(SocketAddr::new(ip, to.port))
}

/// Calls until it is clear that the reached endpoints are the explained ones.
fn check(to: FrontendAddress, explained: &Explanation) {
    let call = || call(SocketAddr::new(to.ip, to.port), to.protocol);
    let expected: BTreeSet<SocketAddr> = explained.candidates.iter().copied().collect();
    match (explained.verdict, &explained.frontend) {
        ("untouched", None) => {
            assert_eq!(call(), reached_untouched(to).ok_or(Errno::ENETUNREACH), "{explained:?}");
        }
        ("unreachable", None) => {
            let is_old = !Features::probe().set_retval;
            let expected = if is_old {
                reached_untouched(to).ok_or(Errno::ENETUNREACH)
            } else {
                Err(Errno::EHOSTUNREACH)
            };
            assert_eq!(call(), expected, "{explained:?}");
        }
        ("refused", _) => {
            // Before kernel 5.18 a datagram socket gets another error.
            let errno = call().unwrap_err();
            let is_old = to.protocol == Protocol::Udp && !Features::probe().set_retval;
            assert!(
                errno == Errno::ECONNREFUSED || (is_old && errno == Errno::EINVAL),
                "{errno}: {explained:?}"
            );
        }
        // This client keeps its endpoint.
        ("redirected", Some(frontend)) if frontend.affinity_seconds > 0 => {
            let first = call().unwrap_or_else(|errno| panic!("{errno}: {explained:?}"));
            assert!(expected.contains(&first), "{first}: {explained:?}");
            assert_eq!((call(), call()), (Ok(first), Ok(first)), "{explained:?}");
        }
        ("redirected", Some(_)) => {
            let mut reached = BTreeSet::new();
            for _ in 0..MAX_CALLS {
                let endpoint = call().unwrap_or_else(|errno| panic!("{errno}: {explained:?}"));
                assert!(expected.contains(&endpoint), "{endpoint}: {explained:?}");
                reached.insert(endpoint);
                if reached == expected {
                    return;
                }
            }
            panic!("reached {reached:?} only: {explained:?}");
        }
        other => panic!("{other:?}: {explained:?}"),
    }
}

/// Every server of these clusters, and those at loopback addresses.
fn places(clusters: &[RandomCluster]) -> BTreeSet<SocketAddr> {
    let mut places: BTreeSet<SocketAddr> =
        calls().iter().filter_map(|(to, _)| reached_untouched(*to)).collect();
    for slice in clusters.iter().flat_map(|cluster| cluster.objects().slices.into_values()) {
        let ports = slice.ports.iter().flatten().filter_map(|port| port.port?.try_into().ok());
        for port in ports {
            let ips = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
            places.extend(ips.map(|ip| SocketAddr::new(ip.parse().unwrap(), port)));
        }
    }
    places
}

/// A network namespace with all servers.
fn populate(netns: &NetNs, places: &BTreeSet<SocketAddr>) -> Servers {
    let ips: BTreeSet<IpAddr> = places.iter().map(SocketAddr::ip).filter(|ip| !ip.is_loopback()).collect();
    for ip in ips {
        netns.add_address(ip).unwrap();
    }
    let both = |place: &SocketAddr| [(*place, Protocol::Tcp), (*place, Protocol::Udp)];
    netns.run(|| Servers::start(places.iter().flat_map(both)))
}

#[test]
fn what_is_explained_is_what_calls_reach() {
    let calls = calls();
    let mut random = TestRunner::deterministic();
    let clusters: Vec<RandomCluster> = (0..N_DESTINATIONS.div_ceil(calls.len()))
        .map(|_| cluster().new_tree(&mut random).unwrap().current())
        .collect();
    let places = places(&clusters);
    // Includes node ports on loopback addresses.
    Sandbox::test_with(&[Feature::NetnsCookie], |sandbox| {
        let (node, pod) = (sandbox.netns(), NetNs::new().unwrap());
        let _servers = [populate(node, &places), populate(&pod, &places)];
        let options = agent::options(sandbox);
        let mut agent = Agent::start_with(&options, clusters::settings(), Vec::new()).unwrap();
        let mut n_verdicts: BTreeMap<&str, usize> = BTreeMap::new();
        for cluster in &clusters {
            cluster.feed(&mut agent.state);
            agent.settle();
            agent.sync();
            let simulator = clusters::simulator(agent.image());
            for (netns, is_node) in [(node, true), (&pod, false)] {
                let netns_cookie = netns.cookie().unwrap();
                let caller = Caller { netns: netns_cookie, on_node: is_node, earlier: None };
                let explained: Vec<(FrontendAddress, Explanation)> = calls
                    .iter()
                    .filter(|(_, on_node)| *on_node == is_node)
                    .map(|(to, _)| (*to, explain(&simulator, Some(&agent.state), *to, caller)))
                    .collect();
                for (_, explained) in &explained {
                    *n_verdicts.entry(explained.verdict).or_default() += 1;
                }
                netns.run(|| explained.iter().for_each(|(to, explained)| check(*to, explained)));
            }
        }
        assert!(n_verdicts.values().sum::<usize>() >= N_DESTINATIONS, "{n_verdicts:?}");
        let is_often = |verdict| n_verdicts.get(verdict).is_some_and(|&n| n > N_DESTINATIONS / 50);
        assert!(
            ["untouched", "refused", "unreachable", "redirected"].into_iter().all(is_often),
            "{n_verdicts:?}"
        );
    });
}
