//! The objects of all manifests.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use super::parse::{Body, Object, ParseIssue, parse};
use crate::model::{Changes, Issue, IssueKind, ObjectKind, ObjectRef, Store};

/// What a file holds, compared with the snapshot before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The same text as before.
    Unchanged,
    /// A text.
    Text(String),
    /// It cannot be read; the cause in one line.
    Unreadable(String),
}

/// All manifests at one moment, by file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Snapshot {
    /// The files; one that is not named is gone.
    Files(BTreeMap<String, Content>),
    /// The folder cannot be read: nothing is known about the files. The cause in one line.
    Unreadable {
        /// The path given.
        path: String,
        /// The cause.
        cause: String,
    },
}

/// The objects of all manifests, and what is wrong with them.
///
/// A plain value: [`super::watch()`] brings the texts.
///
/// ```
/// use lb_userspace::{model::Store, source::files::{Content, FileSet, Snapshot}};
///
/// let text = "
/// apiVersion: v1
/// kind: Service
/// metadata: {name: web}
/// spec: {clusterIP: 10.96.0.10, ports: [{port: 80}, {name: admin, port: 0}]}
/// ";
/// let mut files = FileSet::new(None);
/// files.update(Snapshot::Files([("web.yaml".into(), Content::Text(text.into()))].into()));
///
/// let mut store = Store::new();
/// assert!(!files.apply(&mut store).is_empty());
/// assert_eq!(store.services().len(), 1);
/// assert_eq!(
///     files.issues()[0].to_string(),
///     "web.yaml:5: Service default/web: spec.ports[1].port: 0 is not a port (1-65535); this port is left out"
/// );
/// ```
#[derive(Clone, Debug, Default)]
pub struct FileSet {
    service_proxy_name: Option<String>,
    files: BTreeMap<String, File>,
    /// The path that could not be read last, with the cause.
    unreadable: Option<(String, String)>,
}

#[derive(Clone, Debug, Default)]
struct File {
    /// The objects of the last text that could be read.
    objects: Vec<Object>,
    /// Whether there was one.
    has_been_good: bool,
    /// Why the present text cannot be read.
    broken: Option<ParseIssue>,
}

impl FileSet {
    /// Without files.
    #[must_use]
    pub fn new(service_proxy_name: Option<&str>) -> Self {
        Self { service_proxy_name: service_proxy_name.map(str::to_owned), ..Self::default() }
    }

    /// Takes in what the files hold now.
    pub fn update(&mut self, snapshot: Snapshot) {
        let contents = match snapshot {
            Snapshot::Files(contents) => contents,
            Snapshot::Unreadable { path, cause } => {
                self.unreadable = Some((path, cause));
                return;
            }
        };
        self.unreadable = None;
        self.files.retain(|name, _| contents.contains_key(name));
        for (name, content) in contents {
            let broken = match content {
                Content::Unchanged => continue,
                Content::Unreadable(cause) => ParseIssue { line: None, cause },
                Content::Text(text) => match parse(&name, &text, self.service_proxy_name.as_deref()) {
                    Ok(objects) => {
                        self.files.insert(name, File { objects, has_been_good: true, broken: None });
                        continue;
                    }
                    Err(issue) => issue,
                },
            };
            self.files.entry(name).or_default().broken = Some(broken);
        }
    }

    /// Makes the store hold what the files hold, and nothing else.
    pub fn apply(&self, store: &mut Store) -> Changes {
        let (mut services, mut slices, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        for definition in self.definitions().filter(|definition| definition.winner.is_none()) {
            match &definition.object.body {
                Body::Service(service) => services.push(Arc::clone(service)),
                Body::Slice(slice) => slices.push(Arc::clone(slice)),
                Body::Node(node) => nodes.push(Arc::clone(node)),
                Body::Nothing => {}
            }
        }
        let mut changes = store.replace_services(services);
        changes.merge(store.replace_slices(slices));
        changes.merge(store.replace_nodes(nodes));
        changes
    }

    /// What is wrong with the files and the objects in them, in the order of files and lines.
    #[must_use]
    pub fn issues(&self) -> Vec<Issue> {
        let mut issues = Vec::new();
        if let Some((path, cause)) = &self.unreadable {
            let kind = IssueKind::BrokenFile { cause: cause.clone(), last_good: !self.files.is_empty() };
            issues.push(Issue::new(ObjectRef::file(path), kind));
        }
        for (name, file) in &self.files {
            if let Some(ParseIssue { line, cause }) = &file.broken {
                issues.push(Issue {
                    object: ObjectRef::file(name),
                    kind: IssueKind::BrokenFile { cause: cause.clone(), last_good: file.has_been_good },
                    source: line.map(|line| format!("{name}:{line}")),
                });
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

    /// All objects in the order of files and lines, each with the place of the earlier definition that counts
    /// in its stead.
    fn definitions(&self) -> impl Iterator<Item = Definition<'_>> {
        let objects = self
            .files
            .iter()
            .flat_map(|(name, file)| file.objects.iter().map(move |object| (&**name, object)));
        let mut places = BTreeMap::new();
        objects.map(move |(file, object)| {
            // Nothing is known about other kinds, not even whether equal names mean one object.
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

/// An object at its place.
struct Definition<'a> {
    file: &'a str,
    object: &'a Object,
    /// File and line of the definition that counts, if this one does not.
    winner: Option<(&'a str, u32)>,
}

#[cfg(test)]
mod tests;
