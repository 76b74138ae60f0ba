//! `socklb explain` names exactly the endpoints that calls reach.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Mutex,
};

use aya::maps::{Array, Map, MapData};
use lb_common::{health::Admission, layout::EndpointHealth, resolve::DRAWS};
use lb_core::{
    desired::FrontendAddress,
    model::Protocol,
    sim::{Caller, Simulator},
    tables::{Entry, Image, StoredRun},
};
use lb_kernel::{Features, host};
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::call,
    netns::NetNs,
    number,
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
/// The number of random states of all endpoints in each cluster: together 10,000 destinations with ejections.
const N_STATES: usize = 33;
/// The most calls until every endpoint of a frontend is reached. One of five is missed once in 10^96 times.
const MAX_CALLS: usize = 1000;

/// The server that a call without redirection reaches: that of a loopback address without frontend.
fn reached_untouched(to: FrontendAddress) -> Option<SocketAddr> {
    let ip = if to.ip == Ipv4Addr::UNSPECIFIED { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { to.ip };
    ip.is_loopback().then_some(SocketAddr::new(ip, to.port))
}

/// States of endpoints, by id.
struct States {
    kernel: Mutex<Array<MapData, [u64; 8]>>,
    states: BTreeMap<u32, EndpointHealth>,
}

impl States {
    /// A third each is not ejected, ejected during the whole test, and due for a trial.
    fn random(sandbox: &Sandbox, image: &Image, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut state = || EndpointHealth {
            ejected_until: [0, host::monotonic() + 3600 * 1_000_000_000, 1][random.usize(..3)],
            ..EndpointHealth::default()
        };
        let ids = image.reachable();
        let states = ids.map(|entry| (entry.endpoint_id, state())).collect();
        let map = MapData::from_pin(sandbox.pin_path().join("endpoint_health")).unwrap();
        Self { kernel: Mutex::new(Map::from_map_data(map).unwrap().try_into().unwrap()), states }
    }

    /// Sets the states of a frontend's endpoints: calls change them.
    fn set(&self, entries: &[Entry]) {
        let mut kernel = self.kernel.lock().unwrap();
        for id in entries.iter().map(|entry| entry.endpoint_id) {
            kernel.set(id, [self.states[&id].ejected_until, 0, 0, 0, 0, 0, 0, 0], 0).unwrap();
        }
    }

    fn is_open(&self, entry: &Entry) -> bool {
        self.states[&entry.endpoint_id].ejected_until == 0
    }

    /// The endpoints that calls may choose: of a set, and of those that they fall back to.
    fn choices(&self, entries: &[Entry], spill: &[Entry]) -> BTreeSet<SocketAddr> {
        let now = host::monotonic();
        let is_avoided =
            |entry: &&Entry| self.states[&entry.endpoint_id].admission(now) == Admission::Ejected;
        let may_miss = |entries: &[Entry]| {
            entries.iter().filter(is_avoided).count() >= entries.len().min(DRAWS as usize)
        };
        let admitted = |entries: &[Entry]| -> Vec<SocketAddr> {
            entries.iter().filter(|entry| !is_avoided(entry)).map(Entry::address).collect()
        };
        let mut choices = admitted(entries);
        if may_miss(entries) {
            choices.extend(admitted(spill));
            if may_miss(spill) {
                choices.extend(entries.iter().map(Entry::address));
            }
        }
        choices.into_iter().collect()
    }
}

/// An explained call, and what its frontend holds.
struct Explained {
    to: FrontendAddress,
    explanation: Explanation,
    entries: Vec<Entry>,
    spill: Vec<Entry>,
    has_health: bool,
}

impl Explained {
    fn new(agent: &Agent, simulator: &Simulator, to: FrontendAddress, caller: Caller) -> Self {
        let frontend = simulator.find_frontend(to, caller).map(|(_, frontend)| frontend).unwrap_or_default();
        let run = simulator.image.stored(to.ip.to_canonical().is_ipv6(), frontend.run);
        Self {
            to,
            explanation: explain(simulator, Some(&agent.state), to, caller),
            entries: run.map(StoredRun::endpoints).unwrap_or_default().to_vec(),
            spill: run.map(StoredRun::spill).unwrap_or_default().to_vec(),
            has_health: frontend.health != 0,
        }
    }

    fn has_ejected(&self) -> bool {
        !self.explanation.ejected.is_empty()
    }
}

/// Calls until it is clear that the reached endpoints are the explained ones.
fn check(explained: &Explained, states: &States) {
    let Explained { to, explanation: explained, entries, spill, has_health } = explained;
    let call = || {
        states.set(entries);
        states.set(spill);
        call(SocketAddr::new(to.ip, to.port), to.protocol)
    };
    let named: BTreeSet<SocketAddr> = explained.candidates.iter().copied().collect();
    assert_eq!(named, entries.iter().map(Entry::address).collect(), "{explained:?}");
    let is_ejected = |entry: &&Entry| *has_health && !states.is_open(entry);
    let ejected: BTreeSet<SocketAddr> = explained.ejected.iter().map(|part| part.endpoint).collect();
    assert_eq!(ejected, entries.iter().filter(is_ejected).map(Entry::address).collect(), "{explained:?}");
    let fallback: BTreeSet<SocketAddr> = explained.spill.iter().copied().collect();
    assert_eq!(fallback, spill.iter().map(Entry::address).collect(), "{explained:?}");
    let expected = if *has_health { states.choices(entries, spill) } else { named };
    match (explained.verdict, &explained.frontend) {
        ("untouched", None) => {
            assert_eq!(call(), reached_untouched(*to).ok_or(Errno::ENETUNREACH), "{explained:?}");
        }
        ("unreachable", None) => {
            let is_old = !Features::probe().set_retval;
            let expected = if is_old {
                reached_untouched(*to).ok_or(Errno::ENETUNREACH)
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
            let next = [call(), call()];
            if ejected.contains(&first) {
                assert!(
                    next.iter().all(|next| next.is_ok_and(|next| expected.contains(&next))),
                    "{explained:?}"
                );
            } else {
                assert_eq!(next, [Ok(first), Ok(first)], "{explained:?}");
            }
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
        let (mut n_verdicts, mut n_ejected) = (BTreeMap::<&str, usize>::new(), 0);
        let n_states = number("LB_TEST_STATES", N_STATES);
        for (cluster, seed) in
            clusters.iter().flat_map(|cluster| (0..n_states).map(move |seed| (cluster, seed)))
        {
            if seed == 0 {
                cluster.feed(&mut agent.state);
                agent.settle();
                agent.sync();
            }
            let mut simulator = clusters::simulator(agent.image());
            let states = States::random(sandbox, &simulator.image, n_ejected as u64);
            simulator.now = host::monotonic();
            simulator.health = RefCell::new(states.states.clone());
            for (netns, is_node) in [(node, true), (&pod, false)] {
                let netns_cookie = netns.cookie().unwrap();
                let caller = Caller { netns: netns_cookie, on_node: is_node, earlier: None };
                let to = calls.iter().filter(|(_, on_node)| *on_node == is_node);
                let explained = to.map(|(to, _)| Explained::new(&agent, &simulator, *to, caller));
                // Other states change nothing for calls to others.
                let explained = explained.filter(|explained| seed == 0 || explained.has_ejected());
                let explained: Vec<Explained> = explained.collect();
                n_ejected += explained.iter().filter(|explained| explained.has_ejected()).count();
                if seed == 0 {
                    for Explained { explanation, .. } in &explained {
                        *n_verdicts.entry(explanation.verdict).or_default() += 1;
                    }
                }
                netns.run(|| explained.iter().for_each(|explained| check(explained, &states)));
            }
        }
        assert!(n_verdicts.values().sum::<usize>() >= N_DESTINATIONS, "{n_verdicts:?}");
        let is_often = |verdict| n_verdicts.get(verdict).is_some_and(|&n| n > N_DESTINATIONS / 50);
        assert!(
            ["untouched", "refused", "unreachable", "redirected"].into_iter().all(is_often),
            "{n_verdicts:?}"
        );
        assert!(n_ejected > n_states * N_DESTINATIONS / N_STATES, "{n_ejected}");
    });
}
