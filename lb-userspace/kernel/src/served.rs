//! Which cgroups the programs serve.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _, path::Path};

/// Largest number of cgroups read: an order of magnitude above a full node.
const MAX_DIRECTORIES: usize = 100_000;

/// The ids of a cgroup and its descendants, without the subtrees of `excluded`. A cgroup created or removed
/// meanwhile may be missing.
///
/// An id is the inode number of the directory (kernfs), even where a cgroup namespace or a container shows
/// only a part.
pub(super) fn cgroups(root: &Path, excluded: &BTreeSet<u64>) -> BTreeSet<u64> {
    let (mut found, mut level) = (BTreeSet::new(), vec![root.to_owned()]);
    while !level.is_empty() && found.len() < MAX_DIRECTORIES {
        level.retain(|path| {
            let id = fs::metadata(path).map(|data| data.ino()).ok().filter(|id| !excluded.contains(id));
            id.is_some_and(|id| found.insert(id))
        });
        let entries = level.iter().filter_map(|path| fs::read_dir(path).ok()).flatten().flatten();
        let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        level = entries.filter(is_directory).map(|entry| entry.path()).collect();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_an_excluded_cgroup_is_not_served() {
        let root = tempfile::tempdir().unwrap();
        for path in ["a/b", "c/d/e"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let id = |path: &str| fs::metadata(root.path().join(path)).unwrap().ino();
        let all = ["", "a", "a/b", "c", "c/d", "c/d/e"].map(id);
        assert_eq!(cgroups(root.path(), &BTreeSet::new()), all.into());
        assert_eq!(cgroups(root.path(), &[id("c/d"), 1].into()), ["", "a", "a/b", "c"].map(id).into());
        assert!(cgroups(root.path(), &[id("")].into()).is_empty());
        assert!(cgroups(Path::new("/nonexistent"), &BTreeSet::new()).is_empty());
    }
}
