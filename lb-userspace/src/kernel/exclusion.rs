//! Cgroups whose calls are left alone.
//!
//! # Purpose
//!
//! [`Exclusion`] writes the maps `excluded` and `excluded_levels`; [`place_of`] and [`pods`] find what to write. The programs look
//! at them only if they were loaded with [`super::Options::excludes`].
//!
//! # Invariants
//!
//! - A level is in the mask for as long as a cgroup at that level is in the map.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::maps::{Array, HashMap, MapData};
use lb_common::limits;

use super::{KernelError, store::open_pinned};

/// Most directories that are looked at for pods: an order of magnitude above a full node.
const MAX_DIRECTORIES: usize = 20_000;
/// How deep below the root pods are looked for. The kubelet's are at 3 to 5.
const MAX_DEPTH: usize = 6;

/// A cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Its id: the inode number of its directory.
    pub id: u64,
    /// Levels below the root of the hierarchy: 1 for a child of it.
    pub level: u32,
}

/// The maps of excluded cgroups.
pub struct Exclusion {
    excluded: HashMap<MapData, u64, u32>,
    levels: Array<MapData, u32>,
}

impl Exclusion {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            excluded: open_pinned(pin_path, "excluded")?,
            levels: open_pinned(pin_path, "excluded_levels")?,
        })
    }

    /// The ids of the cgroups that are excluded.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn ids(&self) -> Result<BTreeSet<u64>, KernelError> {
        let ids: Result<_, _> = self.excluded.keys().collect();
        ids.map_err(|source| KernelError::map("excluded", source))
    }

    /// Excludes these cgroups, with all below them, and no others. Returns whether that changed anything.
    ///
    /// A call that is made meanwhile finds each of them excluded as before or as after.
    ///
    /// # Errors
    ///
    /// A failing system call; [`KernelError::MapFull`] for more than [`limits::MAX_EXCLUDED`], after the oldest were excluded.
    pub fn set(&mut self, wanted: &BTreeSet<Place>) -> Result<bool, KernelError> {
        let failed = |source| KernelError::map("excluded", source);
        let (found, mask) = (self.ids()?, self.mask()?);
        let wanted_mask = wanted.iter().fold(0, |mask, place| mask | 1 << place.level);
        let most = limits::MAX_EXCLUDED as usize;
        let ids: BTreeSet<u64> = wanted.iter().take(most).map(|place| place.id).collect();
        let (gone, new): (Vec<u64>, Vec<u64>) =
            (found.difference(&ids).copied().collect(), ids.difference(&found).copied().collect());
        // The levels first and last: what is excluded before and after is so in between.
        self.set_mask(mask | wanted_mask)?;
        // What goes makes room, also if somebody else has put it there.
        for id in &gone {
            self.excluded.remove(id).map_err(failed)?;
        }
        for id in &new {
            self.excluded.insert(id, 1, 0).map_err(failed)?;
        }
        self.set_mask(wanted_mask)?;
        if wanted.len() > most {
            return Err(KernelError::MapFull { name: "excluded" });
        }
        Ok(!new.is_empty() || !gone.is_empty())
    }

    fn mask(&self) -> Result<u32, KernelError> {
        self.levels.get(&0, 0).map_err(|source| KernelError::map("excluded_levels", source))
    }

    fn set_mask(&mut self, mask: u32) -> Result<(), KernelError> {
        self.levels.set(0, mask, 0).map_err(|source| KernelError::map("excluded_levels", source))
    }
}

/// The place of a cgroup's directory below the root of the hierarchy.
///
/// # Errors
///
/// `NotFound` if there is no such directory; `InvalidInput` if it is not below the root, is the root itself, or is deeper
/// than programs look.
pub fn place_of(root: &Path, directory: &Path) -> io::Result<Place> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let (root, directory) = (fs::canonicalize(root)?, fs::canonicalize(directory)?);
    let below = directory
        .strip_prefix(&root)
        .map_err(|_elsewhere| invalid(format!("not a cgroup below {}", root.display())))?;
    let level = u32::try_from(below.components().count()).unwrap_or(u32::MAX);
    if level == 0 {
        return Err(invalid("the root of all cgroups: nothing would be served".to_owned()));
    }
    if level >= limits::CGROUP_LEVELS {
        return Err(invalid(format!("more than {} levels deep", limits::CGROUP_LEVELS - 1)));
    }
    Ok(Place { id: fs::metadata(&directory)?.ino(), level })
}

/// The cgroups of pods, by the pods' UIDs. A pod without processes on this host has none.
///
/// By the names that the kubelet gives them: `pod` and the UID, with `-` or, below systemd, `_` between its parts. What cannot be
/// read is passed over: cgroups come and go.
#[must_use]
pub fn pods(root: &Path, uids: &BTreeSet<Arc<str>>) -> BTreeMap<Arc<str>, Vec<Place>> {
    let mut found = BTreeMap::<Arc<str>, Vec<Place>>::new();
    if uids.is_empty() {
        return found;
    }
    let (mut level, mut n_seen) = (vec![root.to_owned()], 0);
    for _ in 0..MAX_DEPTH {
        let mut next = Vec::new();
        for directory in level.iter().flat_map(|parent| children(parent)) {
            n_seen += 1;
            match uid_in(&directory, uids) {
                // What is below it is excluded with it.
                Some(uid) => found.entry(Arc::clone(uid)).or_default().extend(place_of(root, &directory)),
                None => next.push(directory),
            }
        }
        if n_seen > MAX_DIRECTORIES {
            break;
        }
        level = next;
    }
    found
}

/// Which of these UIDs a directory is named after.
fn uid_in<'a>(directory: &Path, uids: &'a BTreeSet<Arc<str>>) -> Option<&'a Arc<str>> {
    let name = directory.file_name()?.to_str()?;
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = name.rsplit_once("pod").map(|(_, uid)| uid.replace('_', "-"))?;
    uids.get(uid.as_str())
}

/// The directories in a directory.
fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_directory).map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_from_the_root() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        let id = fs::metadata(&deep).unwrap().ino();
        assert_eq!(place_of(root.path(), &deep).unwrap(), Place { id, level: 2 });
        let deepest = deep.join("c/d/e/f/g/h/i/j/k/l/m/n/o");
        fs::create_dir_all(deepest.join("p")).unwrap();
        assert_eq!(place_of(root.path(), &deepest).unwrap().level, 15);
        for (directory, cause) in [
            (root.path().join("none"), "No such file"),
            (root.path().to_owned(), "nothing would be served"),
            (root.path().join(".."), "not a cgroup below"),
            (deepest.join("p"), "levels deep"),
        ] {
            let error = place_of(root.path(), &directory).unwrap_err().to_string();
            assert!(error.contains(cause), "{}: {error}", directory.display());
        }
    }

    /// With the drivers cgroupfs and systemd, and inside of kind's node.
    #[test]
    fn pods_are_found_by_the_kubelets_names() {
        let uid = |number: u32| -> Arc<str> { format!("0a1b2c3d-1111-2222-3333-00000000000{number}").into() };
        let root = tempfile::tempdir().unwrap();
        for (number, directory) in [
            (1, "kubepods/burstable/podUID/container"),
            (2, "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podUID.slice/cri-1.scope"),
            (3, "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podUID.slice"),
            (4, "kubepods/podUID"),
        ] {
            let name = uid(number).replace('-', if directory.contains(".slice") { "_" } else { "-" });
            fs::create_dir_all(root.path().join(directory.replace("UID", &name))).unwrap();
        }
        let wanted: BTreeSet<Arc<str>> = [1, 2, 3, 5].map(uid).into();
        let found = pods(root.path(), &wanted);
        let levels: Vec<(Arc<str>, Vec<u32>)> = found
            .into_iter()
            .map(|(uid, places)| (uid, places.into_iter().map(|place| place.level).collect()))
            .collect();
        assert_eq!(levels, [(uid(1), vec![3]), (uid(2), vec![3]), (uid(3), vec![3])]);
    }
}
