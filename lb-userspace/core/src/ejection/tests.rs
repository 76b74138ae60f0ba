use lb_common::layout::{Frontend, Run};

use super::*;
use crate::{
    desired::FrontendAddress,
    model::Protocol,
    tables::{Entry, run::StoredRun},
};

const SECOND: u64 = 1_000_000_000;

/// A service port with the endpoints 10.0.0.1 to 10.0.0.N, whose ids begin at `first`.
fn image(first: u32, n: u8, health: u32) -> Image {
    let entries = (first..).zip(1..=n);
    let entry = |(endpoint_id, last)| Entry::new(endpoint_id, ([10, 0, 0, last], 80).into());
    let mut image = Image::default();
    image.runs4.insert(0, entries.map(entry).collect());
    let frontend =
        Frontend { run: Run { offset: 0, len: n.into() }, service_id: 3, health, ..Frontend::default() };
    // Two addresses of one port.
    for (id, ip) in [(0, [10, 96, 0, 80]), (1, [192, 0, 2, 1])] {
        image.services.insert(FrontendAddress { ip: ip.into(), port: 80, protocol: Protocol::Tcp }, id);
        image.frontends.insert(id, frontend);
    }
    image
}

fn healthy() -> EndpointHealth {
    EndpointHealth { reached_at: SECOND, ..EndpointHealth::default() }
}

fn ejected(until: u64, ejections: u32) -> EndpointHealth {
    EndpointHealth { ejected_until: until, ejections, failures: 2 + ejections, errno: 111, ..healthy() }
}

/// As the changes of endpoint 10.0.0.1.
fn texts(changes: &[(Endpoint, Change)]) -> Vec<String> {
    let text = |(endpoint, change): &(Endpoint, Change)| {
        assert_eq!(*endpoint, Endpoint { service_id: 3, id: 5, address: ([10, 0, 0, 1], 80).into() });
        match change {
            Change::Restored => "restored".to_owned(),
            Change::Ejected(Ejection { until, failures, .. }) => format!("ejected {until} {failures}"),
        }
    };
    changes.iter().map(text).collect()
}

/// What scans read of an endpoint, and what each returns.
type Scans = Vec<(EndpointHealth, &'static [&'static str])>;

#[test]
fn scans_show_what_began_and_what_ended() {
    let restored = |ejections| EndpointHealth { ejections, ..healthy() };
    let reset = EndpointHealth::default;
    let cases: [(&str, Scans); 8] = [
        ("nothing happens", vec![(reset(), &[]), (healthy(), &[])]),
        (
            "an ejection, its repetition, its end",
            vec![
                (healthy(), &[]),
                (ejected(10, 1), &["ejected 10 3"]),
                (ejected(10, 1), &[]),
                (ejected(30, 2), &["ejected 30 4"]),
                (restored(2), &["restored"]),
                (restored(2), &[]),
                (ejected(90, 3), &["ejected 90 5"]),
            ],
        ),
        (
            "ejected before the first scan",
            vec![(ejected(10, 1), &["ejected 10 3"]), (restored(1), &["restored"])],
        ),
        ("restored before the first scan", vec![(restored(4), &[]), (restored(0), &[]), (restored(0), &[])]),
        (
            "between two scans",
            vec![(healthy(), &[]), (restored(1), &["ejected 0 0", "restored"]), (restored(1), &[])],
        ),
        ("again between two scans", vec![(ejected(10, 1), &["ejected 10 3"]), (restored(2), &["restored"])]),
        (
            "restored and ejected between two",
            vec![(ejected(10, 1), &["ejected 10 3"]), (ejected(70, 1), &["ejected 70 3"])],
        ),
        // The id is given out again, so its health is reset.
        (
            "reset",
            vec![(ejected(10, 1), &["ejected 10 3"]), (reset(), &[]), (ejected(90, 1), &["ejected 90 3"])],
        ),
    ];
    for (what, steps) in cases {
        let (image, mut tracker) = (image(5, 1, 1), EjectionTracker::default());
        for (n, (health, expected)) in steps.into_iter().enumerate() {
            let changes = tracker.scan(6, |id| if id == 5 { health } else { reset() }, &image, false);
            assert_eq!(texts(&changes), expected, "{what}, scan {n}");
        }
    }
}

#[test]
fn only_endpoints_of_the_image_count() {
    let (held, gone) = (image(5, 1, 1), Image::default());
    let scan = |tracker: &mut EjectionTracker, health: EndpointHealth, image: &Image| {
        texts(&tracker.scan(6, |id| if id == 5 { health } else { EndpointHealth::default() }, image, true))
    };
    let mut tracker = EjectionTracker::default();
    assert_eq!(scan(&mut tracker, ejected(10, 1), &gone), [""; 0], "an id that was freed");
    assert_eq!(scan(&mut tracker, ejected(10, 1), &image(5, 1, 0)), [""; 0], "nothing ejects it");
    assert_eq!(
        scan(&mut tracker, ejected(10, 1), &held),
        ["ejected 10 3"],
        "newer than the image of the last scan"
    );
    assert_eq!(scan(&mut tracker, ejected(30, 2), &gone), [""; 0], "an outcome of a call from before");
    // The same id for another endpoint: nothing of the former one is said of it.
    let health = EndpointHealth::default();
    assert_eq!(scan(&mut tracker, health, &held), [""; 0]);
    assert_eq!(scan(&mut tracker, ejected(50, 1), &held), ["ejected 50 3"]);
    // An id beyond those in use is read as long as it is known.
    let changes = tracker.scan(0, |_| healthy(), &held, false);
    assert_eq!(texts(&changes), ["restored"]);
}

#[test]
fn endpoints_that_calls_spill_to_count() {
    let mut image = image(5, 1, 1);
    let entry = |id, last| Entry::new(id, ([10, 0, 0, last], 80).into());
    image.runs4.insert(0, StoredRun::extended(&[(entry(4, 9), 255)], &[entry(5, 1)]));
    let health = |id| if id == 5 { ejected(10, 1) } else { EndpointHealth::default() };
    let changes = EjectionTracker::default().scan(6, health, &image, true);
    assert_eq!(texts(&changes), ["ejected 10 3"]);
    assert_eq!(n_ejected(&image, |id| id == 5), 1);
    for frontend in [0, 1] {
        image.frontends[&frontend].health = 0;
    }
    assert_eq!(n_ejected(&image, |id| id == 5), 0, "calls do not avoid it");
}

#[test]
fn a_scan_of_all_ids_that_finds_no_change() {
    let (image, mut tracker) = (image(0, 200, 1), EjectionTracker::default());
    let health: Vec<EndpointHealth> =
        (0..262_144).map(|id| if id < 100 { ejected(10, 1) } else { healthy() }).collect();
    let of = |id: u32| health.get(id as usize).copied().unwrap_or_default();
    assert_eq!(tracker.scan(262_144, of, &image, true).len(), 100);
    let start = std::time::Instant::now();
    assert_eq!(tracker.scan(262_144, of, &image, false), []);
    eprintln!("a scan of 262,144 ids without a change: {:?}", start.elapsed());
}

#[test]
fn why_an_endpoint_is_avoided() {
    let health =
        EndpointHealth { failing_since: 88 * SECOND, tried_at: 0, errno: 0, ..ejected(107 * SECOND, 1) };
    let tried = |at| EndpointHealth { tried_at: at * SECOND, ..health };
    for (what, health, now, expected) in [
        ("not ejected", healthy(), 100, None),
        (
            "ejected",
            health,
            100,
            Some("ejected for 7 s: 3 failures in a row, the last one: no answer; failing for 12 s"),
        ),
        (
            "its ejection has ended",
            health,
            107,
            Some(
                "ejected until the next call, which is on trial: 3 failures in a row, the last one: no answer; failing for 19 s",
            ),
        ),
        (
            "a call is on trial",
            tried(108),
            110,
            Some(
                "ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 22 s",
            ),
        ),
        (
            "the trial had no outcome",
            tried(108),
            111,
            Some(
                "ejected until the next call, which is on trial: 3 failures in a row, the last one: no answer; failing for 23 s",
            ),
        ),
    ] {
        assert_eq!(why_avoided(&health, now * SECOND).as_deref(), expected, "{what}");
    }
}

#[test]
fn errors_have_the_names_of_their_causes() {
    for (seconds, failures, errno, expected) in [
        (10, 3, 111, "ejected for 10 s: 3 failures in a row, the last one: connection refused"),
        (1, 1, 113, "ejected for 1 s: 1 failure: ICMP: host unreachable"),
        (
            0,
            4,
            0,
            "ejected until a call on trial is established: 4 failures in a row, the last one: no answer",
        ),
        (0, 0, 5, "ejected for a moment: error 5"),
    ] {
        assert_eq!(text(seconds, failures, errno), expected);
    }
}
