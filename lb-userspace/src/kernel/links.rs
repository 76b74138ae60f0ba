//! Where the pinned links are attached.

use std::{
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use super::{Features, cgroup, pins, syscall};

/// The largest number of directories that are looked at for a cgroup: an order of magnitude above a full node.
const MAX_DIRECTORIES: usize = 100_000;

/// A link that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The program in it.
    pub program_id: u32,
    /// The directory of its cgroup, if it was found.
    pub cgroup: Option<PathBuf>,
    /// Whether the kernel lists the program among those that it runs for the cgroup; `None` if it was not asked.
    pub is_effective: Option<bool>,
}

/// Why a link is not attached, or nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum LinkProblem {
    /// There is no such pin.
    #[error("nothing is pinned under this name")]
    Missing,
    /// There is no such pin, and this kernel needs none (docs/MAPS.md).
    #[error("not used on this kernel")]
    NotNeeded,
    /// Its cgroup was removed, which detaches for good.
    #[error("its cgroup is gone: start the agent anew after `socklb cleanup`")]
    Detached,
    /// The kernel does not tell.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Looks at the link of each hook. Its cgroup is looked for in `below`, or else in the whole hierarchy.
#[must_use]
pub fn look(pin_path: &Path, below: Option<&Path>) -> Vec<(&'static str, Result<Link, LinkProblem>)> {
    let needed: Vec<&str> = pins::hooks(Features::probe()).collect();
    let root = below.map(Path::to_owned).or_else(|| cgroup::find_root().or_else(|_| cgroup::find_any()).ok());
    let mut known: Option<(u64, Option<PathBuf>)> = None;
    let mut place = |id: u64| {
        // All are attached to one cgroup, as a rule.
        if known.as_ref().is_none_or(|(known, _)| *known != id) {
            known = Some((id, root.as_deref().and_then(|root| directory_of(id, root))));
        }
        known.as_ref().and_then(|(_, path)| path.clone())
    };
    pins::HOOKS
        .into_iter()
        .map(|hook| {
            let link = look_at(&pin_path.join(hook), &mut place);
            let is_needed = needed.contains(&hook);
            (
                hook,
                link.map_err(|problem| match problem {
                    LinkProblem::Missing if !is_needed => LinkProblem::NotNeeded,
                    other => other,
                }),
            )
        })
        .collect()
}

fn look_at(pin: &Path, place: &mut impl FnMut(u64) -> Option<PathBuf>) -> Result<Link, LinkProblem> {
    let link = syscall::open_pin(pin).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LinkProblem::Missing,
        _ => error.into(),
    })?;
    let info = syscall::cgroup_link(link.as_fd())?;
    if info.cgroup_id == 0 {
        return Err(LinkProblem::Detached);
    }
    let cgroup = place(info.cgroup_id);
    let is_effective = cgroup.as_ref().and_then(|path| {
        let directory = fs::File::open(path).ok()?;
        let programs = syscall::programs_of(directory.as_fd(), info.attach_type).ok()?;
        Some(programs.contains(&info.program_id))
    });
    Ok(Link { program_id: info.program_id, cgroup, is_effective })
}

/// The directory of a cgroup by its id, which is its inode number. Level by level: the root is the usual place.
fn directory_of(id: u64, root: &Path) -> Option<PathBuf> {
    let (mut level, mut n_seen) = (vec![root.to_owned()], 0);
    while !level.is_empty() && n_seen < MAX_DIRECTORIES {
        n_seen += level.len();
        if let Some(found) = level.iter().find(|path| fs::metadata(path).is_ok_and(|data| data.ino() == id)) {
            return Some(found.clone());
        }
        level = level.iter().filter_map(|path| fs::read_dir(path).ok()).flat_map(directories).collect();
    }
    None
}

fn directories(entries: fs::ReadDir) -> Vec<PathBuf> {
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.flatten().filter(is_directory).map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_found_by_its_inode() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        for path in [root.path(), &deep] {
            let id = fs::metadata(path).unwrap().ino();
            assert_eq!(directory_of(id, root.path()).as_deref(), Some(path));
        }
        assert_eq!(directory_of(0, root.path()), None);
        assert_eq!(directory_of(0, Path::new("/nonexistent")), None);
    }

    #[test]
    fn what_is_not_pinned_is_missing() {
        let nothing = tempfile::tempdir().unwrap();
        let found = look(nothing.path(), None);
        assert_eq!(found.len(), pins::HOOKS.len());
        for (hook, link) in found {
            assert!(matches!(link, Err(LinkProblem::Missing | LinkProblem::NotNeeded)), "{hook}");
        }
    }
}
