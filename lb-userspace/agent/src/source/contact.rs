//! Last answers and outages of a source.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A time in which a source does not answer, or refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// When it began.
    pub since: Instant,
    /// The problem: the source, and the result of the last attempt.
    pub problem: Arc<str>,
}

#[derive(Clone, Debug, Default)]
struct Kind {
    answered: Option<Instant>,
    /// The failure since the last answer.
    problem: Option<Arc<str>>,
}

#[derive(Debug)]
struct Known {
    started: Instant,
    kinds: BTreeMap<&'static str, Kind>,
    failures: BTreeMap<&'static str, u64>,
    outage: Option<Outage>,
    /// The reasons logged in this outage.
    told: BTreeSet<&'static str>,
    n_absences: u64,
}

/// When a source last answered, by kind of objects, and why it does not. Clones share the state.
///
/// An outage begins when the first kind fails, and ends when all kinds are answered.
#[derive(Clone, Debug)]
pub struct Contact(Arc<Mutex<Known>>);

impl Contact {
    /// Starts without an answer of these kinds. Failures of these reasons count from 0.
    #[must_use]
    pub fn new(
        kinds: impl IntoIterator<Item = &'static str>,
        reasons: impl IntoIterator<Item = &'static str>,
        now: Instant,
    ) -> Self {
        Self(Arc::new(Mutex::new(Known {
            started: now,
            kinds: kinds.into_iter().map(|kind| (kind, Kind::default())).collect(),
            failures: reasons.into_iter().map(|reason| (reason, 0)).collect(),
            outage: None,
            told: BTreeSet::new(),
            n_absences: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // A panic leaves no change half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an answer. Returns the duration of the outage that it ends.
    #[must_use]
    pub fn answered(&self, kind: &'static str, now: Instant) -> Option<Duration> {
        let mut known = self.lock();
        *known.kinds.entry(kind).or_default() = Kind { answered: Some(now), problem: None };
        let problem = known.kinds.values().find_map(|kind| kind.problem.clone());
        if let Some(problem) = problem {
            if let Some(outage) = &mut known.outage {
                outage.problem = problem;
            }
            return None;
        }
        known.told.clear();
        known.outage.take().map(|outage| now.saturating_duration_since(outage.since))
    }

    /// Records a failure since a time. `true` for the first failure of this reason in an outage.
    #[must_use]
    pub fn failed(&self, kind: &'static str, reason: &'static str, problem: &str, since: Instant) -> bool {
        let mut known = self.lock();
        *known.failures.entry(reason).or_default() += 1;
        let problem = Arc::<str>::from(problem);
        known.kinds.entry(kind).or_default().problem = Some(Arc::clone(&problem));
        let since = known.outage.as_ref().map_or(since, |outage| outage.since.min(since));
        known.outage = Some(Outage { since, problem });
        known.told.insert(reason)
    }

    /// Records that the source was unreachable or silent.
    pub fn absent(&self) {
        self.lock().n_absences += 1;
    }

    /// How often it was, for any kind.
    #[must_use]
    pub fn n_absences(&self) -> u64 {
        self.lock().n_absences
    }

    /// Stops tracking a kind that is no longer requested continuously, so that its age means nothing.
    pub fn forget(&self, kind: &'static str) {
        self.lock().kinds.remove(kind);
    }

    /// Counts a failure that is no outage: a broken connection, an expired version.
    pub fn broke(&self, reason: &'static str) {
        *self.lock().failures.entry(reason).or_default() += 1;
    }

    /// When a kind was last answered.
    #[must_use]
    pub fn last_answer(&self, kind: &str) -> Option<Instant> {
        self.lock().kinds.get(kind)?.answered
    }

    /// The current outage.
    #[must_use]
    pub fn outage(&self) -> Option<Outage> {
        self.lock().outage.clone()
    }

    /// The time since each kind's last answer, or since the start if there is none.
    #[must_use]
    pub fn ages(&self, now: Instant) -> Vec<(&'static str, Duration)> {
        let known = self.lock();
        let age = |kind: &Kind| now.saturating_duration_since(kind.answered.unwrap_or(known.started));
        known.kinds.iter().map(|(name, kind)| (*name, age(kind))).collect()
    }

    /// Failures so far by reason.
    #[must_use]
    pub fn failures(&self) -> Vec<(&'static str, u64)> {
        self.lock().failures.iter().map(|(reason, n)| (*reason, *n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_begins_once_and_ends_when_all_kinds_are_answered() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let contact = Contact::new(["services", "nodes"], ["connection", "forbidden"], start);
        assert_eq!(contact.answered("services", at(1)), None);
        assert_eq!(contact.outage(), None);
        for round in 0..2 {
            // A second outage within a minute is logged like the first.
            let since = 10 + 20 * round;
            assert!(contact.failed("services", "connection", "refused", at(since)));
            assert!(!contact.failed("nodes", "connection", "refused", at(since + 1)));
            assert!(contact.failed("nodes", "forbidden", "403", at(since + 2)), "another reason is logged");
            let outage = Outage { since: at(since), problem: "403".into() };
            assert_eq!(contact.outage(), Some(outage));
            assert_eq!(contact.answered("nodes", at(since + 3)), None, "services still fail");
            assert_eq!(contact.outage().unwrap().problem, "refused".into());
            assert_eq!(contact.answered("services", at(since + 4)), Some(Duration::from_secs(4)));
            assert_eq!(contact.outage(), None);
        }
        assert_eq!(contact.failures(), [("connection", 4), ("forbidden", 2)]);
    }

    #[test]
    fn ages_count_from_the_last_answer_or_from_the_start() {
        let start = Instant::now();
        let contact = Contact::new(["services", "nodes"], ["connection"], start);
        let _began = contact.answered("nodes", start + Duration::from_secs(3));
        contact.broke("connection");
        let ages = [("nodes", Duration::from_secs(2)), ("services", Duration::from_secs(5))];
        assert_eq!(contact.ages(start + Duration::from_secs(5)), ages);
        assert_eq!(contact.failures(), [("connection", 1)]);
        assert_eq!(contact.outage(), None);
    }
}
