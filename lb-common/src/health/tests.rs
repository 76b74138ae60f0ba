use std::vec::Vec;

use super::*;

const MS: u64 = MILLISECOND;
/// Any time after boot.
const T0: u64 = 1000 * SECOND;
const POLICY: Policy = Policy { failures: 3, base: 10, max: 25 };
const REFUSED: u32 = 111;

/// An event of a connection: what happens, in which namespace, to a SYN of which age, and when.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// Established.
    Up(u64),
    /// Refused at once.
    Refused(u64),
    /// The SYN is retransmitted: namespace and age in milliseconds.
    Again(u64, u64),
    /// A call asks, and is expected to be admitted so.
    Asks(Admission),
}
use Admission::{Ejected, Open, Trial};
use Event::{Again, Asks, Refused, Up};

/// Applies events at times in milliseconds after [`T0`].
fn after(events: &[(u64, Event)]) -> EndpointHealth {
    events.iter().fold(EndpointHealth::default(), |mut health, (at, event)| {
        let now = T0 + at * MS;
        let fail = |netns, age: u64, errno| Failure { sent_at: now - age * MS, netns, errno };
        match *event {
            Up(netns) => health.established(POLICY, netns, now),
            Refused(netns) => health.failed(POLICY, fail(netns, 0, REFUSED), now),
            Again(netns, age) => health.failed(POLICY, fail(netns, age, 0), now),
            Asks(expected) => {
                let found = health.admission(now);
                assert_eq!(found, expected, "at {at} ms of {events:?}: {health:?}");
                assert_eq!(health.is_avoided(now), u64::from(found == Ejected), "at {at} ms of {events:?}");
                if found == Trial {
                    health.tried_at = now;
                }
                health
            }
        }
    })
}

#[test]
fn refusals_in_a_row_eject() {
    let _ = after(&[(0, Refused(1)), (1, Refused(1)), (2, Asks(Open)), (3, Refused(1)), (4, Asks(Ejected))]);
    let _ = after(&[(0, Refused(1)), (1, Refused(1)), (2, Up(1)), (3, Refused(1)), (4, Asks(Open))]);
}

/// Other pods reach the endpoint: the refusals are the caller's own, for example of its egress policy.
#[test]
fn one_namespace_alone_does_not_eject_what_others_reach() {
    let refusals = [(10, Refused(1)), (11, Refused(1)), (12, Refused(1)), (13, Refused(1))];
    let of = |before: &[(u64, Event)], then: &[(u64, Event)]| after(&[before, &refusals, then].concat());
    let _ = of(&[(0, Up(2))], &[(14, Asks(Open))]);
    // Its own success is no witness: it could reach the endpoint before.
    let _ = of(&[(0, Up(1))], &[(14, Asks(Ejected))]);
    // A second namespace fails too.
    let _ = of(&[(0, Up(2))], &[(14, Refused(2)), (15, Asks(Ejected))]);
    // The witness is too old.
    let _ = of(&[(0, Up(2))], &[(1000, Refused(1)), (1001, Asks(Ejected))]);
}

#[test]
fn unanswered_syns_eject_after_a_silence() {
    let lost =
        |age| [(1000, Again(1, 1000)), (1100, Again(1, 1000)), (1900, Again(2, age)), (1901, Asks(Open))];
    let _ = after(&[&lost(1000)[..], &[(2199, Again(1, 2000)), (2200, Asks(Open))]].concat());
    let _ = after(&[&lost(1000)[..], &[(2200, Again(1, 2000)), (2201, Asks(Ejected))]].concat());
    // One connection alone: its third retransmission. Linux 6.5 sends after 1, 2 and 3 s, earlier ones after
    // 1, 3 and 7 s.
    let alone =
        [(1000, Again(1, 1000)), (2000, Again(1, 2000)), (3000, Again(1, 3000)), (3001, Asks(Ejected))];
    let _ = after(&alone);
    // A full accept queue, for two seconds.
    let full = [(1000, Again(1, 1000)), (1500, Again(2, 1000)), (2000, Again(1, 2000)), (2001, Up(1))];
    let _ = after(
        &[
            &full[..],
            &[(2010, Again(2, 1500)), (2020, Again(2, 1500)), (2500, Again(2, 2000)), (2501, Asks(Open))],
        ]
        .concat(),
    );
}

/// With 10 % random loss, a fifth of the handshakes has a retransmission.
#[test]
fn a_lost_packet_is_no_failure_while_others_get_through() {
    let mut events = Vec::new();
    for n in 0..100 {
        events.extend([(n * 100, Up(1)), (n * 100 + 50, Again(1, 1000)), (n * 100 + 60, Again(2, 1000))]);
    }
    assert_eq!(after(&events).failures, 0);
}

#[test]
fn an_ejection_ends_by_the_clock_with_one_call_on_trial() {
    let ejected = [(0, Refused(1)), (1, Refused(1)), (2, Refused(1)), (10_001, Asks(Ejected))];
    let at = |events: &[(u64, Event)]| after(&[&ejected[..], events].concat());
    let trial = [(10_002, Asks(Trial)), (10_003, Asks(Ejected))];
    let with_trial = |events: &[(u64, Event)]| at(&[&trial[..], events].concat());
    // The trial succeeds: the endpoint has its share again.
    assert_eq!(with_trial(&[(10_004, Up(2)), (10_005, Asks(Open))]).failures, 0);
    // It has no outcome, since the program gave up: another call is on trial.
    let _ = with_trial(&[(13_001, Asks(Ejected)), (13_002, Asks(Trial))]);
    // It fails: one failure is enough, and the next ejection takes longer, up to the maximum.
    let again = [(10_004, Refused(2)), (30_003, Asks(Ejected)), (30_004, Asks(Trial)), (30_005, Refused(2))];
    let health = with_trial(&again);
    assert_eq!((health.ejections, health.ejected_until), (3, T0 + (30_005 + 25_000) * MS));
    // A call from before the end of the ejection does not count, whenever it fails.
    for at in [5000, 10_003] {
        let health = after(&[&ejected[..3], &[(at, Again(1, at + 1000))]].concat());
        assert_eq!((health.failures, health.ejections), (3, 1));
    }
    // An established connection ends it at once: of a retransmitted SYN, or of a call while all are ejected.
    let _ = at(&[(10_001, Up(1)), (10_001, Asks(Open))]);
}

#[test]
fn ejections_count_from_one_again_after_a_quiet_time() {
    let twice = [
        (0, Refused(1)),
        (1, Refused(1)),
        (2, Refused(1)),
        (10_002, Asks(Trial)),
        (10_003, Refused(1)),
        (30_003, Asks(Trial)),
        (30_004, Up(1)),
    ];
    let later = |at: u64| after(&[&twice[..], &[(at, Up(1))]].concat()).ejections;
    assert_eq!([later(55_002), later(55_003)], [2, 0]);
}

#[test]
fn a_policy_survives_its_word() {
    for policy in [
        Policy::DEFAULT,
        Policy { failures: 1, base: 1, max: 1 },
        Policy { failures: Policy::MAX_FAILURES, base: Policy::MAX_SECONDS, max: Policy::MAX_SECONDS },
    ] {
        assert_eq!(Policy::from_word(policy.to_word()), Some(policy));
    }
    assert_eq!(Policy::from_word(0), None);
    assert_eq!(Policy::from_word(0xffff_ff00), None, "no failures");
}

#[test]
fn any_state_is_harmless() {
    let extremes = [0, 1, T0, u64::MAX];
    for ejected_until in extremes {
        for since in extremes {
            let health = EndpointHealth {
                ejected_until,
                tried_at: since,
                reached_at: since,
                failing_since: since,
                failures: u32::MAX,
                ejections: u32::MAX,
                latency: u32::MAX,
                ..EndpointHealth::default()
            };
            for now in extremes {
                let is_real = now <= u64::MAX / 2 && since <= now && ejected_until <= u64::MAX / 2;
                if is_real {
                    let is_ejected = health.admission(now) == Ejected;
                    assert_eq!(health.is_avoided(now), u64::from(is_ejected), "{health:?} at {now}");
                }
                for sent_at in extremes {
                    let _ = health.admission(now);
                    let _ = health.failed(POLICY, Failure { sent_at, netns: 1, errno: 0 }, now);
                    let after = health.established(POLICY, 1, now).with_latency(latency(sent_at));
                    assert_eq!(after.admission(now), Open);
                }
            }
        }
    }
}

#[test]
fn the_rest_of_an_ejection_is_rounded_up() {
    let ejected = EndpointHealth { ejected_until: T0, ..EndpointHealth::default() };
    let left = |ms: u64| ejected.ejected_seconds(T0 - ms * MS);
    assert_eq!([left(1001), left(1000), left(1), left(0)], [Some(2), Some(1), Some(1), Some(0)]);
    assert_eq!(ejected.ejected_seconds(T0 + SECOND), Some(0), "until a connection is established");
    assert_eq!(EndpointHealth::default().ejected_seconds(T0), None);
}

#[test]
fn latency_is_a_moving_average() {
    let of = |samples: &[u64]| {
        samples
            .iter()
            .fold(EndpointHealth::default(), |health, us| health.with_latency(latency(us * 1000)))
            .latency
    };
    assert_eq!(of(&[]), 0);
    assert_eq!(of(&[0]), 1, "0 is unknown");
    assert_eq!(of(&[800]), 800);
    assert_eq!(of(&[800, 1600]), 900);
    assert_eq!(of(&[u64::MAX / 1000]), 0x0fff_ffff);
}
