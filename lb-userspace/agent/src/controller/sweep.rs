//! When sockets are looked for that stay with endpoints which no longer serve, how many of them are ended at a time, and which slots
//! of sockets that are gone are taken back.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use lb_common::{layout::SLOT_WAYS, limits::SOCKET_SETS};
use lb_core::stale::{Standing, Use, Used};
use lb_kernel::sockets::{FoundSocket, Owners, Record};

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

/// The least time between two looks for the sockets that own slots: each lists all sockets of the host.
const LOOK: Duration = Duration::from_secs(20);
/// Only with more owners than this is it worth a look. A socket that finds no slot keeps its record in socket storage, which
/// costs it half a microsecond.
const MANY_OWNERS: usize = SOCKET_SETS as usize * SLOT_WAYS / 2;

/// The timing of sweeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweeps {
    state: State,
    /// Whether a change came that no sweep has seen.
    is_outdated: bool,
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
        Self { state: State::New, is_outdated: false }
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

    /// A sweep begins.
    pub fn begin(&mut self, now: Instant) {
        self.state = State::Running { since: now };
        self.is_outdated = false;
    }

    /// The sweep is over.
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

/// Which slots are taken back, since their sockets are gone. `sock_release` gives a slot up with its socket, but not while it is
/// detached.
///
/// A slot is taken back when two looks in a row miss its socket. That is wrong if the socket is open where no look gets to, in
/// a network namespace that is not known: it would lose its record. Sockets that come there are seen as owners that are missing from
/// the beginning, and as long as there are such, nothing is taken back; neither is it while the hook is detached still.
#[derive(Clone, Debug, Default)]
pub struct Reclaim {
    looked: Option<(Instant, Owners)>,
}

impl Reclaim {
    /// Whether to look for the sockets that own slots.
    #[must_use]
    pub fn wants_look(&self, n_owned: usize, now: Instant) -> bool {
        let is_due = |(at, _): &(Instant, Owners)| now.saturating_duration_since(*at) >= LOOK;
        n_owned > MANY_OWNERS && self.looked.as_ref().is_none_or(is_due)
    }

    /// Takes what a look has found. Returns whose slots are to be taken back.
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

/// The sockets to end now, at most `limit`, with the way that each goes, and whether there are more.
///
/// `standings` has one for each way that the sockets go.
#[must_use]
pub fn due_now(
    sockets: Vec<FoundSocket>,
    standings: &BTreeMap<Use, Standing>,
    now: Instant,
    limit: usize,
) -> (Vec<FoundSocket>, bool) {
    let is_due = |socket: &FoundSocket| matches!(standings.get(&way(socket)), Some(Standing::Ends { due, .. }) if *due <= now);
    let mut due: Vec<FoundSocket> = sockets.into_iter().filter(is_due).collect();
    let has_more = due.len() > limit;
    due.truncate(limit);
    (due, has_more)
}

/// The way that a socket goes.
#[must_use]
pub fn way(socket: &FoundSocket) -> Use {
    Use { protocol: socket.protocol(), service: socket.service, endpoint: socket.peer() }
}

/// The ways that sockets go.
#[must_use]
pub fn ways(sockets: &[FoundSocket]) -> BTreeSet<Use> {
    sockets.iter().map(way).collect()
}

/// The ways that records tell of.
#[must_use]
pub fn used(records: &[Record]) -> Used {
    let mut used = Used::new();
    for &Record { cookie, protocol, service, endpoint, .. } in records {
        used.entry(Use { protocol, service: Some(service), endpoint }).or_default().insert(cookie);
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
            ("then after a while", &[Changed(0), Begin(0), Done(0, None), Due(Some(10_000))]),
            ("after a change soon", &[Changed(0), Begin(0), Done(0, None), Changed(0), Due(Some(50))]),
            ("a change meanwhile", &[Changed(0), Begin(0), Changed(0), Done(0, None), Due(Some(50))]),
            ("a long one leaves time", &[Changed(0), Begin(0), Changed(0), Done(1, None), Due(Some(10_000))]),
            ("the end of a drain", &[Changed(0), Begin(0), Done(0, Some(3)), Due(Some(3000))]),
            ("a drain that ends late", &[Changed(0), Begin(0), Done(0, Some(30)), Due(Some(10_000))]),
            ("more than one sweep ends", &[Changed(0), Begin(0), More(0), Due(Some(50)), Begin(1)]),
            ("a failure is tried again", &[Changed(0), Begin(0), Failed(0), Due(Some(10_000)), Begin(10)]),
            (
                "a kernel that cannot",
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
            ("one came where no look gets to", owners(&[1], &[2]), owners(&[1], &[2, 4]), &[]),
        ] {
            let (mut reclaim, start) = (Reclaim::default(), Instant::now());
            assert_eq!(reclaim.looked(first, start), BTreeSet::new(), "{what}: the first look");
            let expected: BTreeSet<u64> = expected.iter().copied().collect();
            assert_eq!(reclaim.looked(second, start + LOOK), expected, "{what}");
        }
    }

    #[test]
    fn owners_are_looked_for_when_there_are_many_and_not_all_the_time() {
        let (mut reclaim, start) = (Reclaim::default(), Instant::now());
        assert!(!reclaim.wants_look(MANY_OWNERS, start), "half of the slots are free");
        assert!(reclaim.wants_look(MANY_OWNERS + 1, start));
        let _none = reclaim.looked(owners(&[], &[1]), start);
        assert!(!reclaim.wants_look(MANY_OWNERS + 1, start + LOOK / 2));
        assert!(reclaim.wants_look(MANY_OWNERS + 1, start + LOOK));
    }
}
