//! What of the readings of one file is believed, and when.
//!
//! Programs write files in many ways, and most pass through states that nobody means: emptied and not yet written, written in
//! parts, away for a moment. So what a reading adds or changes is believed at once, and what it lacks only when the file has
//! settled: no program has it open for writing, and it was quiet for [`SETTLE`]; or it has been away for [`VANISH`].
//!
//! The last document of a text may be cut off wherever its writer has come to. While one has the file open, and while it is
//! written in several goes, the object of that document stays as it was known.
//!
//! # Invariants
//!
//! - Plain values: the readings and their times are arguments.
//! - An object that every version of a file holds is served from the first of them on, whatever the readings see in between, as
//!   long as the file is not quiet for as long in a state that lacks it.
//! - A file that stays as it is is believed in the end, to the letter.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use lb_core::model::ObjectRef;

use super::parse::{Body, Object, ParseIssue};

/// How long a closed file is quiet until the objects that it lacks are gone. Scripts that empty a file and then write it were
/// seen to leave 500 ms between: twice that.
pub const SETTLE: Duration = Duration::from_secs(1);
/// How long a file is away until its objects are gone. Longer than [`SETTLE`], because files are also moved away and replaced by
/// tools that do so for one file after the other, and by hand.
pub const VANISH: Duration = Duration::from_secs(2);
/// How long closed texts may lack an object without the file ever being quiet: some are written anew several times a second.
const RESTLESS: Duration = Duration::from_secs(10);
/// How many such texts there must be. One or two are what a slow writer leaves.
const RESTLESS_TEXTS: u32 = 3;
/// How often a file that is open for writing is looked at. Its closing is an event, which can be lost.
const RELOOK: Duration = Duration::from_secs(1);
/// How long a file may be open for writing before that is an issue: longer than it takes to copy the largest.
const LATE: Duration = Duration::from_secs(5);

/// When a reading began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// To measure by.
    pub at: Instant,
    /// To show.
    pub clock: Timestamp,
}

impl Moment {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self { at: Instant::now(), clock: Timestamp::now() }
    }

    fn since(self, earlier: Self) -> Duration {
        self.at.saturating_duration_since(earlier.at)
    }

    /// For people, to the second.
    pub(super) fn text(self) -> String {
        self.clock.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }
}

/// How a file was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No program is known to have it open for writing.
    Closed,
    /// A program has.
    Open,
    /// There is none.
    Gone,
}

/// Device and number of a file's inode.
pub type Inode = (u64, u64);

/// What is known of one file, and what is served from it.
#[derive(Clone, Debug)]
pub(super) struct File {
    /// The objects of the last text that could be read.
    text: Vec<Object>,
    /// Whether the last of them is not served yet.
    holds_last: bool,
    /// Objects of earlier texts that are served still.
    retained: Vec<Retained>,
    state: State,
    /// When it came to this state.
    since: Moment,
    /// When anything about it was new last.
    changed: Moment,
    inode: Inode,
    /// Since when it is written in several goes: a program closed it although it lacks objects, and it is no other file than
    /// the one that had them.
    in_goes: Option<Moment>,
    /// Why the present text cannot be read, and since when that is so.
    broken: Option<(ParseIssue, Moment)>,
    has_been_good: bool,
}

/// An object that the text lacks, or has in a version that is not served yet.
#[derive(Clone, Debug)]
struct Retained {
    object: Object,
    since: Moment,
    /// Texts without it of which no program was the writer any more.
    n_texts: u32,
}

impl Retained {
    const fn new(object: Object, since: Moment) -> Self {
        Self { object, since, n_texts: 0 }
    }

    fn is_restless(&self, now: Moment) -> bool {
        self.n_texts >= RESTLESS_TEXTS && now.since(self.since) >= RESTLESS
    }
}

impl File {
    pub(super) fn new(now: Moment) -> Self {
        Self {
            text: Vec::new(),
            holds_last: false,
            retained: Vec::new(),
            state: State::Closed,
            since: now,
            changed: now,
            inode: (0, 0),
            in_goes: None,
            broken: None,
            has_been_good: false,
        }
    }

    /// Objects whose file is not known: as those of a file that has vanished now.
    pub(super) fn of_objects(objects: Vec<Object>, now: Moment) -> Self {
        let retained = objects.into_iter().map(|object| Retained::new(object, now)).collect();
        Self { state: State::Gone, retained, has_been_good: true, ..Self::new(now) }
    }

    /// Takes in a reading; without a text if that is as it was. Returns whether it brought news.
    pub(super) fn read(
        &mut self,
        text: Option<Result<Vec<Object>, ParseIssue>>,
        is_open: bool,
        inode: Inode,
        now: Moment,
    ) -> bool {
        let is_news = self.turn(if is_open { State::Open } else { State::Closed }, now) | text.is_some();
        let is_same_file = mem::replace(&mut self.inode, inode) == inode;
        if !is_news {
            return false;
        }
        self.changed = now;
        let known = self.take_served(now);
        match text {
            Some(Ok(objects)) => (self.text, self.broken, self.has_been_good) = (objects, None, true),
            Some(Err(issue)) => {
                let since = self.broken.take().map_or(now, |(_, since)| since);
                self.broken = Some((issue, since));
            }
            None => {}
        }
        self.divide(known, is_same_file, now);
        true
    }

    /// There is no such file. Returns whether that is news.
    pub(super) fn vanish(&mut self, now: Moment) -> bool {
        if !self.turn(State::Gone, now) {
            return false;
        }
        self.changed = now;
        self.retained = self.take_served(now);
        (self.text, self.holds_last, self.in_goes, self.broken) = (Vec::new(), false, None, None);
        true
    }

    /// It is not time to believe that it is gone.
    pub(super) const fn touch(&mut self, now: Moment) {
        self.changed = now;
    }

    fn turn(&mut self, state: State, now: Moment) -> bool {
        let turns = mem::replace(&mut self.state, state) != state;
        if turns {
            self.since = now;
        }
        turns
    }

    /// Decides what of the text is served, where `known` is what was served before.
    fn divide(&mut self, mut known: Vec<Retained>, is_same_file: bool, now: Moment) {
        let body_of: BTreeMap<&ObjectRef, &Body> =
            known.iter().map(|known| (&known.object.object, &known.object.body)).collect();
        let held = names(&self.text);
        let is_closed = self.state == State::Closed;
        if !is_same_file {
            self.in_goes = None;
        }
        if is_closed && is_same_file && body_of.keys().any(|name| !held.contains(name)) {
            self.in_goes.get_or_insert(now);
        }
        self.holds_last = self.text.last().is_some_and(|last| match body_of.get(&last.object) {
            Some(known) => (!is_closed || self.in_goes.is_some()) && **known != last.body,
            // One that is new is cut off at worst once the file is closed, and takes nothing from anybody.
            None => !is_closed,
        });
        let present = names(self.present());
        known.retain(|known| !present.contains(&known.object.object));
        for known in &mut known {
            known.n_texts += u32::from(is_closed);
        }
        self.retained = known;
    }

    /// Everything that is served, the first of each name.
    fn take_served(&mut self, now: Moment) -> Vec<Retained> {
        let mut served = mem::take(&mut self.retained);
        let mut names: BTreeSet<ObjectRef> = served.iter().map(|known| known.object.object.clone()).collect();
        for object in self.present() {
            if object.body != Body::Nothing && names.insert(object.object.clone()) {
                served.push(Retained::new(object.clone(), now));
            }
        }
        served
    }

    /// Believes what the last reading said, as far as it is time. Returns what is gone by that; `None` if it is not time.
    pub(super) fn settle(&mut self, now: Moment) -> Option<Vec<ObjectRef>> {
        let quiet = now.since(self.changed);
        let (may_settle, patience) = match self.state {
            State::Gone => (true, VANISH),
            State::Closed => (self.broken.is_none() && self.is_pending(), SETTLE),
            State::Open => (false, SETTLE),
        };
        if !may_settle {
            return None;
        }
        let is_believed = quiet >= patience;
        let is_restless = |known: &Retained| known.is_restless(now);
        if !is_believed && !self.retained.iter().any(is_restless) {
            return None;
        }
        (self.holds_last, self.in_goes) = (false, None);
        let present = names(&self.text);
        let due = mem::take(&mut self.retained);
        let due = due.into_iter().filter(|known| !present.contains(&known.object.object));
        let (gone, stay): (Vec<_>, Vec<_>) = due.partition(|known| is_believed || known.is_restless(now));
        self.retained = stay;
        Some(gone.into_iter().map(|known| known.object.object).collect())
    }

    /// Forgets what another file holds now: it has moved.
    pub(super) fn forget(&mut self, elsewhere: &BTreeSet<ObjectRef>) {
        let last = self.text.last().filter(|_| self.holds_last).map(|last| &last.object);
        self.retained.retain(|known| {
            let name = &known.object.object;
            Some(name) == last || !elsewhere.contains(name)
        });
    }

    /// When to look at it again, although nothing happens. `now` is when it was looked at last.
    pub(super) fn next_look(&self, now: Moment) -> Option<Instant> {
        match self.state {
            State::Gone => Some(self.changed.at + VANISH),
            State::Open => Some(now.at + RELOOK),
            State::Closed if self.broken.is_some() || !self.is_pending() => None,
            State::Closed => Some(self.changed.at + SETTLE),
        }
    }

    /// Whether what is served is not what the text says.
    fn is_pending(&self) -> bool {
        self.in_goes.is_some() || self.holds_last || !self.retained.is_empty()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// Whether nothing tells what the file is to hold: it was never read, or not to its end.
    pub(super) fn is_unknown(&self) -> bool {
        !self.has_been_good || self.state == State::Open
    }

    /// The objects of the present text that are served.
    pub(super) fn present(&self) -> &[Object] {
        &self.text[..self.text.len() - usize::from(self.holds_last)]
    }

    /// The objects of earlier texts that are served.
    pub(super) fn retained(&self) -> impl Iterator<Item = &Object> {
        self.retained.iter().map(|known| &known.object)
    }

    /// Why it cannot be read, and since when. Not while a program is writing it.
    pub(super) fn broken(&self, now: Moment) -> Option<(&ParseIssue, Moment)> {
        let (issue, since) = self.broken.as_ref()?;
        (self.state != State::Open || self.is_late(now)).then_some((issue, *since))
    }

    pub(super) fn has_been_good(&self) -> bool {
        self.has_been_good
    }

    /// Since when a program has it open for writing, if that keeps objects from being served as the text has them.
    pub(super) fn open_for_long(&self, now: Moment) -> Option<Moment> {
        (self.is_late(now) && self.is_pending()).then_some(self.since)
    }

    pub(super) fn is_late(&self, now: Moment) -> bool {
        self.state == State::Open && now.since(self.since) >= LATE
    }
}

fn names(objects: &[Object]) -> BTreeSet<&ObjectRef> {
    objects.iter().map(|object| &object.object).collect()
}

#[cfg(test)]
mod tests;
