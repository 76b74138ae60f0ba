use serde_json::json;

use super::*;
use crate::model::fixture;

/// A Service with the annotation, its slow starts and the time, in milliseconds since the first computation.
struct Fixture {
    slow_start: SlowStart,
    service: Service,
    start: Instant,
}

fn fixture(window: Option<&str>) -> Fixture {
    let service = fixture::service(&json!({"metadata": {"annotations": {"socklb.io/slow-start": window}}}));
    Fixture { slow_start: SlowStart::default(), service, start: Instant::now() }
}

fn endpoint(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 1, 0, last], 8080))
}

impl Fixture {
    fn advance(&mut self, now: u64) -> bool {
        !self.slow_start.advance(self.start + Duration::from_millis(now)).is_empty()
    }

    /// The weights at a time, in percent of the first endpoint's, rounded down.
    fn weights(&mut self, now: u64, endpoints: &[u8]) -> Vec<u64> {
        self.advance(now);
        self.slow_start.compute(&self.service, |ramp| {
            ramp.note(endpoints.iter().map(|last| endpoint(*last)));
            let weights = endpoints.iter().map(|last| ramp.weigh(&endpoint(*last), 100));
            weights.map(|weight| weight * 100 / ramp.weigh(&endpoint(endpoints[0]), 100)).collect()
        })
    }

    fn due(&self) -> Option<u64> {
        self.slow_start.next_due().map(|due| milliseconds(due - self.start))
    }
}

#[test]
fn the_weight_of_a_new_endpoint_grows_from_a_tenth_in_sixteen_steps() {
    let mut web = fixture(Some("32s"));
    assert_eq!((web.weights(0, &[1]), web.due()), (vec![100], None));
    for (now, weight, due) in [
        (10_000, 10, Some(12_000)),
        (11_999, 10, Some(12_999)),
        (12_000, 15, Some(14_000)),
        (13_999, 15, Some(14_999)),
        (26_000, 55, Some(28_000)),
        (41_999, 94, Some(42_999)),
        (42_000, 100, None),
        (99_000, 100, None),
    ] {
        assert_eq!(web.weights(now, &[1, 2]), [100, weight], "at {now}");
        assert_eq!(web.due(), due, "at {now}");
    }
}

#[test]
fn each_step_takes_a_second_at_least() {
    for (window, steps) in [("1s", &[1000][..]), ("3s", &[1000, 2000, 3000]), ("32s", &[2000, 4000, 6000])] {
        let mut web = fixture(Some(window));
        web.weights(0, &[1]);
        web.weights(0, &[1, 2]);
        for due in steps {
            assert_eq!(web.due(), Some(*due), "{window}");
            assert!(!web.advance(due - 1) && web.due() == Some(*due), "{window}");
            assert!(web.advance(*due) && web.due().is_none(), "{window}: due once");
            web.weights(*due, &[1, 2]);
        }
    }
    // Two endpoints whose steps are a tenth of a second apart are computed together.
    let mut web = fixture(Some("10s"));
    web.weights(0, &[1]);
    web.weights(0, &[1, 2]);
    web.weights(900, &[1, 2, 3]);
    assert_eq!(web.due(), Some(1_900));
    assert_eq!(web.weights(1_900, &[1, 2, 3]), [100, 19, 19]);
}

/// What the agent finds when it starts, or when the annotation is set, is not new.
#[test]
fn only_endpoints_that_are_added_are_new() {
    let (mut web, none) = (fixture(Some("30s")), fixture(None).service);
    let annotated = web.service.clone();
    assert_eq!(web.weights(0, &[1, 2]), [100, 100]);
    assert_eq!(web.weights(1_000, &[1, 2, 3]), [100, 100, 10]);
    // It leaves and returns: new again.
    assert_eq!(web.weights(20_000, &[1, 2]), [100, 100]);
    assert_eq!(web.due(), None);
    assert_eq!(web.weights(21_000, &[1, 2, 3]), [100, 100, 10]);
    web.service = none;
    assert_eq!(web.weights(22_000, &[1, 2, 3, 4]), [100, 100, 100, 100]);
    assert_eq!(web.due(), None);
    web.service = annotated;
    assert_eq!(web.weights(23_000, &[1, 2, 3, 4]), [100, 100, 100, 100]);
    assert_eq!(web.weights(24_000, &[1, 2, 3, 4, 5]), [100, 100, 100, 100, 10]);
    web.slow_start.forget(&web.service.key.clone());
    assert_eq!(web.due(), None);
    assert_eq!(web.weights(25_000, &[1, 6]), [100, 100]);
    // All are new: they are equal.
    assert_eq!(web.weights(26_000, &[7, 8]), [100, 100]);
    assert_eq!(web.weights(41_000, &[7, 8, 9]), [100, 100, 18]);
}

/// Tools compute frontends without a clock.
#[test]
fn without_a_time_no_endpoint_is_new() {
    let mut web = fixture(Some("30s"));
    let mut compute = |endpoints: &[u8]| {
        web.slow_start.compute(&web.service, |ramp| {
            ramp.note(endpoints.iter().map(|last| endpoint(*last)));
            ramp.weigh(&endpoint(2), 100) == ramp.weigh(&endpoint(1), 100)
        })
    };
    assert!(compute(&[1]) && compute(&[1, 2]));
    assert_eq!(web.weights(0, &[1, 2]), [100, 100]);
}
