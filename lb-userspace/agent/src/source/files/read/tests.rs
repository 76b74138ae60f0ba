use std::{
    io::Write as _,
    os::unix::fs::{PermissionsExt, symlink},
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use tempfile::TempDir;

use super::*;

fn folder() -> (TempDir, Reader) {
    let folder = tempfile::tempdir().unwrap();
    let reader = Reader::new(folder.path().to_owned());
    (folder, reader)
}

/// The names and contents of a snapshot; `=` means unchanged.
fn found(snapshot: Option<Snapshot>) -> Option<Vec<String>> {
    let Snapshot::Files(files) = snapshot? else { panic!("unreadable") };
    let line = |(name, seen): (String, Seen)| match seen.content {
        Content::Unchanged if seen.is_open => format!("{name} = open"),
        Content::Unchanged => format!("{name} ="),
        Content::Text(text) if seen.is_open => format!("{name} {text} open"),
        Content::Text(text) => format!("{name} {text}"),
        Content::Unreadable(cause) => format!("{name} ! {cause}"),
    };
    Some(files.into_iter().map(line).collect())
}

#[test]
fn only_manifests_are_read() {
    for (name, expected) in [
        ("web.yaml", true),
        ("web.yml", true),
        ("web.json", true),
        ("WEB.YAML", true),
        ("web.backup.yaml", true),
        (".web.yaml", false),
        (".web.yaml.swp", false),
        (".#web.yaml", false),
        ("#web.yaml#", false),
        ("web.yaml~", false),
        ("web.yaml.orig", false),
        ("4913", false),
        ("yaml", false),
        ("..data", false),
        ("", false),
    ] {
        assert_eq!(is_manifest(OsStr::new(name)), expected, "{name}");
    }
}

#[test]
fn a_reading_tells_what_is_new() {
    let (folder, mut reader) = folder();
    // An empty folder is reported once: the first list is complete.
    assert_eq!(found(reader.read(true, None)), Some(vec![]));
    assert_eq!(found(reader.read(true, None)), None);

    fs::write(folder.path().join("a.yaml"), "1").unwrap();
    fs::write(folder.path().join("b.txt"), "1").unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml 1".to_owned()]));
    assert_eq!(found(reader.read(false, None)), None);

    // Of the same length, and within one step of the time stamps.
    fs::write(folder.path().join("a.yaml"), "2").unwrap();
    fs::write(folder.path().join("c.yaml"), "3").unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml 2".to_owned(), "c.yaml 3".to_owned()]));

    fs::rename(folder.path().join("c.yaml"), folder.path().join("a.yaml")).unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml 3".to_owned()]));
    fs::remove_file(folder.path().join("a.yaml")).unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec![]));
    assert_eq!(found(reader.read(true, None)), None);
}

#[test]
fn files_that_are_no_text_are_told() {
    let (folder, mut reader) = folder();
    fs::write(folder.path().join("a.yaml"), b"ok\xff").unwrap();
    let large = File::create(folder.path().join("b.yaml")).unwrap();
    large.set_len(MAX_FILE_LEN + 1).unwrap();
    fs::create_dir(folder.path().join("c.yaml")).unwrap();
    symlink("nowhere", folder.path().join("d.yaml")).unwrap();
    mkfifo(&folder.path().join("e.yaml"), Mode::S_IRUSR).unwrap();
    assert_eq!(
        found(reader.read(true, None)),
        Some(vec![
            "a.yaml ! is not UTF-8 text (byte 3)".to_owned(),
            "b.yaml ! is larger than 64 MiB".to_owned()
        ])
    );
    assert_eq!(found(reader.read(true, None)), None);
}

/// A mounted `ConfigMap`: the files are links through `..data`, which is replaced as a whole.
#[test]
fn symbolic_links_are_followed() {
    let (folder, mut reader) = folder();
    for (version, text) in [("..1", "one"), ("..2", "two")] {
        fs::create_dir(folder.path().join(version)).unwrap();
        fs::write(folder.path().join(version).join("a.yaml"), text).unwrap();
    }
    symlink("..1", folder.path().join("..data")).unwrap();
    symlink("..data/a.yaml", folder.path().join("a.yaml")).unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml one".to_owned()]));
    symlink("..2", folder.path().join("..tmp")).unwrap();
    fs::rename(folder.path().join("..tmp"), folder.path().join("..data")).unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml two".to_owned()]));
}

#[test]
fn a_folder_that_vanishes_is_unreadable_and_a_file_is_removed() {
    let (folder, mut reader) = folder();
    let path = folder.path().join("web.conf");
    fs::write(&path, "1").unwrap();
    let mut single = Reader::new(path.clone());
    // The extension of a single file does not matter.
    assert_eq!(found(single.read(true, None)), Some(vec!["web.conf 1".to_owned()]));
    assert_eq!(found(reader.read(true, None)), Some(vec![]));

    fs::remove_file(&path).unwrap();
    assert_eq!(found(single.read(true, None)), Some(vec![]));
    assert_eq!(found(single.read(true, None)), None);
    fs::write(&path, "1").unwrap();
    assert_eq!(found(single.read(true, None)), Some(vec!["web.conf 1".to_owned()]));

    let moved = folder.path().with_extension("moved");
    fs::rename(folder.path(), &moved).unwrap();
    let Some(Snapshot::Unreadable { cause, .. }) = reader.read(true, None) else { panic!() };
    assert!(cause.contains("No such file"), "{cause}");
    assert_eq!(reader.read(true, None), None);
    fs::write(moved.join("a.yaml"), "1").unwrap();
    fs::rename(&moved, folder.path()).unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml 1".to_owned()]));
}

#[test]
fn settled_files_are_not_opened_again() {
    let (folder, _) = folder();
    let path = folder.path().join("a.yaml");
    fs::write(&path, "1").unwrap();
    let written = fs::metadata(&path).unwrap().ctime();
    let read = |old: &Known, trusts_stamps, now| read_file(&path, Some(old), trusts_stamps, now).unwrap();
    // A digest that does not match the text: a reading of the text finds a change.
    let unread = Known { stamp: None, digest: 7, is_open: false, inode: (0, 0) };
    let (fresh, _) = read(&unread, true, written + 1);
    assert_eq!(fresh.stamp, None);
    let (settled, _) = read(&unread, true, written + 2);
    assert!(settled.stamp.is_some());

    let changed = Content::Text("1".to_owned());
    let other = Known { digest: 7, ..settled };
    assert_eq!(read(&other, true, written + 2).1, Content::Unchanged);
    assert_eq!(read(&other, false, written + 2).1, changed);
    assert_eq!(read(&other, true, written + 1).1, changed);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let touched = fs::metadata(&path).unwrap().ctime();
    assert_eq!(read(&other, true, touched + 2).1, changed);
}

/// An open file is reported, and so is its closing, even if the text is unchanged.
#[test]
fn files_that_are_being_written_are_told() {
    let (folder, mut reader) = folder();
    let path = folder.path().join("a.yaml");
    let mut writer = File::create(&path).unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml  open".to_owned()]));
    assert_eq!(found(reader.read(true, None)), None);
    writer.write_all(b"1").unwrap();
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml 1 open".to_owned()]));
    drop(writer);
    assert_eq!(found(reader.read(true, None)), Some(vec!["a.yaml =".to_owned()]));
    // A request gets an answer, and the files in it are opened.
    assert_eq!(found(reader.read(true, Some(&BTreeSet::new()))), Some(vec!["a.yaml =".to_owned()]));
    let _writer = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let asked = BTreeSet::from(["a.yaml".to_owned()]);
    assert_eq!(found(reader.read(true, Some(&asked))), Some(vec!["a.yaml = open".to_owned()]));
}
