use super::*;
use crate::model::ServiceKey;

/// A Service with a port.
fn service(name: &str, port: u32) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.0.0.1, ports: [{{port: \
         {port}}}]}}\n"
    )
}

fn snapshot(files: &[(&str, &str)]) -> Snapshot {
    let files = files.iter().map(|(name, text)| ((*name).to_owned(), Content::Text((*text).to_owned())));
    Snapshot::Files(files.collect())
}

/// The services in the store, `name:port`.
fn services(set: &FileSet) -> Vec<String> {
    let mut store = Store::new();
    let _ = set.apply(&mut store);
    let name = |service: &crate::model::Service| format!("{}:{}", service.key.name, service.ports[0].port);
    store.services().map(name).collect()
}

fn issues(set: &FileSet) -> Vec<String> {
    set.issues().iter().map(ToString::to_string).collect()
}

#[test]
fn files_come_and_go() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]));
    assert_eq!((services(&set), set.n_files()), (vec!["a:1".to_owned(), "b:2".to_owned()], 2));

    let unchanged = ("b.yaml".to_owned(), Content::Unchanged);
    let changed = ("c.yaml".to_owned(), Content::Text(service("c", 3)));
    set.update(Snapshot::Files([unchanged, changed].into()));
    assert_eq!(services(&set), ["b:2", "c:3"]);
    set.update(snapshot(&[]));
    assert!(services(&set).is_empty());
    assert!(issues(&set).is_empty());
}

/// A broken file keeps what it last gave, and nothing of the broken text; the other files go on.
#[test]
fn a_broken_file_keeps_its_last_good_objects() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]));
    let half = service("new", 5) + &service("a", 1).replace("port: 1", "port: one");
    set.update(snapshot(&[("a.yaml", &half), ("b.yaml", &service("b", 3))]));
    assert_eq!(services(&set), ["a:1", "b:3"]);
    assert_eq!(
        issues(&set),
        [
            "a.yaml:10: file a.yaml: Service default/a: spec.ports[0].port: invalid type: string \"one\", expected i32; \
          the objects read from it before stay in force"
        ]
    );

    set.update(snapshot(&[("a.yaml", &service("a", 7)), ("b.yaml", &service("b", 3))]));
    assert_eq!((services(&set), issues(&set)), (vec!["a:7".to_owned(), "b:3".to_owned()], vec![]));
}

#[test]
fn a_file_that_was_never_good_is_left_out() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", "a: b: c"), ("b.yaml", &service("b", 2))]));
    assert_eq!(services(&set), ["b:2"]);
    assert_eq!(
        issues(&set),
        [
            "a.yaml:1: file a.yaml: mapping values are not allowed in this context at line 1, column 5; the file is left \
          out"
        ]
    );
    set.update(snapshot(&[("b.yaml", &service("b", 2))]));
    assert!(issues(&set).is_empty());
}

#[test]
fn a_file_or_folder_that_cannot_be_read_keeps_everything() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", &service("a", 1))]));
    set.update(Snapshot::Files(
        [("a.yaml".to_owned(), Content::Unreadable("Permission denied".into()))].into(),
    ));
    assert_eq!(services(&set), ["a:1"]);
    assert_eq!(
        issues(&set),
        ["file a.yaml: Permission denied; the objects read from it before stay in force"]
    );
    set.update(snapshot(&[("a.yaml", &service("a", 1))]));
    set.update(Snapshot::Unreadable {
        path: "/etc/socklb".into(),
        cause: "No such file or directory".into(),
    });
    assert_eq!(services(&set), ["a:1"]);
    assert_eq!(
        issues(&set),
        ["file /etc/socklb: No such file or directory; the objects read from it before stay in force"]
    );
    set.update(Snapshot::Files([("a.yaml".to_owned(), Content::Unchanged)].into()));
    assert_eq!((services(&set), issues(&set)), (vec!["a:1".to_owned()], vec![]));
}

/// Of two definitions the one in the first file counts, wherever the change came; the other takes over.
#[test]
fn an_object_that_is_defined_twice() {
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("b.yaml", &service("web", 2))]));
    assert_eq!(services(&set), ["web:2"]);
    let both = service("web", 1) + &service("web", 9);
    set.update(snapshot(&[("a.yaml", &both), ("b.yaml", &service("web", 2))]));
    assert_eq!(services(&set), ["web:1"]);
    assert_eq!(
        issues(&set),
        [
            "a.yaml:7: Service default/web: is already defined at a.yaml:2; this one is ignored",
            "b.yaml:2: Service default/web: is already defined at a.yaml:2; this one is ignored",
        ]
    );
    set.update(snapshot(&[("b.yaml", &service("web", 2))]));
    assert_eq!((services(&set), issues(&set)), (vec!["web:2".to_owned()], vec![]));
}

#[test]
fn unknown_kinds_are_told_each_time_and_never_twice_defined() {
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n";
    let mut set = FileSet::new(None);
    set.update(snapshot(&[("a.yaml", secret), ("b.yaml", secret)]));
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
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]));
    assert_eq!(set.apply(&mut store).services.len(), 2);
    assert!(set.apply(&mut store).is_empty());
    set.update(snapshot(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 3))]));
    assert_eq!(set.apply(&mut store).services, [ServiceKey::new("default", "b")].into());
    set.update(snapshot(&[("a.yaml", &service("a", 1))]));
    assert_eq!(set.apply(&mut store).services, [ServiceKey::new("default", "b")].into());
}
