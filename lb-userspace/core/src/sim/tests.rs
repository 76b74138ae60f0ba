use std::collections::BTreeSet;

use lb_common::layout::Run;

use super::*;

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
    let entry = |n: u8| Entry { endpoint_id: n.into(), address: SocketAddr::from(([10, 1, 0, n], 8080)) };
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
    let rest: BTreeSet<_> = simulator.image.runs4[&5][1..].iter().copied().collect();
    simulator.image.runs4.insert(8, rest.into_iter().collect());
    simulator.image.frontends.get_mut(&0).unwrap().run = Run { offset: 8, len: 2 };
    assert_eq!(host(simulator.call(at, Caller::default(), 0, 101)), 2);
    assert_eq!(host(simulator.call(at, Caller::default(), u32::MAX, 102)), 2, "the new choice stands");
}
