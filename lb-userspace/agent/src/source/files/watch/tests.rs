use std::{
    io::Write as _,
    os::unix::fs::symlink,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use tempfile::TempDir;

use super::*;
use crate::source::files::Content;

/// Long enough for a loaded machine, and shorter than the periodic reading, so that the test depends on
/// events.
const SOON: Duration = Duration::from_secs(8);

/// Waits until a snapshot holds exactly these files. The texts of unchanged ones are known from earlier
/// snapshots.
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
    // Replaced by rename, as editors and configuration tools do.
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

/// A mounted `ConfigMap` replaces all files with one rename of a link.
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

/// The path is a link that changes to another folder, which is watched from then on.
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
    // A reading opens the files: if that counted as a change, readings would trigger each other endlessly.
    assert_eq!(fs::read_to_string(path.join("a.yaml")).unwrap(), "1");
    fs::write(path.join(".hidden.yaml"), "1").unwrap();
    assert!(timeout(Duration::from_millis(500), snapshots.readings.recv()).await.is_err());
    // Except on request.
    snapshots.ask(std::collections::BTreeSet::new());
    let reading = timeout(SOON, snapshots.readings.recv()).await.unwrap().unwrap();
    assert!(matches!(reading, (Snapshot::Files(files), _) if files["a.yaml"].content == Content::Unchanged));
}

/// Closing a file after a write is an event, and reported.
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
    let folder = tempfile::tempdir().unwrap();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    let path = folder.path().join("lb");
    fs::create_dir(&path).unwrap();
    let of_parent = inotify.add_watch(folder.path(), OF_PARENT).unwrap();
    let own = inotify.add_watch(&path, OF_PATH).unwrap();
    let mut watched = Watched { own: Some(own), of_parent: Some(of_parent), name: "lb".into() };
    for (wd, name, expected) in [
        (own, Some("a.yaml"), true),
        (own, None, true),
        (own, Some("..data"), true),
        (own, Some("a.json"), true),
        (of_parent, Some("lb"), true),
        (own, Some(".a.yaml.swp"), false),
        (own, Some("notes.txt"), false),
        (own, Some("lb"), false),
        (of_parent, Some("passwd"), false),
        (of_parent, Some("a.yaml"), false),
        (of_parent, None, false),
    ] {
        let event = |mask| InotifyEvent { wd, mask, cookie: 0, name: name.map(OsString::from) };
        assert_eq!(watched.concerns(&event(AddWatchFlags::IN_MODIFY)), expected, "{name:?}");
        assert!(watched.concerns(&event(AddWatchFlags::IN_Q_OVERFLOW)), "{name:?}");
    }
    let ended = InotifyEvent { wd: own, mask: AddWatchFlags::IN_IGNORED, cookie: 0, name: None };
    assert!(watched.concerns(&ended) && watched.own.is_none());
}

/// A busy writer beside the path delays neither readings nor the end of the agent.
#[tokio::test]
async fn writers_beside_the_path_are_not_waited_for() {
    let (folder, path) = folder();
    let is_over = Arc::new(AtomicBool::new(false));
    // Each write's event differs from the last, so the kernel does not merge them.
    let writers: Vec<_> = ["one.log", "two.log", "manifests/.busy"]
        .map(|name| {
            let (file, is_over) = (folder.path().join(name), Arc::clone(&is_over));
            thread::spawn(move || {
                let mut file = fs::File::create(file).unwrap();
                while !is_over.load(Relaxed) {
                    file.write_all(b"x").unwrap();
                    file.set_len(0).unwrap();
                }
            })
        })
        .into();
    let found = async {
        let mut snapshots = watch(&path).unwrap();
        expect(&mut snapshots, &[]).await;
        for version in ["1", "2", "3"] {
            fs::write(path.join("a.yaml"), version).unwrap();
            expect(&mut snapshots, &[("a.yaml", version)]).await;
        }
    };
    let found = timeout(SOON, found).await;
    is_over.store(true, Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    assert!(found.is_ok(), "no manifest was read while others were written beside");
}
