//! Cgroups whose calls are not served.
//!
//! # Purpose
//!
//! [`Exclusion`] writes the maps `excluded` and `excluded_levels`; [`Hierarchy`] finds their contents. The
//! programs read them only if they were loaded with [`super::Options::excludes`].
//!
//! # Invariants
//!
//! - Levels are counted from the machine's root, as in the programs. Where only a part of the hierarchy is
//!   visible, a cgroup may be at any level from the lowest possible one on.
//! - A level is in the mask as long as a cgroup that may be at that level is in the map.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::maps::{Array, HashMap, MapData};
use lb_common::limits;

use super::{
    KernelError,
    cgroup::{self, Extent},
    layouts::open_pinned,
};

/// Largest number of directories read in search of pods: an order of magnitude above a full node.
const MAX_DIRECTORIES: usize = 20_000;
/// Depth below the root to which pods are searched. The kubelet's are at 3 to 5.
const MAX_DEPTH: usize = 6;

/// A cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CgroupPosition {
    /// Its id: the inode number of its directory.
    pub id: u64,
    /// The levels it may be at, counted from the machine's root: bit n for level n.
    pub levels: u32,
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

    /// The ids of the excluded cgroups.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn ids(&self) -> Result<BTreeSet<u64>, KernelError> {
        let ids: Result<_, _> = self.excluded.keys().collect();
        ids.map_err(|source| KernelError::map("excluded", source))
    }

    /// Excludes exactly these cgroups, with all below them. Returns whether anything changed.
    ///
    /// A concurrent call finds each of them in its former or its new state.
    ///
    /// # Errors
    ///
    /// A failing system call; [`KernelError::MapFull`] for more than [`limits::MAX_EXCLUDED`], after the
    /// oldest were excluded.
    pub fn set(&mut self, wanted: &BTreeSet<CgroupPosition>) -> Result<bool, KernelError> {
        let failed = |source| KernelError::map("excluded", source);
        let (found, mask) = (self.ids()?, self.mask()?);
        let wanted_mask = wanted.iter().fold(0, |mask, place| mask | place.levels);
        let most = limits::MAX_EXCLUDED as usize;
        let ids: BTreeSet<u64> = wanted.iter().take(most).map(|place| place.id).collect();
        let (gone, new): (Vec<u64>, Vec<u64>) =
            (found.difference(&ids).copied().collect(), ids.difference(&found).copied().collect());
        // Levels are set first and cleared last, so that a cgroup excluded before and after is excluded in
        // between.
        self.set_mask(mask | wanted_mask)?;
        // Removals first: they make room, even if the entries are foreign.
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

/// The visible part of the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    root: PathBuf,
    /// Whether it begins at the machine's root.
    is_whole: bool,
}

impl Hierarchy {
    /// Finds the topmost visible hierarchy, or else a part of it.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoCgroup`] if none is mounted.
    pub fn find() -> Result<Self, KernelError> {
        let root = cgroup::find_widest()?;
        let is_whole = cgroup::extent(&root) == Extent::Host;
        Ok(Self { root, is_whole })
    }

    /// Its mount point.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The place of the calling thread's cgroup.
    ///
    /// # Errors
    ///
    /// `NotFound` if it is not visible; `InvalidInput` as [`Self::position_of`], and if it has child cgroups.
    pub fn own_position(&self) -> io::Result<CgroupPosition> {
        let not_found = || io::Error::new(io::ErrorKind::NotFound, "the agent's own cgroup is not visible");
        let id = fs::metadata(cgroup::find_own().ok_or_else(not_found)?)?.ino();
        let directory = cgroup::directories_of(&[id].into(), &self.root).remove(&id).ok_or_else(not_found)?;
        if !cgroup::children(&directory).is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the agent's own cgroup has child cgroups",
            ));
        }
        self.position_of(&directory)
    }

    /// The place of a cgroup's directory.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such directory; `InvalidInput` if it is not below the root, is the root
    /// itself, or is deeper than the programs check.
    pub fn position_of(&self, directory: &Path) -> io::Result<CgroupPosition> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let (root, directory) = (fs::canonicalize(&self.root)?, fs::canonicalize(directory)?);
        let below = directory
            .strip_prefix(&root)
            .map_err(|_elsewhere| invalid(format!("not a cgroup below {}", root.display())))?;
        let n_below = u32::try_from(below.components().count()).unwrap_or(u32::MAX);
        if n_below == 0 {
            return Err(invalid("the root of all cgroups: nothing would be served".to_owned()));
        }
        // The depth of a partial hierarchy below the machine's root is unknown: one level at least.
        let least = if self.is_whole { n_below } else { n_below.saturating_add(1) };
        if least >= limits::CGROUP_LEVELS {
            let deepest = limits::CGROUP_LEVELS - 1;
            return Err(invalid(format!("{least} levels below the machine's root, more than {deepest}")));
        }
        let all_from_there = (u32::MAX << least) & ((1 << limits::CGROUP_LEVELS) - 1);
        let levels = if self.is_whole { 1 << least } else { all_from_there };
        Ok(CgroupPosition { id: fs::metadata(&directory)?.ino(), levels })
    }

    /// The cgroups of pods, by UID. A pod without processes on this host has none.
    ///
    /// Matches the kubelet's names: `pod` and the UID, with `-` or, with systemd, `_` between its parts.
    /// Unreadable directories are skipped.
    #[must_use]
    pub fn pods(&self, uids: &BTreeSet<Arc<str>>) -> BTreeMap<CgroupPosition, PathBuf> {
        let mut found = BTreeMap::new();
        if uids.is_empty() {
            return found;
        }
        let (mut level, mut n_seen) = (vec![self.root.clone()], 0);
        for _ in 0..MAX_DEPTH {
            let mut next = Vec::new();
            for directory in level.iter().flat_map(|parent| cgroup::children(parent)) {
                n_seen += 1;
                if uid_of(&directory).is_some_and(|uid| uids.contains(uid.as_str())) {
                    // Cgroups below it are excluded with it.
                    found.extend(self.position_of(&directory).map(|place| (place, directory)));
                } else {
                    next.push(directory);
                }
            }
            if n_seen > MAX_DIRECTORIES {
                break;
            }
            level = next;
        }
        found
    }
}

/// The UID in a pod directory's name, if it has one. UIDs of static pods are numbers without `-`.
#[must_use]
pub fn uid_of(directory: &Path) -> Option<String> {
    let name = directory.file_name()?.to_str()?;
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = name.rsplit_once("pod")?.1.replace('_', "-");
    let is_uid = uid.len() >= 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    is_uid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_from_the_machines_root() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        let id = fs::metadata(&deep).unwrap().ino();
        let hierarchy = |is_whole| Hierarchy { root: root.path().to_owned(), is_whole };
        assert_eq!(hierarchy(true).position_of(&deep).unwrap(), CgroupPosition { id, levels: 1 << 2 });
        // At level 3 or deeper.
        assert_eq!(hierarchy(false).position_of(&deep).unwrap(), CgroupPosition { id, levels: 0xfff8 });
        let deepest = deep.join("c/d/e/f/g/h/i/j/k/l/m/n/o");
        fs::create_dir_all(deepest.join("p")).unwrap();
        assert_eq!(hierarchy(true).position_of(&deepest).unwrap().levels, 1 << 15);
        for (is_whole, directory, cause) in [
            (true, root.path().join("none"), "No such file"),
            (true, root.path().to_owned(), "nothing would be served"),
            (true, root.path().join(".."), "not a cgroup below"),
            (true, deepest.join("p"), "16 levels below"),
            (false, deepest, "16 levels below"),
        ] {
            let error = hierarchy(is_whole).position_of(&directory).unwrap_err().to_string();
            assert!(error.contains(cause), "{}: {error}", directory.display());
        }
    }

    /// With the drivers cgroupfs and systemd, and in a kind node.
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
        let found = Hierarchy { root: root.path().to_owned(), is_whole: true }.pods(&wanted);
        let found: BTreeSet<(Option<String>, u32)> =
            found.into_iter().map(|(place, path)| (uid_of(&path), place.levels)).collect();
        assert_eq!(found, BTreeSet::from([1, 2, 3].map(|number| (Some(uid(number).to_string()), 1 << 3))));
        assert_eq!(uid_of(Path::new("/libpod-1.scope")), None);
    }
}
