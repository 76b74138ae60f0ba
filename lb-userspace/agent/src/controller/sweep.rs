//! When to search for stale sockets, how many to destroy at a time, and which slots of closed sockets to
//! reclaim.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use lb_common::{layout::SLOT_WAYS, limits::SOCKET_SETS};
use lb_core::{
    model::Protocol,
    stale::{Fate, Flow, Flows},
};
use lb_kernel::sockets::{FoundSocket, Owners, Record};

/// Minimum time between two sweeps, which batches changes. A program whose endpoint disappears while others
/// change waits for it, and should reconnect within 100 ms.
const PAUSE: Duration = Duration::from_millis(50);
/// Time between two sweeps without a change. The next sweep finds what one missed: a socket that was about to
/// connect, or one in a network namespace that was not known.
const INTERVAL: Duration = Duration::from_secs(10);
/// A sweep may use a tenth of one CPU: this many times its duration passes before the next.
const REST: u32 = 9;
/// Maximum number of sockets to destroy in one sweep, so about 5,000 a second: all their programs reconnect.
pub const BATCH: usize = 256;

/// Minimum time between two listings of the sockets that own slots. Each lists all sockets of the host.
const LOOK: Duration = Duration::from_secs(20);
/// Owners are listed only above this number. A socket without a slot keeps its record in socket storage,
/// which costs it half a microsecond.
const MANY_OWNERS: usize = SOCKET_SETS as usize * SLOT_WAYS / 2;

/// The timing of sweeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweeps {
    state: State,
    /// Whether a change came after the current sweep began.
    is_outdated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No sync yet.
    New,
    Waiting {
        not_before: Instant,
        until: Instant,
    },
    Running {
        since: Instant,
    },
    /// The kernel lacks what it takes.
    Off,
}

/// Result of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything due is done. The next is due at this time, if known.
    Done(Option<Instant>),
    /// More sockets are due now.
    More,
    /// It failed.
    Failed,
    /// It will fail each time.
    Impossible,
}

impl Default for Sweeps {
    fn default() -> Self {
        Self { state: State::New, is_outdated: false }
    }
}

impl Sweeps {
    /// A sync has changed the tables. There are no sweeps before the first.
    pub fn changed(&mut self, now: Instant) {
        match &mut self.state {
            State::New => self.state = State::Waiting { not_before: now, until: now },
            State::Waiting { not_before, until } => *until = *not_before,
            State::Running { .. } => self.is_outdated = true,
            State::Off => {}
        }
    }

    /// When the next sweep begins; `None` while one is running, or if there are none.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Waiting { until, .. } => Some(until),
            State::New | State::Running { .. } | State::Off => None,
        }
    }

    /// Starts a sweep.
    pub fn begin(&mut self, now: Instant) {
        self.state = State::Running { since: now };
        self.is_outdated = false;
    }

    /// The sweep has finished.
    pub fn ended(&mut self, now: Instant, end: End) {
        let State::Running { since } = self.state else { return };
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

/// Which slots to reclaim because their sockets are closed. `sock_release` frees a socket's slot, unless it
/// is detached.
///
/// A slot is reclaimed when its socket is missing from two listings in a row. That would be wrong for a
/// socket in a network namespace that the listings do not reach: it would lose its record. Such sockets show
/// as owners that are missing from the start; while there are new ones, nothing is reclaimed. The same holds
/// while the hook is still detached.
#[derive(Clone, Debug, Default)]
pub struct Reclaim {
    looked: Option<(Instant, Owners)>,
}

impl Reclaim {
    /// Whether to list the sockets that own slots.
    #[must_use]
    pub fn wants_listing(&self, n_owned: usize, now: Instant) -> bool {
        let is_due = |(at, _): &(Instant, Owners)| now.saturating_duration_since(*at) >= LOOK;
        n_owned > MANY_OWNERS && self.looked.as_ref().is_none_or(is_due)
    }

    /// Takes the result of a listing. Returns the cookies whose slots to reclaim.
    #[must_use]
    pub fn looked(&mut self, owners: Owners, now: Instant) -> BTreeSet<u64> {
        let now_unlisted = owners.unlisted.clone();
        let Some((_, former)) = self.looked.replace((now, owners)) else { return BTreeSet::new() };
        let is_known = |cookie: &u64| former.unlisted.contains(cookie) || former.listed.contains(cookie);
        if !now_unlisted.iter().all(is_known) {
            return BTreeSet::new();
        }
        now_unlisted.intersection(&former.unlisted).copied().collect()
    }
}

/// How far the counted connections of each endpoint are from those that the records show.
///
/// Programs miss all sockets on kernels without slots, and elsewhere those that were closed while no program
/// was attached. Records and counts are not read at one time, so a difference counts only if two readings in
/// a row show it.
#[derive(Clone, Debug, Default)]
pub struct Recount {
    read: Option<(Instant, BTreeMap<u32, i32>)>,
}

impl Recount {
    /// Whether to compare.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.read.as_ref().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= INTERVAL)
    }

    /// Takes the open connections of each endpoint and the counted ones. Returns what to add to the latter.
    #[must_use]
    pub fn compared(
        &mut self,
        open: &BTreeMap<u32, i32>,
        counted: &BTreeMap<u32, i32>,
        now: Instant,
    ) -> BTreeMap<u32, i32> {
        let number = |of: &BTreeMap<u32, i32>, id| of.get(&id).copied().unwrap_or_default();
        let ids: BTreeSet<u32> = open.keys().chain(counted.keys()).copied().collect();
        let difference = |id: u32| number(open, id).saturating_sub(number(counted, id));
        let differences: BTreeMap<u32, i32> = ids.into_iter().map(|id| (id, difference(id))).collect();
        let (_, former) = self.read.take().unwrap_or_else(|| (now, BTreeMap::new()));
        let lasting = |(&id, &now): (&u32, &i32)| {
            let then = number(&former, id);
            let number =
                if then.signum() == now.signum() { now.signum() * then.abs().min(now.abs()) } else { 0 };
            (number != 0).then_some((id, number))
        };
        let corrections: BTreeMap<u32, i32> = differences.iter().filter_map(lasting).collect();
        let left = differences.into_iter().map(|(id, now)| (id, now - number(&corrections, id)));
        self.read = Some((now, left.collect()));
        corrections
    }
}

/// The open connections of each endpoint that the records show.
#[must_use]
pub fn open_connections(records: &[Record]) -> BTreeMap<u32, i32> {
    let mut open = BTreeMap::new();
    for record in records.iter().filter(|record| record.protocol == Protocol::Tcp) {
        *open.entry(record.endpoint_id).or_default() += 1;
    }
    open
}

/// The sockets to destroy now, at most `limit`, and whether there are more.
///
/// `standings` has one for each flow of the sockets.
#[must_use]
pub fn due_now(
    sockets: Vec<FoundSocket>,
    standings: &BTreeMap<Flow, Fate>,
    now: Instant,
    limit: usize,
) -> (Vec<FoundSocket>, bool) {
    let is_due = |socket: &FoundSocket| matches!(standings.get(&way(socket)), Some(Fate::Ends { due, .. }) if *due <= now);
    let mut due: Vec<FoundSocket> = sockets.into_iter().filter(is_due).collect();
    let has_more = due.len() > limit;
    due.truncate(limit);
    (due, has_more)
}

/// The flow of a socket.
#[must_use]
pub fn way(socket: &FoundSocket) -> Flow {
    Flow { protocol: socket.protocol(), service: socket.service, endpoint: socket.peer() }
}

/// The flows of sockets.
#[must_use]
pub fn ways(sockets: &[FoundSocket]) -> BTreeSet<Flow> {
    sockets.iter().map(way).collect()
}

/// The flows that records name, with the cookies of their sockets.
#[must_use]
pub fn used(records: &[Record]) -> Flows {
    let mut used = Flows::new();
    for &Record { cookie, protocol, service, endpoint, .. } in records {
        used.entry(Flow { protocol, service: Some(service), endpoint }).or_default().insert(cookie);
    }
    used
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
        /// Begins at this second.
        Begin(u64),
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
            ("then at once", &[Changed(0), Due(Some(0)), Begin(0), Due(None)]),
            ("then after the interval", &[Changed(0), Begin(0), Done(0, None), Due(Some(10_000))]),
            ("soon after a change", &[Changed(0), Begin(0), Done(0, None), Changed(0), Due(Some(50))]),
            ("a change meanwhile", &[Changed(0), Begin(0), Changed(0), Done(0, None), Due(Some(50))]),
            ("a long one leaves time", &[Changed(0), Begin(0), Changed(0), Done(1, None), Due(Some(10_000))]),
            ("the end of a drain", &[Changed(0), Begin(0), Done(0, Some(3)), Due(Some(3000))]),
            ("a drain that ends late", &[Changed(0), Begin(0), Done(0, Some(30)), Due(Some(10_000))]),
            ("more than one sweep destroys", &[Changed(0), Begin(0), More(0), Due(Some(50)), Begin(1)]),
            ("a failure is retried", &[Changed(0), Begin(0), Failed(0), Due(Some(10_000)), Begin(10)]),
            (
                "a kernel that lacks it",
                &[Changed(0), Begin(0), Impossible(0), Due(None), Changed(1), Due(None)],
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
                    Begin(second) => sweeps.begin(at(second)),
                    Done(second, next) => sweeps.ended(at(second), End::Done(next.map(at))),
                    More(second) => sweeps.ended(at(second), End::More),
                    Failed(second) => sweeps.ended(at(second), End::Failed),
                    Impossible(second) => sweeps.ended(at(second), End::Impossible),
                }
            }
        }
    }

    fn owners(listed: &[u64], unlisted: &[u64]) -> Owners {
        Owners { listed: listed.iter().copied().collect(), unlisted: unlisted.iter().copied().collect() }
    }

    #[test]
    fn slots_are_taken_back_whose_sockets_two_looks_miss() {
        for (what, first, second, expected) in [
            ("all are there", owners(&[1, 2], &[]), owners(&[1, 2], &[]), &[][..]),
            ("two are gone", owners(&[1], &[2, 3]), owners(&[1], &[2, 3]), &[2, 3]),
            ("one was about to be closed", owners(&[1, 2], &[3]), owners(&[1], &[2, 3]), &[3]),
            ("one was missed", owners(&[1], &[2, 3]), owners(&[1, 2], &[3]), &[3]),
            ("one gave its slot up", owners(&[1], &[2, 3]), owners(&[1], &[3]), &[3]),
            ("one came and is listed", owners(&[1], &[2]), owners(&[1, 4], &[2]), &[2]),
            ("one came that no listing reaches", owners(&[1], &[2]), owners(&[1], &[2, 4]), &[]),
        ] {
            let (mut reclaim, start) = (Reclaim::default(), Instant::now());
            assert_eq!(reclaim.looked(first, start), BTreeSet::new(), "{what}: the first listing");
            let expected: BTreeSet<u64> = expected.iter().copied().collect();
            assert_eq!(reclaim.looked(second, start + LOOK), expected, "{what}");
        }
    }

    #[test]
    fn a_difference_that_lasts_is_corrected() {
        for (what, first, second, expected) in [
            ("as counted", (5, 5), (6, 6), 0),
            ("a call between the readings", (5, 4), (6, 6), 0),
            ("one was closed unseen", (4, 5), (4, 5), -1),
            ("three were closed unseen, two of them later", (4, 5), (2, 5), -1),
            ("sockets in storage", (3, 0), (7, 0), 3),
            ("from more to fewer", (5, 4), (4, 5), 0),
            ("below zero", (0, -2), (0, -2), 2),
        ] {
            let (mut recount, start) = (Recount::default(), Instant::now());
            let of = |number| BTreeMap::from([(7, number)]);
            assert!(recount.is_due(start));
            assert_eq!(recount.compared(&of(first.0), &of(first.1), start), BTreeMap::new(), "{what}");
            assert!(!recount.is_due(start + INTERVAL / 2) && recount.is_due(start + INTERVAL));
            let corrections = recount.compared(&of(second.0), &of(second.1), start + INTERVAL);
            assert_eq!(corrections.get(&7).copied().unwrap_or_default(), expected, "{what}");
            // What was corrected is no difference of the next reading.
            let third = (second.0, second.1 + expected);
            let more = recount.compared(&of(third.0), &of(third.1), start + 2 * INTERVAL);
            let left = second.0 - second.1 - expected;
            assert_eq!(more.get(&7).copied().unwrap_or_default(), left, "{what}: the rest");
        }
    }

    #[test]
    fn owners_are_looked_for_when_there_are_many_and_not_all_the_time() {
        let (mut reclaim, start) = (Reclaim::default(), Instant::now());
        assert!(!reclaim.wants_listing(MANY_OWNERS, start), "half of the slots are free");
        assert!(reclaim.wants_listing(MANY_OWNERS + 1, start));
        let _none = reclaim.looked(owners(&[], &[1]), start);
        assert!(!reclaim.wants_listing(MANY_OWNERS + 1, start + LOOK / 2));
        assert!(reclaim.wants_listing(MANY_OWNERS + 1, start + LOOK));
    }
}
