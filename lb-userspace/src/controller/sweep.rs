//! When sockets are looked for that stay with endpoints which no longer serve, and how many of them are ended at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::{
    kernel::sockets::ServiceSocket,
    stale::{Standing, Use},
};

/// The least time between two sweeps, so that many changes in a row are one. A program whose endpoint goes while others change
/// waits for it, and is to be on its way to another within a tenth of a second.
const PAUSE: Duration = Duration::from_millis(50);
/// The time between two sweeps without a change. The next one finds what was missed: a socket that was about to connect,
/// or a program whose network namespace was not known.
const INTERVAL: Duration = Duration::from_secs(10);
/// A sweep may take a tenth of one CPU's time: after it this many times as long passes as it took.
const REST: u32 = 9;
/// The most sockets that are ended in one sweep, thus some five thousand in a second: their programs all connect anew.
pub const BATCH: usize = 256;

/// The timing of sweeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweeps {
    state: State,
    /// Whether a change came that no sweep has seen.
    is_outdated: bool,
    /// Whether some sweep has looked everywhere since the agent started.
    was_thorough: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing is in force yet.
    New,
    Waiting {
        not_before: Instant,
        until: Instant,
    },
    Running {
        since: Instant,
    },
    /// This kernel cannot do it.
    Off,
}

/// How a sweep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything that is due is done; the next is due at that time, if any is known.
    Done(Option<Instant>),
    /// There is more to do at once.
    More,
    /// It failed.
    Failed,
    /// It will always fail.
    Impossible,
}

impl Default for Sweeps {
    fn default() -> Self {
        Self { state: State::New, is_outdated: false, was_thorough: false }
    }
}

impl Sweeps {
    /// The tables follow a change. Before the first, there are no sweeps.
    pub fn changed(&mut self, now: Instant) {
        match &mut self.state {
            State::New => self.state = State::Waiting { not_before: now, until: now },
            State::Waiting { not_before, until } => *until = *not_before,
            State::Running { .. } => self.is_outdated = true,
            State::Off => {}
        }
    }

    /// When the next sweep begins; `None` while one is under way, or if there is none.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Waiting { until, .. } => Some(until),
            State::New | State::Running { .. } | State::Off => None,
        }
    }

    /// A sweep begins. Returns whether it has to look everywhere: nobody knows what went on before the agent started.
    #[must_use]
    pub fn begin(&mut self, now: Instant) -> bool {
        self.state = State::Running { since: now };
        self.is_outdated = false;
        !self.was_thorough
    }

    /// The sweep is over.
    pub fn ended(&mut self, now: Instant, end: End) {
        let State::Running { since } = self.state else { return };
        self.was_thorough |= matches!(end, End::Done(_));
        if end == End::Impossible {
            self.state = State::Off;
            return;
        }
        let rest = now.saturating_duration_since(since).saturating_mul(REST);
        let not_before = now + rest.clamp(PAUSE, INTERVAL);
        let latest = now + INTERVAL;
        let until = match end {
            _ if self.is_outdated => not_before,
            End::More => not_before,
            End::Done(next) => next.map_or(latest, |next| next.clamp(not_before, latest)),
            End::Failed | End::Impossible => latest,
        };
        self.state = State::Waiting { not_before, until };
    }
}

/// The sockets to end now, at most `limit`, with the way that each goes, and whether there are more.
///
/// `standings` has one for each way that the sockets go.
#[must_use]
pub fn due_now(
    sockets: Vec<ServiceSocket>,
    standings: &BTreeMap<Use, Standing>,
    now: Instant,
    limit: usize,
) -> (Vec<ServiceSocket>, bool) {
    let is_due = |socket: &ServiceSocket| matches!(standings.get(&way(socket)), Some(Standing::Ends { due, .. }) if *due <= now);
    let mut due: Vec<ServiceSocket> = sockets.into_iter().filter(is_due).collect();
    let has_more = due.len() > limit;
    due.truncate(limit);
    (due, has_more)
}

/// The way that a socket goes.
#[must_use]
pub fn way(socket: &ServiceSocket) -> Use {
    Use { protocol: socket.protocol(), service: socket.service, endpoint: socket.endpoint() }
}

/// The ways that sockets go.
#[must_use]
pub fn ways(sockets: &[ServiceSocket]) -> BTreeSet<Use> {
    sockets.iter().map(way).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// A change, at this second.
        Changed(u64),
        /// When the next sweep is due, in milliseconds; `None` for not at all.
        Due(Option<u64>),
        /// Begins at this second, and whether everywhere is looked.
        Begin(u64, bool),
        /// Ends at this second; without more, the next is due at the given one.
        Done(u64, Option<u64>),
        More(u64),
        Failed(u64),
        Impossible(u64),
    }

    #[test]
    fn sweeps_follow_changes_and_leave_time_in_between() {
        use Step::{Begin, Changed, Done, Due, Failed, Impossible, More};
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for (what, steps) in [
            ("nothing before the first change", &[Due(None)][..]),
            ("the first looks everywhere", &[Changed(0), Due(Some(0)), Begin(0, true), Due(None)]),
            ("then after a while", &[Changed(0), Begin(0, true), Done(0, None), Due(Some(10_000))]),
            (
                "then only where something may be stale",
                &[Changed(0), Begin(0, true), Done(0, None), Begin(10, false), Done(10, None)],
            ),
            ("after a change soon", &[Changed(0), Begin(0, true), Done(0, None), Changed(0), Due(Some(50))]),
            ("a change meanwhile", &[Changed(0), Begin(0, true), Changed(0), Done(0, None), Due(Some(50))]),
            (
                "a long one leaves time",
                &[Changed(0), Begin(0, true), Changed(0), Done(1, None), Due(Some(10_000))],
            ),
            ("the end of a drain", &[Changed(0), Begin(0, true), Done(0, Some(3)), Due(Some(3000))]),
            ("a drain that ends late", &[Changed(0), Begin(0, true), Done(0, Some(30)), Due(Some(10_000))]),
            (
                "more than one sweep ends",
                &[Changed(0), Begin(0, true), More(0), Due(Some(50)), Begin(1, true)],
            ),
            (
                "a failure is tried again",
                &[Changed(0), Begin(0, true), Failed(0), Due(Some(10_000)), Begin(10, true)],
            ),
            (
                "a kernel that cannot",
                &[Changed(0), Begin(0, true), Impossible(0), Due(None), Changed(1), Due(None)],
            ),
        ] {
            let mut sweeps = Sweeps::default();
            for (n, step) in steps.iter().enumerate() {
                match *step {
                    Changed(second) => sweeps.changed(at(second)),
                    Due(expected) => {
                        let due = sweeps.due().map(|due| due.saturating_duration_since(start));
                        assert_eq!(due, expected.map(Duration::from_millis), "{what}: step {n}");
                    }
                    Begin(second, expected) => {
                        assert_eq!(sweeps.begin(at(second)), expected, "{what}: step {n}");
                    }
                    Done(second, next) => sweeps.ended(at(second), End::Done(next.map(at))),
                    More(second) => sweeps.ended(at(second), End::More),
                    Failed(second) => sweeps.ended(at(second), End::Failed),
                    Impossible(second) => sweeps.ended(at(second), End::Impossible),
                }
            }
        }
    }
}
