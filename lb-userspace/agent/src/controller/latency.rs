//! How long changes take to reach the kernel.

use std::time::{Duration, Instant, SystemTime};

use crate::source::Arrival;

/// Number of buckets of a [`Histogram`]: from 1/16 ms, doubling, to half an hour.
pub const N_BUCKETS: usize = 26;
const FIRST: Duration = Duration::from_nanos(62_500);

/// Counts of durations in buckets whose bounds double.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; N_BUCKETS],
    n_values: u64,
    sum: Duration,
}

impl Histogram {
    /// The inclusive upper bound of a bucket. The last bucket also holds longer durations.
    #[must_use]
    pub fn bound(index: usize) -> Duration {
        FIRST * (1 << index.min(N_BUCKETS - 1))
    }

    /// Counts a duration.
    pub fn record(&mut self, value: Duration) {
        let index = (0..N_BUCKETS - 1).find(|index| value <= Self::bound(*index)).unwrap_or(N_BUCKETS - 1);
        self.counts[index] += 1;
        self.n_values += 1;
        self.sum = self.sum.saturating_add(value);
    }

    /// Number of durations in each bucket; not cumulative.
    #[must_use]
    pub const fn counts(&self) -> &[u64; N_BUCKETS] {
        &self.counts
    }

    /// Number of durations.
    #[must_use]
    pub const fn n_values(&self) -> u64 {
        self.n_values
    }

    /// Sum of the durations.
    #[must_use]
    pub const fn sum(&self) -> Duration {
        self.sum
    }

    /// An upper bound of this percentile, at most twice the true value; `None` without durations.
    #[must_use]
    pub fn quantile(&self, percent: u8) -> Option<Duration> {
        let wanted = (self.n_values * u64::from(percent.min(100))).div_ceil(100).max(1);
        let mut n_so_far = 0;
        (0..N_BUCKETS).find_map(|index| {
            n_so_far += self.counts[index];
            (n_so_far >= wanted).then(|| Self::bound(index))
        })
    }
}

/// Times from a change until the kernel's tables follow it. First lists and re-lists do not count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// From the arrival of the event.
    pub received: Histogram,
    /// From the change in the cluster, by the cluster's clock: Kubernetes' network programming latency. It is
    /// wrong by the difference of the clocks; a time in the future counts as now.
    pub triggered: Histogram,
    /// The first [`MAX_TIMED`] changes that wait for a sync.
    waiting: Vec<Arrival>,
    /// Number of further changes that wait.
    n_untimed: usize,
}

/// Maximum number of changes timed per sync. It bounds memory while syncs fail.
pub const MAX_TIMED: usize = 16_384;

impl Latency {
    /// Adds changes for the next sync. Beyond [`MAX_TIMED`] they are only counted: the earliest wait longest.
    pub fn arrived(&mut self, mut arrivals: Vec<Arrival>) {
        let n_timed = arrivals.len().min(MAX_TIMED - self.waiting.len());
        self.n_untimed += arrivals.drain(n_timed..).len();
        self.waiting.extend(arrivals);
    }

    /// Number of changes that wait for a sync.
    #[must_use]
    pub fn n_waiting(&self) -> usize {
        self.waiting.len() + self.n_untimed
    }

    /// A sync has carried out all of them. Returns how many, and the longest time since an arrival. `note`
    /// gets, for each timed change, the time since it arrived, and the time since its trigger, if known.
    pub fn applied(
        &mut self,
        now: Instant,
        clock: SystemTime,
        mut note: impl FnMut(Duration, Option<Duration>),
    ) -> (usize, Duration) {
        let n_changes = self.n_waiting();
        self.n_untimed = 0;
        let mut longest = Duration::ZERO;
        for arrival in self.waiting.drain(..) {
            let took = now.saturating_duration_since(arrival.received);
            longest = longest.max(took);
            self.received.record(took);
            let since_trigger =
                arrival.triggered.map(|triggered| clock.duration_since(triggered).unwrap_or_default());
            if let Some(since_trigger) = since_trigger {
                self.triggered.record(since_trigger);
            }
            note(took, since_trigger);
        }
        (n_changes, longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double() {
        assert_eq!(Histogram::bound(0), Duration::from_nanos(62_500));
        assert_eq!(Histogram::bound(4), Duration::from_millis(1));
        assert!(Histogram::bound(N_BUCKETS - 1) > Duration::from_secs(1800));
    }

    #[test]
    fn quantiles_are_bounds() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(50), None);
        for _ in 0..99 {
            histogram.record(Duration::from_micros(900));
        }
        histogram.record(Duration::from_secs(1));
        assert_eq!(histogram.quantile(50), Some(Duration::from_millis(1)));
        assert_eq!(histogram.quantile(99), Some(Duration::from_millis(1)));
        assert_eq!(histogram.quantile(100), Some(Duration::from_millis(1024)));
        assert_eq!((histogram.n_values(), histogram.sum()), (100, Duration::from_micros(1_089_100)));
        histogram.record(Duration::MAX);
        assert_eq!(histogram.counts()[N_BUCKETS - 1], 1);
    }

    #[test]
    fn a_change_counts_when_it_is_carried_out() {
        let (now, clock) = (Instant::now(), SystemTime::now());
        let mut latency = Latency::default();
        let ms = Duration::from_millis;
        let arrival = |triggered| Arrival { received: now, triggered };
        let in_the_future = Some(clock + ms(9_000));
        latency.arrived(vec![arrival(Some(clock - ms(30))), arrival(None), arrival(in_the_future)]);
        assert_eq!(latency.n_waiting(), 3);
        let mut noted = Vec::new();
        let note = |since_arrival, since_trigger| noted.push((since_arrival, since_trigger));
        assert_eq!(latency.applied(now + ms(4), clock + ms(4), note), (3, ms(4)));
        assert_eq!(noted, [(ms(4), Some(ms(34))), (ms(4), None), (ms(4), Some(ms(0)))]);
        assert_eq!((latency.received.n_values(), latency.triggered.n_values()), (3, 2));
        assert_eq!(latency.triggered.sum(), ms(34));
        assert_eq!(latency.n_waiting(), 0);
        assert_eq!(latency.applied(now, clock, |_, _| panic!("nothing waits")).0, 0);
    }
    #[test]
    fn changes_that_wait_for_long_take_no_more_memory() {
        let (now, clock) = (Instant::now(), SystemTime::now());
        let mut latency = Latency::default();
        for n in 0..100 {
            let received = now + Duration::from_millis(n);
            latency.arrived(vec![Arrival { received, triggered: None }; 1000]);
            assert!(latency.waiting.len() <= MAX_TIMED);
        }
        assert_eq!(latency.n_waiting(), 100_000);
        let mut n_noted = 0;
        let ended = latency.applied(now + Duration::from_secs(1), clock, |_, _| n_noted += 1);
        assert_eq!((ended, n_noted), ((100_000, Duration::from_secs(1)), MAX_TIMED));
        assert_eq!(latency.n_waiting(), 0);
    }
}
