//! The objects of all manifests.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt, mem,
    sync::Arc,
    time::Instant,
};

use lb_core::model::{Changes, Issue, IssueKind, ObjectKind, ObjectRef, Store};

use super::{
    parse::{Body, Object, ParseIssue, parse},
    settle::{self, File, Inode, Moment},
};

/// A file's content, compared with the previous snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Unchanged text.
    Unchanged,
    /// A new text.
    Text(String),
    /// Unreadable; the cause in one line.
    Unreadable(String),
}

/// A file as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its content.
    pub content: Content,
    /// Whether a program has it open for writing; `false` if unknown.
    pub is_open: bool,
    /// Its identity: another file may have taken its name.
    pub inode: Inode,
}

impl From<Content> for Seen {
    /// A closed file.
    fn from(content: Content) -> Self {
        Self { content, is_open: false, inode: (0, 0) }
    }
}

/// All manifests at one moment, by file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Snapshot {
    /// All files.
    Files(BTreeMap<String, Seen>),
    /// The path cannot be read, so the files are unknown.
    Unreadable {
        /// The path given.
        path: String,
        /// The cause.
        cause: String,
    },
}

/// Objects that are no longer served: no manifest holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    /// The last file that held them; `None` if unknown.
    pub file: Option<String>,
    /// Whether the file was removed.
    pub is_removed: bool,
    /// The objects.
    pub objects: Vec<ObjectRef>,
}

impl fmt::Display for Gone {
    /// One line, however many objects there are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX: usize = 10;
        let names = self.objects.iter().take(MAX).map(ToString::to_string);
        f.write_str(&names.collect::<Vec<_>>().join(", "))?;
        if self.objects.len() > MAX {
            write!(f, " and {} more", self.objects.len() - MAX)?;
        }
        let (settle, vanish) = (settle::SETTLE.as_secs(), settle::VANISH.as_secs());
        let are = if self.objects.len() == 1 { "is" } else { "are" };
        write!(f, " {are} no longer served: ")?;
        match &self.file {
            None => write!(f, "no manifest holds what an earlier agent served"),
            Some(file) if self.is_removed => {
                write!(
                    f,
                    "{} was removed or renamed and has been missing for {vanish} s",
                    ObjectRef::file(file)
                )
            }
            Some(file) => {
                write!(f, "missing from {}, closed and unchanged for {settle} s", ObjectRef::file(file))
            }
        }
    }
}

/// The objects of all manifests, and their issues.
///
/// Pure: [`super::watch()`] supplies the texts. Additions and changes of a text are served at once. What it
/// lacks is served until its file has settled, or another file has it.
///
/// ```
/// use lb_agent::source::files::{Content, FileSet, Moment, Snapshot};
/// use lb_core::model::Store;
///
/// let text = "
/// apiVersion: v1
/// kind: Service
/// metadata: {name: web}
/// spec: {clusterIP: 10.96.0.10, ports: [{port: 80}, {name: admin, port: 0}]}
/// ";
/// let mut files = FileSet::new(None);
/// let seen = Content::Text(text.into()).into();
/// files.update(Snapshot::Files([("web.yaml".into(), seen)].into()), Moment::now());
///
/// let mut store = Store::new();
/// assert!(!files.apply(&mut store).is_empty());
/// assert_eq!(store.services().len(), 1);
/// let issue = files.issues()[0].to_string();
/// assert!(issue.starts_with("web.yaml:5: Service default/web: spec.ports[1].port: 0 is not a port"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct FileSet {
    service_proxy_name: Option<String>,
    files: BTreeMap<String, File>,
    /// Objects that an earlier agent served and no file has.
    missed: Option<File>,
    /// The unreadable path, the cause, and since when.
    unreadable: Option<(String, String, Moment)>,
    /// When the last reading began.
    now: Option<Moment>,
    gone: Vec<Gone>,
}

impl FileSet {
    /// An empty set.
    #[must_use]
    pub fn new(service_proxy_name: Option<&str>) -> Self {
        Self { service_proxy_name: service_proxy_name.map(str::to_owned), ..Self::default() }
    }

    /// Call before the first reading, with what an earlier agent served. Objects that no file has are served
    /// until all files were readable and settled: they may be in a file that is broken or being written.
    pub fn expect(&mut self, objects: impl IntoIterator<Item = Body>, now: Moment) {
        let object = |body: Body| {
            let object = match &body {
                Body::Service(service) => ObjectRef::from(&service.key),
                Body::Slice(slice) => ObjectRef::slice(&slice.service.namespace, &slice.name),
                Body::Node(node) => ObjectRef::node(&node.name),
                Body::ServiceCidr(cidr) => ObjectRef::service_cidr(&cidr.name),
                Body::Nothing => return None,
            };
            Some(Object { object, line: 0, body, issues: Vec::new() })
        };
        self.missed = Some(File::of_objects(objects.into_iter().filter_map(object).collect(), now));
    }

    /// Applies a snapshot. Returns whether served objects or issues may have changed.
    pub fn update(&mut self, snapshot: Snapshot, now: Moment) -> bool {
        let was_late = self.late();
        self.now = Some(now);
        let is_read = match snapshot {
            Snapshot::Files(files) => self.read(files, now),
            Snapshot::Unreadable { path, cause } => {
                let since = self.unreadable.take().map_or(now, |(.., since)| since);
                self.unreadable = Some((path, cause, since));
                true
            }
        };
        if self.has_unknown()
            && let Some(missed) = &mut self.missed
        {
            missed.touch(now);
        }
        // While the path is unreadable, nothing counts as removed.
        let is_settled = self.unreadable.is_none() && self.settle(now);
        self.forget_moved();
        is_read || is_settled || was_late != self.late()
    }

    fn read(&mut self, mut seen: BTreeMap<String, Seen>, now: Moment) -> bool {
        let was_unreadable = self.unreadable.take().is_some();
        let mut is_news = was_unreadable;
        for (name, file) in &mut self.files {
            // Files that were missing before get time to return.
            if was_unreadable {
                file.touch(now);
            }
            if !seen.contains_key(name) {
                is_news |= file.vanish(now);
            }
        }
        // In the order of names, as in messages.
        while let Some((name, Seen { content, is_open, inode })) = seen.pop_first() {
            let text = match content {
                Content::Unchanged => None,
                Content::Unreadable(cause) => Some(Err(ParseIssue { line: None, cause })),
                Content::Text(text) => Some(parse(&name, &text, self.service_proxy_name.as_deref())),
            };
            let file = self.files.entry(name).or_insert_with(|| File::new(now));
            is_news |= file.read(text, is_open, inode, now);
        }
        is_news
    }

    /// Applies removals that are due. Returns whether there were any.
    fn settle(&mut self, now: Moment) -> bool {
        let mut settled = Vec::new();
        for (name, file) in &mut self.files {
            if let Some(objects) = file.settle(now) {
                settled.push(Gone { file: Some(name.clone()), is_removed: file.is_gone(), objects });
            }
        }
        if !self.has_unknown()
            && let Some(objects) = self.missed.as_mut().and_then(|missed| missed.settle(now))
        {
            self.missed = None;
            settled.push(Gone { file: None, is_removed: true, objects });
        }
        let is_news = !settled.is_empty();
        self.files.retain(|_, file| !(file.is_gone() && file.retained().next().is_none()));
        // Another file may still hold them.
        if settled.iter().any(|gone| !gone.objects.is_empty()) {
            let served: BTreeSet<ObjectRef> = self.served().map(|object| object.object.clone()).collect();
            for mut gone in settled {
                gone.objects.retain(|object| !served.contains(object));
                if !gone.objects.is_empty() {
                    self.gone.push(gone);
                }
            }
        }
        is_news
    }

    /// Drops retained objects that have moved to another file.
    fn forget_moved(&mut self) {
        if self.retained().next().is_none() {
            return;
        }
        let present: BTreeSet<ObjectRef> = self.present().map(|(_, object)| object.object.clone()).collect();
        for file in self.files.values_mut().chain(&mut self.missed) {
            file.forget(&present);
        }
        self.files.retain(|_, file| !(file.is_gone() && file.retained().next().is_none()));
    }

    /// Whether unreadable files may hold further objects.
    fn has_unknown(&self) -> bool {
        self.unreadable.is_some() || self.files.values().any(File::is_unknown)
    }

    /// Files that have been open for writing for long.
    fn late(&self) -> BTreeSet<String> {
        let is_late = |file: &File| self.now.is_some_and(|now| file.is_late(now));
        self.files.iter().filter(|(_, file)| is_late(file)).map(|(name, _)| name.clone()).collect()
    }

    /// When to reread files without an event, and which.
    #[must_use]
    pub fn next_reread(&self) -> Option<(Instant, BTreeSet<String>)> {
        let now = self.now.filter(|_| self.unreadable.is_none())?;
        let looks = self.files.iter().filter_map(|(name, file)| Some((file.next_reread(now)?, Some(name))));
        let missed = self.missed.as_ref().filter(|_| !self.has_unknown());
        let looks: Vec<_> =
            looks.chain(missed.and_then(|missed| Some((missed.next_reread(now)?, None)))).collect();
        let first = looks.iter().map(|(at, _)| *at).min()?;
        Some((first, looks.into_iter().filter_map(|(_, name)| name.cloned()).collect()))
    }

    /// Takes the objects removed since the last call.
    pub fn take_gone(&mut self) -> Vec<Gone> {
        mem::take(&mut self.gone)
    }

    /// Replaces the store's content by the served objects.
    pub fn apply(&self, store: &mut Store) -> Changes {
        let (mut services, mut slices, mut nodes, mut cidrs) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for object in self.served() {
            match &object.body {
                Body::Service(service) => services.push(Arc::clone(service)),
                Body::Slice(slice) => slices.push(Arc::clone(slice)),
                Body::Node(node) => nodes.push(Arc::clone(node)),
                Body::ServiceCidr(cidr) => cidrs.push(Arc::clone(cidr)),
                Body::Nothing => {}
            }
        }
        let mut changes = store.replace_services(services);
        changes.merge(store.replace_slices(slices));
        changes.merge(store.replace_nodes(nodes));
        changes.merge(store.replace_service_cidrs(cidrs));
        changes
    }

    /// Issues of the files and their objects, in the order of files and lines.
    #[must_use]
    pub fn issues(&self) -> Vec<Issue> {
        let mut issues = Vec::new();
        let expects = self.missed.as_ref().is_some_and(|missed| missed.retained().next().is_some());
        if let Some((path, cause, since)) = &self.unreadable {
            let last_good = expects || !self.files.is_empty();
            let kind = IssueKind::BrokenFile { cause: cause.clone(), last_good, since: since.text() };
            issues.push(Issue::new(ObjectRef::file(path), kind));
        }
        for (name, file, now) in self.files.iter().filter_map(|(name, file)| Some((name, file, self.now?))) {
            if let Some((ParseIssue { line, cause }, since)) = file.broken(now) {
                let last_good = file.has_been_good() || expects;
                issues.push(Issue {
                    object: ObjectRef::file(name),
                    kind: IssueKind::BrokenFile { cause: cause.clone(), last_good, since: since.text() },
                    source: line.map(|line| format!("{name}:{line}")),
                });
            } else if let Some(since) = file.open_for_long(now) {
                issues
                    .push(Issue::new(ObjectRef::file(name), IssueKind::BeingWritten { since: since.text() }));
            }
        }
        for Definition { file, object, winner } in self.definitions() {
            match winner {
                None => issues.extend(object.issues.iter().cloned()),
                Some((file_of_winner, line)) => issues.push(Issue {
                    object: object.object.clone(),
                    kind: IssueKind::DefinedTwice { winner: format!("{file_of_winner}:{line}") },
                    source: Some(format!("{file}:{}", object.line)),
                }),
            }
        }
        issues
    }

    /// Number of files, broken ones included.
    #[must_use]
    pub fn n_files(&self) -> usize {
        self.files.len()
    }

    /// The objects of the current texts, in the order of files and lines.
    fn present(&self) -> impl Iterator<Item = (&str, &Object)> {
        self.files.iter().flat_map(|(name, file)| file.present().iter().map(move |object| (&**name, object)))
    }

    /// Retained objects of earlier texts.
    fn retained(&self) -> impl Iterator<Item = &Object> {
        self.files.values().chain(&self.missed).flat_map(File::retained)
    }

    /// The served objects: the first of each name, those of the current texts first.
    fn served(&self) -> impl Iterator<Item = &Object> {
        let mut names = BTreeSet::new();
        let objects = self.present().map(|(_, object)| object).chain(self.retained());
        objects.filter(move |object| names.insert(&object.object))
    }

    /// The objects of the current texts, each with the place of an earlier definition that overrides it.
    fn definitions(&self) -> impl Iterator<Item = Definition<'_>> {
        let mut places = BTreeMap::new();
        self.present().map(move |(file, object)| {
            // For other kinds it is unknown whether equal names mean one object.
            let has_identity = !matches!(object.object.kind, ObjectKind::Other(_));
            let winner = match places.entry(&object.object) {
                Entry::Occupied(place) => Some(*place.get()).filter(|_| has_identity),
                Entry::Vacant(place) => {
                    place.insert((file, object.line));
                    None
                }
            };
            Definition { file, object, winner }
        })
    }
}

struct Definition<'a> {
    file: &'a str,
    object: &'a Object,
    /// File and line of the definition that overrides this one.
    winner: Option<(&'a str, u32)>,
}

#[cfg(test)]
mod tests;
