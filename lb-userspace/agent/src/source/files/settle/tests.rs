use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
};

use lb_core::model::{Service, Store};
use proptest::prelude::*;

use super::*;
use crate::source::files::{Content, FileSet, Seen, Snapshot};

const FILE: &str = "web.yaml";

fn document(name: &str, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  clusterIP: 10.0.0.1\n  ports:\n  - port: {port}\n"
    )
}

/// `a1 b2` as a manifest: services `a` and `b`, with their versions as ports.
fn manifest(objects: &str) -> String {
    objects.split_whitespace().map(|object| document(&object[..1], object[1..].parse().unwrap())).collect()
}

fn at(millis: u64) -> Moment {
    static START: std::sync::LazyLock<Moment> = std::sync::LazyLock::new(Moment::now);
    Moment { at: START.at + Duration::from_millis(millis), clock: START.clock }
}

/// The served objects, in the notation of [`manifest`].
fn served(files: &FileSet) -> String {
    let mut store = Store::new();
    let _changes = files.apply(&mut store);
    let services: Vec<&Service> = store.services().collect();
    services.iter().fold(String::new(), |mut text, service| {
        let gap = if text.is_empty() { "" } else { " " };
        write!(text, "{gap}{}{}", service.key.name, service.ports[0].port).unwrap();
        text
    })
}

/// The state of the file at a time in milliseconds.
enum Found<'a> {
    /// Closed, with these objects.
    Is(&'a str),
    /// The same file, changed and closed.
    Changed(&'a str),
    /// Open, with these objects; the last may be cut off.
    Open(&'a str),
    /// Closed, with an unreadable text.
    Broken,
    Gone,
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_readings_are_believed_and_when() {
    use Found::{Broken, Changed, Gone, Is, Open};
    // Per step: the time, the state found, the objects then served.
    type Step<'a> = (u64, Found<'a>, &'a str);
    let tables: [(&str, &[Step<'_>]); 15] = [
        ("additions and changes at once", &[(0, Is("a1"), "a1"), (10, Changed("a2 b1"), "a2 b1")]),
        (
            "emptied, and written later",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Changed(""), "a1 b1"),
                (510, Changed("a1 b2"), "a1 b1"),
                // A known object was cut off a moment ago, so the last document is held back.
                (1509, Changed("a1 b2"), "a1 b1"),
                (1510, Is("a1 b2"), "a1 b2"),
            ],
        ),
        (
            "emptied for good",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Changed(""), "a1 b1"),
                (1009, Is(""), "a1 b1"),
                (1010, Is(""), ""),
            ],
        ),
        (
            "written in goes",
            &[
                (0, Is("a1 b1 c1"), "a1 b1 c1"),
                (10, Changed("a2"), "a1 b1 c1"),
                (500, Changed("a2 b2"), "a2 b1 c1"),
                (1400, Changed("a2 b2 d2"), "a2 b2 c1 d2"),
                (2399, Is("a2 b2 d2"), "a2 b2 c1 d2"),
                (2400, Is("a2 b2 d2"), "a2 b2 d2"),
            ],
        ),
        (
            "open for a long time",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Open(""), "a1 b1"),
                (60_000, Open("a2"), "a1 b1"),
                (120_000, Open("a2 b2"), "a2 b1"),
                (180_000, Is("a2 b2"), "a2 b2"),
            ],
        ),
        (
            "open, and closed without an object",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Open("a2"), "a1 b1"),
                (60_000, Is("a2"), "a1 b1"),
                (60_999, Is("a2"), "a1 b1"),
                (61_000, Is("a2"), "a2"),
            ],
        ),
        (
            "a new file in parts",
            &[(0, Open("a1"), ""), (10, Open("a1 b1"), "a1"), (20, Is("a1 b1"), "a1 b1")],
        ),
        (
            "replaced by another: its last document is whole",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Is("b2"), "a1 b2"),
                (1009, Is("b2"), "a1 b2"),
                (1010, Is("b2"), "b2"),
            ],
        ),
        (
            "missing for a moment",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Gone, "a1 b1"),
                (2009, Gone, "a1 b1"),
                (2009, Is("a2 b2"), "a2 b2"),
            ],
        ),
        ("away for good", &[(0, Is("a1"), "a1"), (10, Gone, "a1"), (2009, Gone, "a1"), (2010, Gone, "")]),
        (
            "missing, then back with less",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Gone, "a1 b1"),
                (2009, Is("a1"), "a1 b1"),
                (3008, Is("a1"), "a1 b1"),
                (3009, Is("a1"), "a1"),
            ],
        ),
        ("broken", &[(0, Is("a1 b1"), "a1 b1"), (10, Broken, "a1 b1"), (90_000, Broken, "a1 b1")]),
        (
            "emptied, then broken",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (10, Changed(""), "a1 b1"),
                (500, Broken, "a1 b1"),
                (90_000, Broken, "a1 b1"),
                (90_010, Changed("a2 b1"), "a2 b1"),
            ],
        ),
        (
            "never quiet, replaced again and again",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (900, Is("a2"), "a2 b1"),
                (1800, Is("a3"), "a3 b1"),
                (10_899, Is("a4"), "a4 b1"),
                (10_900, Is("a5"), "a5"),
            ],
        ),
        (
            "never quiet, written in place",
            &[
                (0, Is("a1 b1"), "a1 b1"),
                (900, Changed("a2"), "a1 b1"),
                (1800, Changed("a3"), "a1 b1"),
                (10_900, Changed("a4"), "a4"),
            ],
        ),
    ];
    for (what, steps) in tables {
        let (mut files, mut inode, mut last) = (FileSet::new(None), 0, String::new());
        for (n, (millis, found, expected)) in steps.iter().enumerate() {
            let (text, is_open) = match found {
                Is(objects) | Changed(objects) => (manifest(objects), false),
                Open(objects) => (manifest(objects), true),
                Broken => ("a: b: c".to_owned(), false),
                Gone => (String::new(), false),
            };
            let is_same = text == last;
            inode += u64::from(matches!(found, Is(_)) && !is_same);
            let content = if is_same && n > 0 { Content::Unchanged } else { Content::Text(text.clone()) };
            let mut seen = BTreeMap::new();
            if !matches!(found, Gone) {
                seen.insert(FILE.to_owned(), Seen { content, is_open, inode: (0, inode) });
            }
            files.update(Snapshot::Files(seen), at(*millis));
            assert_eq!(served(&files), *expected, "{what}: at {millis} ms");
            last = text;
        }
    }
}

/// A file held open for long is an issue with its time, until it is closed.
#[test]
fn a_file_that_is_open_for_long_is_an_issue() {
    let mut files = FileSet::new(None);
    let mut find = |millis, text: Option<&str>, is_open| {
        let content = text.map_or(Content::Unchanged, |text| Content::Text(text.to_owned()));
        let seen = Seen { content, is_open, inode: (0, 1) };
        let is_news = files.update(Snapshot::Files([(FILE.to_owned(), seen)].into()), at(millis));
        (is_news, files.issues().iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    find(0, Some(&manifest("a1 b1")), false);
    assert_eq!(find(1000, Some("half: a: text"), true), (true, vec![]), "half written");
    assert_eq!(find(5999, None, true), (false, vec![]));
    let (is_news, issues) = find(6000, None, true);
    assert!(is_news && issues.len() == 1 && issues[0].contains("web.yaml:1: mapping"), "{issues:?}");
    let (_, issues) = find(6500, Some(&manifest("a1 b2")), true);
    let expected = format!(
        "file web.yaml: open for writing by a program since {}; the last document, and objects that the file lacks, \
         keep their former state: let the program close it",
        at(0).text()
    );
    assert_eq!(issues, [expected]);
    assert_eq!(find(7000, None, false), (true, vec![]));
}

/// The file system after each step of a writer.
#[derive(Clone, Debug, Default)]
struct Disk {
    files: BTreeMap<&'static str, (String, bool, u64)>,
    n_inodes: u64,
    last: BTreeMap<&'static str, String>,
}

impl Disk {
    fn create(&mut self, name: &'static str, text: String, is_open: bool) {
        self.n_inodes += 1;
        self.files.insert(name, (text, is_open, self.n_inodes));
    }

    fn read(&mut self) -> Snapshot {
        let last = std::mem::take(&mut self.last);
        let mut seen = BTreeMap::new();
        for (name, (text, is_open, inode)) in &self.files {
            let content =
                if last.get(name) == Some(text) { Content::Unchanged } else { Content::Text(text.clone()) };
            self.last.insert(name, text.clone());
            seen.insert((*name).to_owned(), Seen { content, is_open: *is_open, inode: (0, *inode) });
        }
        Snapshot::Files(seen)
    }
}

/// A way to write the next version of a file.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// `cp`, `>`: emptied, then written in pieces of this many bytes, then closed.
    InPlace(usize),
    /// `echo >>` for each of these many documents.
    InGoes(usize),
    /// `mv`, rsync, `sed -i`: another file takes the name.
    Rename,
    /// git, `cp --remove-destination`: removed, then recreated in pieces of this many bytes.
    Anew(usize),
    /// vim: the old file takes a name that is no manifest's, a new one is written.
    Backup,
    /// `mv` to another name in the folder, before or after an edit.
    Move(bool),
}

fn ways() -> impl Strategy<Value = Way> {
    prop_oneof![
        (1..200_usize).prop_map(Way::InPlace),
        (1..3_usize).prop_map(Way::InGoes),
        Just(Way::Rename),
        (1..200_usize).prop_map(Way::Anew),
        Just(Way::Backup),
        any::<bool>().prop_map(Way::Move),
    ]
}

/// The successive states of the disk.
fn states(disk: &Disk, way: Way, objects: &[(String, u16)]) -> Vec<Disk> {
    let documents: Vec<String> = objects.iter().map(|(name, port)| document(name, *port)).collect();
    let text = documents.concat();
    let mut disk = disk.clone();
    let mut states = Vec::new();
    let name = *disk.files.keys().next().unwrap_or(&"b.yaml");
    let in_pieces = |disk: &mut Disk, states: &mut Vec<Disk>, size: usize| {
        for end in (0..text.len()).step_by(size).chain([text.len()]) {
            disk.files.get_mut(name).unwrap().0 = text[..end].to_owned();
            states.push(disk.clone());
        }
        disk.files.get_mut(name).unwrap().1 = false;
        states.push(disk.clone());
    };
    match way {
        Way::InPlace(size) => {
            disk.files.get_mut(name).unwrap().1 = true;
            in_pieces(&mut disk, &mut states, size);
        }
        Way::InGoes(n) => {
            for end in (0..documents.len()).step_by(n).chain([documents.len()]) {
                disk.files.get_mut(name).unwrap().0 = documents[..end].concat();
                states.push(disk.clone());
            }
        }
        Way::Rename => {
            disk.create(name, text, false);
            states.push(disk);
        }
        Way::Anew(size) => {
            disk.files.remove(name);
            states.push(disk.clone());
            disk.create(name, String::new(), true);
            in_pieces(&mut disk, &mut states, size);
        }
        Way::Backup => {
            disk.files.remove(name);
            states.push(disk.clone());
            disk.create(name, text, false);
            states.push(disk);
        }
        Way::Move(edits_first) => {
            let other = ["a.yaml", "b.yaml", "c.yaml"].into_iter().find(|other| *other != name).unwrap();
            if edits_first {
                disk.files.get_mut(name).unwrap().0.clone_from(&text);
                states.push(disk.clone());
            }
            let moved = disk.files.remove(name).unwrap();
            disk.files.insert(other, moved);
            states.push(disk.clone());
            disk.files.get_mut(other).unwrap().0 = text;
            states.push(disk);
        }
    }
    states
}

/// Names and versions of some objects, in some order.
fn versions() -> impl Strategy<Value = Vec<(String, u16)>> {
    let objects = prop::collection::btree_map("[a-e]", 1..4_u16, 1..5);
    objects.prop_map(|objects| objects.into_iter().collect::<Vec<_>>()).prop_shuffle()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Whatever the way of writing and the times of the readings: an object of both versions is served as in
    /// one of them, an object of one version is served so or not at all, and the last version is served in
    /// the end.
    #[test]
    fn no_object_of_both_versions_is_gone_at_any_moment(
        edits in prop::collection::vec((ways(), versions()), 1..4),
        pauses in prop::collection::vec((0..900_u64, any::<bool>()), 1..40),
    ) {
        let (mut files, mut now) = (FileSet::new(None), 0);
        let mut disk = Disk::default();
        let mut before: Vec<(String, u16)> = vec![("a".into(), 1), ("z".into(), 1)];
        disk.create("b.yaml", before.iter().map(|(name, port)| document(name, *port)).collect(), false);
        files.update(disk.read(), at(now));
        let mut pauses = pauses.into_iter().cycle();
        for (way, after) in edits {
            let mut last = std::mem::take(&mut disk.last);
            for mut state in states(&disk, way, &after) {
                let (pause, is_read) = pauses.next().unwrap();
                now += pause;
                if !is_read {
                    continue;
                }
                state.last = last;
                files.update(state.read(), at(now));
                last = std::mem::take(&mut state.last);
                let mut store = Store::new();
                let _changes = files.apply(&mut store);
                let shown: BTreeSet<(String, u16)> = store
                    .services()
                    .map(|service| (Arc::clone(&service.key.name).to_string(), service.ports[0].port))
                    .collect();
                for object in &shown {
                    prop_assert!(before.contains(object) || after.contains(object), "{object:?} was never written");
                }
                for (name, _) in before.iter().filter(|(name, _)| after.iter().any(|(other, _)| other == name)) {
                    prop_assert!(shown.iter().any(|(other, _)| other == name), "{name} is gone: {:?}", state.files);
                }
            }
            // Quiet for long enough, with the requested rereads.
            let end = states(&disk, way, &after).pop().unwrap();
            disk = Disk { last, ..end };
            files.update(disk.read(), at(now));
            for _ in 0..8 {
                let Some((due, _)) = files.next_reread() else { break };
                now = now.max(u64::try_from(due.duration_since(at(0).at).as_millis()).unwrap());
                files.update(disk.read(), at(now));
            }
            prop_assert_eq!(files.next_reread(), None);
            let text = served(&files);
            let mut expected: Vec<String> = after.iter().map(|(name, port)| format!("{name}{port}")).collect();
            expected.sort();
            prop_assert_eq!(text, expected.join(" "));
            before = after;
        }
    }
}
