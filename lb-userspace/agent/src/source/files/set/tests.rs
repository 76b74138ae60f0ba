use std::{sync::LazyLock, time::Duration};

use jiff::Timestamp;
use lb_core::model::ServiceKey;

use super::*;

/// A Service with a port.
fn service(name: &str, port: u32) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.0.0.1, ports: [{{port: \
         {port}}}]}}\n"
    )
}

fn snapshot(files: &[(&str, &str)]) -> Snapshot {
    let seen = |text: &str| Content::Text(text.to_owned()).into();
    Snapshot::Files(files.iter().map(|(name, text)| ((*name).to_owned(), seen(text))).collect())
}

/// A time after the first reading.
#[expect(clippy::cast_possible_truncation, reason = "whole seconds are shown")]
fn after(seconds: f64) -> Moment {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let clock = Timestamp::from_second(1_764_000_000 + seconds as i64).unwrap();
    Moment { at: *START + Duration::from_secs_f64(seconds), clock }
}

/// The services in the store, `name:port`.
fn services(set: &FileSet) -> Vec<String> {
    let mut store = Store::new();
    let _ = set.apply(&mut store);
    let name = |service: &lb_core::model::Service| format!("{}:{}", service.key.name, service.ports[0].port);
    store.services().map(name).collect()
}

fn issues(set: &FileSet) -> Vec<String> {
    set.issues().iter().map(ToString::to_string).collect()
}

/// Only the current texts are served.
fn settle(set: &mut FileSet, seconds: f64) {
    let (_, files) = set.next_reread().unwrap_or_else(|| (Instant::now(), BTreeSet::new()));
    let present = set.files.iter().filter(|(_, file)| !file.is_gone());
    let unchanged: BTreeMap<_, _> =
        present.map(|(name, _)| (name.clone(), Content::Unchanged.into())).collect();
    assert!(files.iter().all(|name| set.files.contains_key(name)), "{files:?}");
    set.update(Snapshot::Files(unchanged), after(seconds));
}

#[test]
fn files_come_and_go() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]), after(0.0));
    assert_eq!((services(&set), set.n_files()), (vec!["a:1".to_owned(), "b:2".to_owned()], 2));

    let unchanged = ("b.yaml".to_owned(), Content::Unchanged.into());
    let changed = ("c.yaml".to_owned(), Content::Text(service("c", 3)).into());
    set.update(Snapshot::Files([unchanged, changed].into()), after(10.0));
    assert_eq!(services(&set), ["a:1", "b:2", "c:3"], "what is new is served at once");
    settle(&mut set, 11.9);
    assert_eq!((services(&set).len(), set.take_gone()), (3, vec![]));
    settle(&mut set, 12.0);
    assert_eq!(services(&set), ["b:2", "c:3"]);
    set.update(snapshot(&[]), after(20.0));
    settle(&mut set, 22.0);
    assert!(services(&set).is_empty());
    assert!(issues(&set).is_empty());
    assert_eq!(set.next_reread(), None);
    let gone: Vec<String> = set.take_gone().iter().map(ToString::to_string).collect();
    let why = |file: &str| format!("file {file}.yaml was removed or renamed and has been missing for 2 s");
    let line = |name: &str| format!("Service default/{name} is no longer served: {}", why(name));
    assert_eq!(gone, [line("a"), line("b"), line("c")]);
}

/// A broken file keeps the objects of its last good text, and none of the broken one; the other files are not
/// affected.
#[test]
fn a_broken_file_keeps_its_last_good_objects() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]), after(0.0));
    let half = service("new", 5) + &service("a", 1).replace("port: 1", "port: one");
    set.update(snapshot(&[("a.yaml", &half), ("b.yaml", &service("b", 3))]), after(10.0));
    let expected = "a.yaml:10: Service default/a: spec.ports[0].port: invalid type: string \"one\", expected \
                    i32; the objects read from it before stay in force (since 2025-11-24T16:00:10Z)";
    for seconds in [10.0, 20.0] {
        assert_eq!((services(&set), issues(&set)), (vec!["a:1".into(), "b:3".into()], vec![expected.into()]));
        settle(&mut set, seconds);
    }
    // Broken in another way: the time since the last good text counts.
    set.update(snapshot(&[("a.yaml", "a: b: c"), ("b.yaml", &service("b", 3))]), after(30.0));
    assert!(issues(&set)[0].ends_with("(since 2025-11-24T16:00:10Z)"), "{:?}", issues(&set));

    set.update(snapshot(&[("a.yaml", &service("a", 7)), ("b.yaml", &service("b", 3))]), after(40.0));
    assert_eq!((services(&set), issues(&set)), (vec!["a:7".to_owned(), "b:3".to_owned()], vec![]));
}

#[test]
fn a_file_that_was_never_good_is_left_out() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", "a: b: c"), ("b.yaml", &service("b", 2))]), after(0.0));
    assert_eq!(services(&set), ["b:2"]);
    assert_eq!(
        issues(&set),
        ["a.yaml:1: mapping values are not allowed in this context at line 1, column 5; the file is left \
          out"]
    );
    set.update(snapshot(&[("b.yaml", &service("b", 2))]), after(1.0));
    assert!(issues(&set).is_empty());
}

#[test]
fn a_file_or_folder_that_cannot_be_read_keeps_everything() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1))]), after(0.0));
    let unreadable = Content::Unreadable("Permission denied".into());
    set.update(Snapshot::Files([("a.yaml".to_owned(), unreadable.into())].into()), after(1.0));
    assert_eq!(services(&set), ["a:1"]);
    assert_eq!(
        issues(&set),
        [
            "file a.yaml: Permission denied; the objects read from it before stay in force (since 2025-11-24T16:00:01Z)"
        ]
    );
    set.update(snapshot(&[("a.yaml", &service("a", 1))]), after(2.0));
    for seconds in [3.0, 60.0] {
        let cause = "No such file or directory".into();
        set.update(Snapshot::Unreadable { path: "/etc/socklb".into(), cause }, after(seconds));
        assert_eq!(services(&set), ["a:1"]);
        assert_eq!(
            issues(&set),
            [
                "file /etc/socklb: No such file or directory; the objects read from it before stay in force (since \
                 2025-11-24T16:00:03Z)"
            ]
        );
    }
    let unchanged = Content::Unchanged.into();
    set.update(Snapshot::Files([("a.yaml".to_owned(), unchanged)].into()), after(61.0));
    assert_eq!((services(&set), issues(&set)), (vec!["a:1".to_owned()], vec![]));
}

/// A folder that is removed and recreated: `rm -r` first removes its files, and refilling it takes time.
/// While nothing can be read, the waiting time for removals stands still.
#[test]
fn a_folder_that_is_removed_and_made_anew_loses_nothing() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 1))]), after(0.0));
    // One file is removed, one is rewritten without its object; then the folder is removed.
    set.update(snapshot(&[("b.yaml", "")]), after(1.0));
    let cause = "No such file or directory".into();
    set.update(Snapshot::Unreadable { path: "/etc/socklb".into(), cause }, after(1.1));
    // It exists again after ten seconds, and is filled a moment later.
    set.update(snapshot(&[]), after(11.0));
    assert_eq!(services(&set), ["a:1", "b:1"]);
    set.update(snapshot(&[("a.yaml", &service("a", 2))]), after(11.5));
    assert_eq!(services(&set), ["a:2", "b:1"]);
    assert!(set.take_gone().is_empty());
    // What does not return is removed at last.
    set.update(snapshot(&[("a.yaml", &service("a", 2))]), after(14.0));
    assert_eq!(services(&set), ["a:2"]);
    assert_eq!(set.take_gone().len(), 1);
}

/// Of two definitions the one in the first file counts, wherever the change was; if it goes, the other
/// counts.
#[test]
fn an_object_that_is_defined_twice() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("b.yaml", &service("web", 2))]), after(0.0));
    assert_eq!(services(&set), ["web:2"]);
    let both = service("web", 1) + &service("web", 9);
    set.update(snapshot(&[("a.yaml", &both), ("b.yaml", &service("web", 2))]), after(1.0));
    assert_eq!(services(&set), ["web:1"]);
    assert_eq!(
        issues(&set),
        [
            "a.yaml:7: Service default/web: is already defined at a.yaml:2; this one is ignored",
            "b.yaml:2: Service default/web: is already defined at a.yaml:2; this one is ignored",
        ]
    );
    set.update(snapshot(&[("b.yaml", &service("web", 2))]), after(2.0));
    assert_eq!((services(&set), issues(&set)), (vec!["web:2".to_owned()], vec![]));
    settle(&mut set, 10.0);
    assert_eq!((services(&set), set.take_gone()), (vec!["web:2".to_owned()], vec![]));
}

/// The objects of a renamed file belong to the new name from the first reading on.
#[test]
fn a_file_that_is_renamed_loses_nothing() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("b.yaml", &(service("a", 1) + &service("b", 1)))]), after(0.0));
    // To a name that sorts before, then to one that sorts after, with changes.
    for (seconds, name, port) in [(1.0, "a.yaml", 2), (2.0, "c.yaml", 3)] {
        set.update(snapshot(&[(name, &(service("a", port) + &service("b", port)))]), after(seconds));
        let expected = (vec![format!("a:{port}"), format!("b:{port}")], vec![], 1);
        assert_eq!((services(&set), issues(&set), set.n_files()), expected, "{name}");
    }
    settle(&mut set, 20.0);
    assert_eq!(services(&set), ["a:3", "b:3"]);
    // One of two moves to another file, with a reading in between.
    set.update(snapshot(&[("c.yaml", &service("b", 3))]), after(21.0));
    assert_eq!(services(&set), ["a:3", "b:3"]);
    set.update(snapshot(&[("c.yaml", &service("b", 3)), ("d.yaml", &service("a", 4))]), after(21.5));
    assert_eq!(services(&set), ["a:4", "b:3"]);
    settle(&mut set, 40.0);
    assert_eq!((services(&set), set.take_gone()), (vec!["a:4".to_owned(), "b:3".to_owned()], vec![]));
}

fn body(name: &str, port: u32) -> Body {
    let objects = parse("a.yaml", &service(name, port), None).unwrap();
    objects[0].body.clone()
}

/// What an earlier agent served is served until the content of all files is known.
#[test]
fn what_was_served_last_stands_in_for_what_cannot_be_read() {
    let mut set = FileSet::new(None);
    set.expect([body("a", 1), body("b", 1), body("c", 1)], after(0.0));
    set.update(snapshot(&[("a.yaml", "a: b: c"), ("b.yaml", &service("b", 2))]), after(0.0));
    for seconds in [1.0, 10.0, 100.0] {
        assert_eq!(services(&set), ["a:1", "b:2", "c:1"]);
        assert_eq!(issues(&set).len(), 1);
        assert!(issues(&set)[0].contains("stay in force (since 2025-11-24T16:00:00Z)"), "{:?}", issues(&set));
        settle(&mut set, seconds);
    }
    // Repaired, and no file has `c`, which is removed after the waiting time.
    set.update(snapshot(&[("a.yaml", &service("a", 3)), ("b.yaml", &service("b", 2))]), after(101.0));
    assert_eq!((services(&set), issues(&set)), (vec!["a:3".into(), "b:2".into(), "c:1".into()], vec![]));
    let (due, _) = set.next_reread().unwrap();
    assert_eq!(due, after(102.0).at, "counted from the first complete reading");
    settle(&mut set, 102.0);
    assert_eq!(services(&set), ["a:3", "b:2"]);
    let gone: Vec<String> = set.take_gone().iter().map(ToString::to_string).collect();
    assert_eq!(
        gone,
        ["Service default/c is no longer served: no manifest holds what an earlier agent served"]
    );
    assert_eq!(set.next_reread(), None);
}

#[test]
fn what_was_served_last_and_is_nowhere_goes_soon() {
    let mut set = FileSet::new(None);
    set.expect([body("a", 1), body("b", 1)], after(0.0));
    set.update(snapshot(&[("b.yaml", &service("b", 2))]), after(0.0));
    assert_eq!((services(&set), issues(&set)), (vec!["a:1".to_owned(), "b:2".to_owned()], vec![]));
    settle(&mut set, 2.0);
    assert_eq!((services(&set), set.take_gone().len()), (vec!["b:2".to_owned()], 1));
}

#[test]
fn unknown_kinds_are_told_each_time_and_never_twice_defined() {
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n";
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", secret), ("b.yaml", secret)]), after(0.0));
    assert_eq!(
        issues(&set),
        [
            "a.yaml:1: Secret a: unknown kind; it is ignored",
            "b.yaml:1: Secret a: unknown kind; it is ignored"
        ]
    );
}

#[test]
fn the_store_is_told_only_of_changes() {
    let mut set = FileSet::new(None);
    let mut store = Store::new();
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]), after(0.0));
    assert_eq!(set.apply(&mut store).services.len(), 2);
    assert!(set.apply(&mut store).is_empty());
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 3))]), after(1.0));
    assert_eq!(set.apply(&mut store).services, [ServiceKey::new("default", "b")].into());
    set.update(snapshot(&[("a.yaml", &service("a", 1))]), after(2.0));
    assert!(set.apply(&mut store).is_empty());
    settle(&mut set, 4.0);
    assert_eq!(set.apply(&mut store).services, [ServiceKey::new("default", "b")].into());
}
