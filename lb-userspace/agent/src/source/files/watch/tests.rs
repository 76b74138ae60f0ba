use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::source::files::Content;

/// Long enough for a loaded machine, and shorter than the periodic reading, so that events are what is tested.
const SOON: Duration = Duration::from_secs(8);

/// Waits until a snapshot holds exactly these files, where the texts of unchanged ones are known from before.
async fn expect(watch: &mut Watch, expected: &[(&str, &str)]) {
    let mut known = std::collections::BTreeMap::new();
    let expected: std::collections::BTreeMap<_, _> =
        expected.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    let found = timeout(SOON, async {
        while let Some((snapshot, _)) = watch.readings.recv().await {
            let Snapshot::Files(files) = snapshot else { continue };
            known.retain(|name, _| files.contains_key(name));
            for (name, seen) in files {
                match seen.content {
                    Content::Text(text) => drop(known.insert(name, text)),
                    Content::Unchanged => {
                        let text = expected.get(&name).cloned().unwrap_or_default();
                        known.entry(name).or_insert(text);
                    }
                    Content::Unreadable(cause) => panic!("{name}: {cause}"),
                }
            }
            if known == expected {
                return;
            }
        }
        panic!("the watch ended");
    });
    let in_time = found.await.is_ok();
    assert!(in_time, "found {known:?} instead of {expected:?}");
}

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifests");
    fs::create_dir(&path).unwrap();
    (folder, path)
}

#[tokio::test]
async fn changes_of_a_folder_arrive() {
    let (_folder, path) = folder();
    let mut snapshots = watch(&path).unwrap();
    expect(&mut snapshots, &[]).await;
    // Written in place.
    fs::write(path.join("a.yaml"), "1").unwrap();
    expect(&mut snapshots, &[("a.yaml", "1")]).await;
    fs::write(path.join("a.yaml"), "2").unwrap();
    expect(&mut snapshots, &[("a.yaml", "2")]).await;
    // Exchanged by rename, as editors and configuration tools do.
    fs::write(path.join(".a.yaml.tmp"), "3").unwrap();
    fs::rename(path.join(".a.yaml.tmp"), path.join("a.yaml")).unwrap();
    expect(&mut snapshots, &[("a.yaml", "3")]).await;
    fs::remove_file(path.join("a.yaml")).unwrap();
    expect(&mut snapshots, &[]).await;
}

#[tokio::test]
async fn changes_of_a_single_file_arrive() {
    let (_folder, path) = folder();
    let file = path.join("a.yaml");
    fs::write(&file, "1").unwrap();
    fs::write(path.join("other.yaml"), "x").unwrap();
    let mut snapshots = watch(&file).unwrap();
    expect(&mut snapshots, &[("a.yaml", "1")]).await;
    fs::write(&file, "2").unwrap();
    expect(&mut snapshots, &[("a.yaml", "2")]).await;
    fs::write(path.join("new"), "3").unwrap();
    fs::rename(path.join("new"), &file).unwrap();
    expect(&mut snapshots, &[("a.yaml", "3")]).await;
    // The watch follows the new file, not the one that it replaced.
    fs::write(&file, "4").unwrap();
    expect(&mut snapshots, &[("a.yaml", "4")]).await;
    fs::remove_file(&file).unwrap();
    expect(&mut snapshots, &[]).await;
    fs::write(&file, "5").unwrap();
    expect(&mut snapshots, &[("a.yaml", "5")]).await;
}

/// A mounted `ConfigMap` exchanges all files with one rename of a link.
#[tokio::test]
async fn the_exchange_of_a_mounted_configmap_arrives() {
    let (_folder, path) = folder();
    for (version, text) in [("..1", "one"), ("..2", "two")] {
        fs::create_dir(path.join(version)).unwrap();
        fs::write(path.join(version).join("a.yaml"), text).unwrap();
    }
    symlink("..1", path.join("..data")).unwrap();
    symlink("..data/a.yaml", path.join("a.yaml")).unwrap();
    let mut snapshots = watch(&path).unwrap();
    expect(&mut snapshots, &[("a.yaml", "one")]).await;
    symlink("..2", path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    expect(&mut snapshots, &[("a.yaml", "two")]).await;
}

/// The path is a link that comes to mean another folder; the new folder is watched from then on.
#[tokio::test]
async fn a_path_that_comes_to_mean_another_folder_is_watched_again() {
    let (folder, path) = folder();
    let (link, other) = (folder.path().join("current"), folder.path().join("other"));
    fs::create_dir(&other).unwrap();
    fs::write(path.join("a.yaml"), "1").unwrap();
    fs::write(other.join("a.yaml"), "2").unwrap();
    symlink(&path, &link).unwrap();
    let mut snapshots = watch(&link).unwrap();
    expect(&mut snapshots, &[("a.yaml", "1")]).await;
    symlink(&other, folder.path().join("new")).unwrap();
    fs::rename(folder.path().join("new"), &link).unwrap();
    expect(&mut snapshots, &[("a.yaml", "2")]).await;
    fs::write(other.join("a.yaml"), "3").unwrap();
    expect(&mut snapshots, &[("a.yaml", "3")]).await;
}

#[tokio::test]
async fn a_folder_that_vanishes_and_comes_back_is_watched_again() {
    let (folder, path) = folder();
    let away = folder.path().join("away");
    let mut snapshots = watch(&path).unwrap();
    expect(&mut snapshots, &[]).await;
    fs::rename(&path, &away).unwrap();
    let (unreadable, _) = timeout(SOON, snapshots.readings.recv()).await.unwrap().unwrap();
    assert!(matches!(unreadable, Snapshot::Unreadable { .. }), "{unreadable:?}");
    fs::rename(&away, &path).unwrap();
    expect(&mut snapshots, &[]).await;
    fs::write(path.join("a.yaml"), "1").unwrap();
    expect(&mut snapshots, &[("a.yaml", "1")]).await;
}

#[tokio::test]
async fn without_a_change_there_is_no_snapshot() {
    let (_folder, path) = folder();
    fs::write(path.join("a.yaml"), "1").unwrap();
    let mut snapshots = watch(&path).unwrap();
    expect(&mut snapshots, &[("a.yaml", "1")]).await;
    // A reading opens the files: if that counted as a change, readings would follow one another without end.
    assert_eq!(fs::read_to_string(path.join("a.yaml")).unwrap(), "1");
    fs::write(path.join(".hidden.yaml"), "1").unwrap();
    assert!(timeout(Duration::from_millis(500), snapshots.readings.recv()).await.is_err());
    // But for who asks.
    snapshots.ask(std::collections::BTreeSet::new());
    let reading = timeout(SOON, snapshots.readings.recv()).await.unwrap().unwrap();
    assert!(matches!(reading, (Snapshot::Files(files), _) if files["a.yaml"].content == Content::Unchanged));
}

/// That a program has closed a file is an event, and news.
#[tokio::test]
async fn a_writer_that_is_done_is_told_of() {
    use std::io::Write as _;
    let (_folder, path) = folder();
    let mut snapshots = watch(&path).unwrap();
    let mut writer = fs::File::create(path.join("a.yaml")).unwrap();
    writer.write_all(b"1").unwrap();
    let mut is_open = async |wanted| {
        let found = async {
            while let Some((Snapshot::Files(files), _)) = snapshots.readings.recv().await {
                if files.get("a.yaml").is_some_and(|seen| seen.is_open == wanted) {
                    return;
                }
            }
        };
        timeout(SOON, found).await.unwrap();
    };
    is_open(true).await;
    drop(writer);
    is_open(false).await;
}

#[tokio::test]
async fn a_missing_path_is_an_error_that_names_it() {
    let error = watch("/nonexistent/manifests").unwrap_err();
    assert_eq!(
        error.to_string(),
        "--source file:/nonexistent/manifests: No such file or directory (os error 2): give a manifest file or a folder of them"
    );
    let error = watch("/dev/null").unwrap_err();
    assert!(error.to_string().starts_with("--source file:/dev/null: is neither a file nor a folder: "));
}

#[test]
fn events_that_cannot_change_a_reading_are_left_out() {
    use notify::event::{CreateKind, ModifyKind};
    let concerned = |kind, path: Option<&str>| {
        let mut event = Event::new(kind);
        event.paths = path.map(PathBuf::from).into_iter().collect();
        concerns(Path::new("/etc/lb"), &event)
    };
    let modify = EventKind::Modify(ModifyKind::Any);
    for (kind, path, expected) in [
        (modify, Some("/etc/lb/a.yaml"), true),
        (modify, Some("/etc/lb"), true),
        (modify, Some("/etc/lb/..data"), true),
        (EventKind::Create(CreateKind::Any), Some("/etc/lb/a.json"), true),
        (EventKind::Access(AccessKind::Close(AccessMode::Write)), Some("/etc/lb/a.yaml"), true),
        (EventKind::Other, None, true),
        (modify, Some("/etc/lb/.a.yaml.swp"), false),
        (modify, Some("/etc/lb/notes.txt"), false),
        (modify, Some("/etc/passwd"), false),
        (modify, Some("/etc/lb2/a.yaml"), false),
        (EventKind::Access(AccessKind::Open(AccessMode::Any)), Some("/etc/lb/a.yaml"), false),
        (EventKind::Access(AccessKind::Close(AccessMode::Read)), Some("/etc/lb/a.yaml"), false),
        (EventKind::Access(AccessKind::Read), None, false),
    ] {
        assert_eq!(concerned(kind, path), expected, "{kind:?} {path:?}");
    }
}
