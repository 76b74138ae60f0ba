//! Decides which parts of a file's readings take effect, and when.
//!
//! Most programs that write a file pass through unintended states: empty, partly written, missing for a
//! moment. So additions and changes take effect at once, and removals only when the file has settled: no
//! program has it open for writing, and it has been quiet for [`SETTLE`]; or it has been missing for
//! [`VANISH`].
//!
//! The last document of a text may be cut off at any point while it is written. While a program has the file
//! open, and while it is written in several goes, that document's object keeps its former version.
//!
//! # Invariants
//!
//! - Pure: readings and times are arguments.
//! - An object that every version of a file holds is served from the first version on, whatever the readings
//!   see in between, unless the file is quiet for [`SETTLE`] in a state without it.
//! - A file that no longer changes takes effect exactly as written.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use lb_core::model::ObjectRef;

use super::parse::{Body, Object, ParseIssue};

/// How long a closed file must be quiet before the objects that it lacks are removed. Twice the 500 ms
/// observed in scripts that empty a file and then write it.
pub const SETTLE: Duration = Duration::from_secs(1);
/// How long a file must be missing before its objects are removed. Longer than [`SETTLE`], because tools also
/// move files away and replace them one by one, and people do so by hand.
pub const VANISH: Duration = Duration::from_secs(2);
/// How long closed texts may lack an object if the file is never quiet: some files are rewritten several
/// times a second.
const RESTLESS: Duration = Duration::from_secs(10);
/// Minimum number of such texts. A slow writer leaves one or two.
const RESTLESS_TEXTS: u32 = 3;
/// How often to reread a file that is open for writing. Its closing is an event, which can be lost.
const RELOOK: Duration = Duration::from_secs(1);
/// How long a file may be open for writing before that is an issue. Longer than copying the largest file
/// takes.
const LATE: Duration = Duration::from_secs(5);

/// When a reading began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For measuring.
    pub at: Instant,
    /// For display.
    pub clock: Timestamp,
}

impl Moment {
    /// The current time.
    #[must_use]
    pub fn now() -> Self {
        Self { at: Instant::now(), clock: Timestamp::now() }
    }

    fn since(self, earlier: Self) -> Duration {
        self.at.saturating_duration_since(earlier.at)
    }

    /// For display, to the second.
    pub(super) fn text(self) -> String {
        self.clock.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileState {
    /// No program is known to have it open for writing.
    Closed,
    /// A program has it open for writing.
    Open,
    Gone,
}

/// Device and number of a file's inode.
pub type Inode = (u64, u64);

/// The state of one file, and what is served from it.
#[derive(Clone, Debug)]
pub(super) struct File {
    /// The objects of the last readable text.
    text: Vec<Object>,
    /// Whether the last of them is held back.
    holds_last: bool,
    /// Objects of earlier texts that are still served.
    retained: Vec<Retained>,
    state: FileState,
    /// When it entered this state.
    since: Moment,
    /// When it last changed in any way.
    changed: Moment,
    inode: Inode,
    /// Start of a write in several goes: a program closed the file without objects that the same file had
    /// before.
    in_goes: Option<Moment>,
    /// Why the current text is unreadable, and since when.
    broken: Option<(ParseIssue, Moment)>,
    has_been_good: bool,
}

/// An object that the text lacks, or has in a version that is held back.
#[derive(Clone, Debug)]
struct Retained {
    object: Object,
    since: Moment,
    /// Number of closed texts without it.
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
            state: FileState::Closed,
            since: now,
            changed: now,
            inode: (0, 0),
            in_goes: None,
            broken: None,
            has_been_good: false,
        }
    }

    /// Objects of an unknown file: as if their file had just vanished.
    pub(super) fn of_objects(objects: Vec<Object>, now: Moment) -> Self {
        let retained = objects.into_iter().map(|object| Retained::new(object, now)).collect();
        Self { state: FileState::Gone, retained, has_been_good: true, ..Self::new(now) }
    }

    /// Applies a reading; `text` is `None` if unchanged. Returns whether anything is new.
    pub(super) fn read(
        &mut self,
        text: Option<Result<Vec<Object>, ParseIssue>>,
        is_open: bool,
        inode: Inode,
        now: Moment,
    ) -> bool {
        let is_news =
            self.turn(if is_open { FileState::Open } else { FileState::Closed }, now) | text.is_some();
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

    /// The file does not exist. Returns whether that is new.
    pub(super) fn vanish(&mut self, now: Moment) -> bool {
        if !self.turn(FileState::Gone, now) {
            return false;
        }
        self.changed = now;
        self.retained = self.take_served(now);
        (self.text, self.holds_last, self.in_goes, self.broken) = (Vec::new(), false, None, None);
        true
    }

    /// Restarts the waiting time for removals.
    pub(super) const fn touch(&mut self, now: Moment) {
        self.changed = now;
    }

    fn turn(&mut self, state: FileState, now: Moment) -> bool {
        let turns = mem::replace(&mut self.state, state) != state;
        if turns {
            self.since = now;
        }
        turns
    }

    /// Decides which objects of the text to serve; `known` are those served before.
    fn divide(&mut self, mut known: Vec<Retained>, is_same_file: bool, now: Moment) {
        let body_of: BTreeMap<&ObjectRef, &Body> =
            known.iter().map(|known| (&known.object.object, &known.object.body)).collect();
        let held = names(&self.text);
        let is_closed = self.state == FileState::Closed;
        if !is_same_file {
            self.in_goes = None;
        }
        if is_closed && is_same_file && body_of.keys().any(|name| !held.contains(name)) {
            self.in_goes.get_or_insert(now);
        }
        self.holds_last = self.text.last().is_some_and(|last| match body_of.get(&last.object) {
            Some(known) => (!is_closed || self.in_goes.is_some()) && **known != last.body,
            // A new object: at worst the closed file is cut off there, and no served object is affected.
            None => !is_closed,
        });
        let present = names(self.present());
        known.retain(|known| !present.contains(&known.object.object));
        for known in &mut known {
            known.n_texts += u32::from(is_closed);
        }
        self.retained = known;
    }

    /// All served objects, the first of each name.
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

    /// Applies removals that are due. Returns the removed objects; `None` if nothing is due.
    pub(super) fn settle(&mut self, now: Moment) -> Option<Vec<ObjectRef>> {
        let quiet = now.since(self.changed);
        let (may_settle, patience) = match self.state {
            FileState::Gone => (true, VANISH),
            FileState::Closed => (self.broken.is_none() && self.is_pending(), SETTLE),
            FileState::Open => (false, SETTLE),
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

    /// Forgets retained objects that another file holds now: they have moved.
    pub(super) fn forget(&mut self, elsewhere: &BTreeSet<ObjectRef>) {
        let last = self.text.last().filter(|_| self.holds_last).map(|last| &last.object);
        self.retained.retain(|known| {
            let name = &known.object.object;
            Some(name) == last || !elsewhere.contains(name)
        });
    }

    /// When to reread it without an event. `now` is the time of the last reading.
    pub(super) fn next_reread(&self, now: Moment) -> Option<Instant> {
        match self.state {
            FileState::Gone => Some(self.changed.at + VANISH),
            FileState::Open => Some(now.at + RELOOK),
            FileState::Closed if self.broken.is_some() || !self.is_pending() => None,
            FileState::Closed => Some(self.changed.at + SETTLE),
        }
    }

    /// Whether the served objects differ from the text's.
    fn is_pending(&self) -> bool {
        self.in_goes.is_some() || self.holds_last || !self.retained.is_empty()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.state == FileState::Gone
    }

    /// Whether the file's intended content is unknown: never read, or still being written.
    pub(super) fn is_unknown(&self) -> bool {
        !self.has_been_good || self.state == FileState::Open
    }

    /// The served objects of the current text.
    pub(super) fn present(&self) -> &[Object] {
        &self.text[..self.text.len() - usize::from(self.holds_last)]
    }

    /// The served objects of earlier texts.
    pub(super) fn retained(&self) -> impl Iterator<Item = &Object> {
        self.retained.iter().map(|known| &known.object)
    }

    /// Why it is unreadable, and since when. Not while a program writes it.
    pub(super) fn broken(&self, now: Moment) -> Option<(&ParseIssue, Moment)> {
        let (issue, since) = self.broken.as_ref()?;
        (self.state != FileState::Open || self.is_late(now)).then_some((issue, *since))
    }

    pub(super) fn has_been_good(&self) -> bool {
        self.has_been_good
    }

    /// Since when a program has it open for writing, if that holds back objects.
    pub(super) fn open_for_long(&self, now: Moment) -> Option<Moment> {
        (self.is_late(now) && self.is_pending()).then_some(self.since)
    }

    pub(super) fn is_late(&self, now: Moment) -> bool {
        self.state == FileState::Open && now.since(self.since) >= LATE
    }
}

fn names(objects: &[Object]) -> BTreeSet<&ObjectRef> {
    objects.iter().map(|object| &object.object).collect()
}

#[cfg(test)]
mod tests;
