use std::collections::BTreeSet;

use lb_common::layout::{Run, frontend_flags};

use super::*;
use crate::tables::{Entry, StoredRun};

fn to(ip: &str, port: u16) -> FrontendAddress {
    FrontendAddress { ip: ip.parse().unwrap(), port, protocol: Protocol::Tcp }
}

/// Three endpoints of 10.96.0.1:80, with an idle time-out of affinity.
fn simulator(affinity_seconds: u32) -> Simulator {
    let mut image = Image::default();
    image.services.insert(to("10.96.0.1", 80), 0);
    image
        .frontends
        .insert(0, Frontend { run: Run { offset: 5, len: 3 }, affinity_seconds, ..Frontend::default() });
    let entry = |n: u8| Entry::new(n.into(), SocketAddr::from(([10, 1, 0, n], 8080)));
    image.runs4.insert(5, (1..=3).map(entry).collect());
    Simulator::new(image)
}

fn host(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Endpoint(SocketAddr::V4(address), _) => address.ip().octets()[3],
        other => panic!("{other:?}"),
    }
}

#[test]
fn random_numbers_cover_the_endpoints_evenly() {
    let simulator = simulator(0);
    let mut counts = [0u32; 4];
    for n in 0..300u32 {
        let outcome = simulator.call(to("10.96.0.1", 80), Caller::default(), n * (u32::MAX / 300), 0);
        counts[usize::from(host(outcome))] += 1;
    }
    assert!(counts[0] == 0 && counts[1..].iter().all(|n| (99..=101).contains(n)), "{counts:?}");
    let last = simulator.call(to("10.96.0.1", 80), Caller::default(), u32::MAX, 0);
    assert_eq!(host(last), 3, "the greatest number is in range");
}

#[test]
fn a_mapped_address_is_an_ipv4_call() {
    let outcome = simulator(0).call(to("::ffff:10.96.0.1", 80), Caller::default(), 0, 0);
    assert_eq!(host(outcome), 1);
}

#[test]
fn protocols_without_hooks_are_untouched() {
    let sctp = FrontendAddress { protocol: Protocol::Sctp, ..to("10.96.0.1", 80) };
    assert_eq!(simulator(0).call(sctp, Caller::default(), 0, 0), Outcome::Untouched);
}

#[test]
fn an_earlier_choice_stands_while_it_is_in_the_run() {
    let simulator = simulator(0);
    for (earlier, expected) in [
        (Choice { endpoint_id: 2, index: 1 }, 2),
        // The index is outdated, as after a change of the run.
        (Choice { endpoint_id: 3, index: 0 }, 3),
        (Choice { endpoint_id: 2, index: 7 }, 2),
        (Choice { endpoint_id: 9, index: 1 }, 1),
    ] {
        let caller = Caller { earlier: Some(earlier), ..Caller::default() };
        assert_eq!(host(simulator.call(to("10.96.0.1", 80), caller, 0, 0)), expected, "{earlier:?}");
    }
}

#[test]
fn affinity_lasts_while_the_client_calls() {
    let simulator = simulator(10);
    let at = to("10.96.0.1", 80);
    let call =
        |netns, random, now| host(simulator.call(at, Caller { netns, ..Caller::default() }, random, now));
    assert_eq!(call(1, 0, 100), 1);
    assert_eq!(call(2, u32::MAX, 100), 3, "another client");
    // Each call renews the timer.
    for now in [105, 114, 123] {
        assert_eq!(call(1, u32::MAX, now), 1);
    }
    assert_eq!(call(1, u32::MAX, 133), 3, "ten seconds are too long");
    assert_eq!(call(1, 0, 134), 3);
}

#[test]
fn affinity_ends_with_the_endpoint() {
    let mut simulator = simulator(10);
    let at = to("10.96.0.1", 80);
    assert_eq!(host(simulator.call(at, Caller::default(), 0, 100)), 1);
    let rest: BTreeSet<_> = simulator.image.runs4[&5].endpoints()[1..].iter().copied().collect();
    simulator.image.runs4.insert(8, rest.into_iter().collect());
    simulator.image.frontends.get_mut(&0).unwrap().run = Run { offset: 8, len: 2 };
    assert_eq!(host(simulator.call(at, Caller::default(), 0, 101)), 2);
    assert_eq!(host(simulator.call(at, Caller::default(), u32::MAX, 102)), 2, "the new choice stands");
}

/// One frontend with passive health, an extended run, and random numbers that cover all values.
struct Extended {
    simulator: Simulator,
}

impl Extended {
    /// Endpoint `n` is 10.1.0.n: those with shares, and those to fall back to.
    fn new(shares: &[(u8, u8)], spill: &[u8], flags: u32) -> Self {
        let mut simulator = simulator(0);
        let entry = |n: u8| Entry::new(n.into(), SocketAddr::from(([10, 1, 0, n], 8080)));
        let endpoints: Vec<_> = shares.iter().map(|(n, share)| (entry(*n), *share)).collect();
        let spill: Vec<_> = spill.iter().map(|n| entry(*n)).collect();
        let run = StoredRun::extended(&endpoints, &spill);
        let frontend = Frontend { run: run.at(5), flags, health: 3, ..Frontend::default() };
        simulator.image.frontends.insert(0, frontend);
        simulator.image.runs4.insert(5, run);
        // The next run belongs to another service.
        let end = 5 + u32::try_from(simulator.image.runs4[&5].entries().len()).unwrap();
        simulator.image.runs4.insert(end, (200..210).map(entry).collect());
        Self { simulator }
    }

    fn ejected(self, endpoints: &[u8]) -> Self {
        let ejected = EndpointHealth { ejected_until: u64::MAX / 4, ..EndpointHealth::default() };
        self.simulator.health.borrow_mut().extend(endpoints.iter().map(|n| (u32::from(*n), ejected)));
        self
    }

    fn with_active(mut self, active: &[(u8, i32)]) -> Self {
        self.simulator.active = active.iter().map(|(n, active)| (u32::from(*n), *active)).collect();
        self
    }

    /// Of a hundred calls, how many reach each endpoint.
    fn percent(&self) -> Vec<(u8, u32)> {
        const N: u32 = 20_000;
        let mut counts = BTreeMap::<u8, u32>::new();
        for n in 0..N {
            let random = n.wrapping_mul(2_654_435_761);
            *counts
                .entry(host(self.simulator.call(to("10.96.0.1", 80), Caller::default(), random, 0)))
                .or_default() += 1;
        }
        counts
            .into_iter()
            .map(|(host, n)| (host, (100 * n + N / 2) / N))
            .filter(|(_, percent)| *percent > 0)
            .collect()
    }
}

fn assert_percent(what: &str, extended: &Extended, expected: &[(u8, u32)]) {
    let found = extended.percent();
    let is_close = found.len() == expected.len()
        && found.iter().zip(expected).all(|(a, b)| a.0 == b.0 && a.1.abs_diff(b.1) <= 1);
    assert!(is_close, "{what}: {found:?}, expected {expected:?}");
}

#[test]
fn calls_follow_the_shares() {
    assert_percent("ten to one", &Extended::new(&[(1, 255), (2, 26)], &[], 0), &[(1, 91), (2, 9)]);
    let many = Extended::new(&[(1, 255), (2, 51), (3, 51), (4, 51), (5, 102)], &[], 0);
    assert_percent("five", &many, &[(1, 50), (2, 10), (3, 10), (4, 10), (5, 20)]);
    assert_percent("one", &Extended::new(&[(1, 255)], &[], 0), &[(1, 100)]);
}

#[test]
fn the_calls_of_an_ejected_endpoint_go_to_the_others() {
    let weighted = |ejected: &[u8]| Extended::new(&[(1, 255), (2, 26)], &[], 0).ejected(ejected);
    assert_percent("the heavy one", &weighted(&[1]), &[(2, 100)]);
    assert_percent("the light one", &weighted(&[2]), &[(1, 100)]);
    let three = Extended::new(&[(1, 255), (2, 128), (3, 128)], &[], 0).ejected(&[1]);
    assert_percent("one of three", &three, &[(2, 50), (3, 50)]);
    let four = Extended::new(&[(1, 255), (2, 255), (3, 255), (4, 1)], &[], 0).ejected(&[1, 2, 3]);
    assert_percent("three of four", &four, &[(4, 100)]);
}

#[test]
fn calls_spill_while_all_is_ejected_that_hints_chose() {
    let local = [(1, 255), (2, 255)];
    let of = |ejected: &[u8]| Extended::new(&local, &[3, 4, 5], 0).ejected(ejected);
    assert_percent("none", &of(&[]), &[(1, 50), (2, 50)]);
    assert_percent("one", &of(&[1]), &[(2, 100)]);
    assert_percent("all local ones", &of(&[1, 2]), &[(3, 33), (4, 33), (5, 33)]);
    assert_percent("all but one", &of(&[1, 2, 3, 5]), &[(4, 100)]);
    assert_percent("all, as if none were", &of(&[1, 2, 3, 4, 5]), &[(1, 50), (2, 50)]);
    let single = |ejected: &[u8]| Extended::new(&[(1, 255)], &[2], 0).ejected(ejected);
    assert_percent("a single one", &single(&[1]), &[(2, 100)]);
    let nowhere = Extended::new(&local, &[], 0).ejected(&[1, 2]);
    assert_percent("nowhere to spill to", &nowhere, &[(1, 50), (2, 50)]);
}

#[test]
fn a_client_keeps_its_endpoint_while_calls_spill() {
    let mut extended = Extended::new(&[(1, 255)], &[2, 3, 4], 0).ejected(&[1]);
    extended.simulator.image.frontends.get_mut(&0).unwrap().affinity_seconds = 10;
    let call = |simulator: &Simulator, netns, random, now| {
        host(simulator.call(to("10.96.0.1", 80), Caller { netns, ..Caller::default() }, random, now))
    };
    let randoms = (0..50u32).map(|n| n.wrapping_mul(2_654_435_761));
    for netns in 0..20 {
        let first = call(
            &extended.simulator,
            netns,
            0x1234_5678_u32.wrapping_mul(u32::try_from(netns).unwrap()),
            100,
        );
        assert!(
            randoms.clone().all(|random| call(&extended.simulator, netns, random, 101) == first),
            "{netns}"
        );
    }
    let endpoints: BTreeSet<u8> = (0..20).map(|netns| call(&extended.simulator, netns, 7, 102)).collect();
    assert_eq!(endpoints, BTreeSet::from([2, 3, 4]), "clients are spread");
    extended.simulator.health.borrow_mut().clear();
    let recovered = (0..20).map(|netns| call(&extended.simulator, netns, 7, 121));
    assert!(recovered.eq([1; 20]), "it has recovered");
}

#[test]
fn of_four_draws_the_least_busy_one_is_chosen() {
    let of = |active: &[(u8, i32)]| {
        let endpoints: Vec<_> = active.iter().map(|(n, _)| (*n, 255)).collect();
        Extended::new(&endpoints, &[], frontend_flags::LEAST_CONNECTIONS).with_active(active)
    };
    assert_percent("equal", &of(&[(1, 0), (2, 0), (3, 0)]), &[(1, 33), (2, 33), (3, 33)]);
    assert_percent("one busy", &of(&[(1, 5), (2, 1), (3, 1)]), &[(2, 50), (3, 50)]);
    assert_percent("in steps", &of(&[(1, 5), (2, 1), (3, 0)]), &[(3, 100)]);
    assert_percent("below zero for a moment", &of(&[(1, 0), (2, -1), (3, 0)]), &[(2, 100)]);
    assert_percent(
        "the idle one is ejected",
        &of(&[(1, 5), (2, 5), (3, 0)]).ejected(&[3]),
        &[(1, 50), (2, 50)],
    );
    assert_percent("a single one", &of(&[(1, 5)]), &[(1, 100)]);
    let eight: Vec<(u8, i32)> = (1..=8).map(|n| (n, if n == 1 { 0 } else { 9 })).collect();
    let percent = of(&eight).percent();
    assert_eq!(percent[0], (1, 50), "half of the draws meet the idle one: {percent:?}");
}
