//! When to write the snapshot: in the background, one write at a time, within a disk budget.

use std::time::{Duration, Instant};

/// Average bytes of changes written per minute. Snapshots add half as much (`snapshot::Writer`): 1.8 MB
/// together.
const PER_MINUTE: i64 = 1_200_000;
/// Bytes of changes that may be written at once after a pause.
const BURST: i64 = 1_000_000;
/// Maximum time between a failure and its retry. The first retry follows after a second; the delay doubles.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Schedules the writes of the snapshot.
///
/// A background task writes it while changes keep arriving. It holds the objects as of the start of the
/// write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotSchedule {
    /// Whether there are changes that are neither on disk nor in the write in progress.
    is_outdated: bool,
    is_writing: bool,
    /// Bytes that may be written, as of `counted`. Negative after a large write.
    credit: i64,
    counted: Instant,
    /// Failures in a row, and the earliest time of the next try.
    n_failures: u32,
    not_before: Instant,
}

impl SnapshotSchedule {
    /// Nothing has changed yet.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self {
            is_outdated: false,
            is_writing: false,
            credit: BURST,
            counted: now,
            n_failures: 0,
            not_before: now,
        }
    }

    /// The objects or settings changed.
    pub fn changed(&mut self) {
        self.is_outdated = true;
    }

    /// Whether to write now. If `true`, call [`Self::ended`] when that has finished.
    ///
    /// `false` while a write is in progress, since two would race for the files; while the budget is used up;
    /// and for a while after a failure.
    #[must_use]
    pub fn begin(&mut self, now: Instant) -> bool {
        self.refill(now);
        now >= self.not_before && self.credit > 0 && self.begin_last()
    }

    /// As [`Self::begin`], for the last write before exit: ignores budget and delay.
    #[must_use]
    pub fn begin_last(&mut self) -> bool {
        let begins = self.is_outdated && !self.is_writing;
        if begins {
            (self.is_outdated, self.is_writing) = (false, true);
        }
        begins
    }

    /// The write has finished, with this many bytes of changes on disk. `None`: it failed and is retried.
    pub fn ended(&mut self, n_changed: Option<u64>, now: Instant) {
        self.is_writing = false;
        if let Some(n_changed) = n_changed {
            self.n_failures = 0;
            self.credit = self.credit.saturating_sub_unsigned(n_changed);
        } else {
            self.is_outdated = true;
            let pause = Duration::from_secs(1).saturating_mul(1 << self.n_failures.min(6));
            self.not_before = now + pause.min(MAX_PAUSE);
            self.n_failures += 1;
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_millis();
        let earned = i64::try_from(passed).unwrap_or(i64::MAX).saturating_mul(PER_MINUTE / 60_000);
        self.credit = self.credit.saturating_add(earned).min(BURST);
        self.counted = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Changed,
        /// A call of `begin`, and its result.
        Begin(bool),
        /// A call of `begin_last`, and its result.
        Last(bool),
        Written(u64),
        Failed,
        /// Milliseconds pass.
        Wait(u64),
    }

    #[test]
    fn every_change_is_written_in_the_end_by_one_writer_at_a_time() {
        use Step::{Begin, Changed, Failed, Last, Wait, Written};
        for (what, steps) in [
            ("nothing to write", &[Begin(false), Last(false)][..]),
            ("a change", &[Changed, Begin(true), Written(1), Begin(false)]),
            ("changes are written together", &[Changed, Changed, Begin(true), Written(1), Begin(false)]),
            ("one at a time", &[Changed, Begin(true), Begin(false), Last(false), Written(1)]),
            (
                "a change while writing",
                &[Changed, Begin(true), Changed, Begin(false), Written(1), Begin(true)],
            ),
            ("a failure", &[Changed, Begin(true), Failed, Begin(false), Wait(1000), Begin(true), Written(1)]),
            ("a change and a failure", &[Changed, Begin(true), Changed, Failed, Wait(1000), Begin(true)]),
            (
                "a second failure",
                &[
                    Changed,
                    Begin(true),
                    Failed,
                    Wait(1000),
                    Begin(true),
                    Failed,
                    Wait(1999),
                    Begin(false),
                    Wait(1),
                    Begin(true),
                    Written(1),
                    Changed,
                    Begin(true),
                    Failed,
                    Wait(1000),
                    Begin(true),
                ],
            ),
            ("a failure at the end", &[Changed, Begin(true), Failed, Last(true), Written(1), Last(false)]),
            (
                "a whole burst",
                &[
                    Changed,
                    Begin(true),
                    Written(999_999),
                    Changed,
                    Begin(true),
                    Written(1),
                    Changed,
                    Begin(false),
                    Wait(1),
                    Begin(true),
                ],
            ),
            (
                "too much has to wait",
                &[
                    Changed,
                    Begin(true),
                    Written(2_200_000),
                    Changed,
                    Wait(60_000),
                    Begin(false),
                    Wait(1),
                    Begin(true),
                ],
            ),
            (
                "no credit beyond a burst",
                &[
                    Wait(3_600_000),
                    Changed,
                    Begin(true),
                    Written(1_000_000),
                    Changed,
                    Begin(false),
                    Last(true),
                ],
            ),
        ] {
            let mut now = Instant::now();
            let mut saving = SnapshotSchedule::new(now);
            for (n, step) in steps.iter().enumerate() {
                match *step {
                    Changed => saving.changed(),
                    Begin(expected) => assert_eq!(saving.begin(now), expected, "{what}: step {n}"),
                    Last(expected) => assert_eq!(saving.begin_last(), expected, "{what}: step {n}"),
                    Written(n_changed) => saving.ended(Some(n_changed), now),
                    Failed => saving.ended(None, now),
                    Wait(ms) => now += Duration::from_millis(ms),
                }
            }
        }
    }

    #[test]
    fn a_failure_for_long_is_tried_again_each_minute() {
        let mut now = Instant::now();
        let mut saving = SnapshotSchedule::new(now);
        for _ in 0..100 {
            saving.changed();
            assert!(saving.begin(now));
            saving.ended(None, now);
            now += MAX_PAUSE;
        }
    }
}
