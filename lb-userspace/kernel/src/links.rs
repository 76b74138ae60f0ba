//! Where the pinned links are attached.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use lb_common::hooks::HOOKS;

use super::{Features, cgroup, pins, syscall};

/// A link that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The program in it.
    pub program_id: u32,
    /// The directory of its cgroup, if it was found.
    pub cgroup: Option<PathBuf>,
    /// Whether the program is among the cgroup's effective programs; `None` if that is unknown.
    pub is_effective: Option<bool>,
}

/// Why a link is not attached, or why its state is unknown.
#[derive(Debug, thiserror::Error)]
pub enum LinkProblem {
    /// There is no such pin.
    #[error("nothing is pinned under this name")]
    Missing,
    /// There is no such pin, and this kernel or these settings need none (docs/MAPS.md).
    #[error("not used on this kernel or with these settings")]
    NotNeeded,
    /// It was detached, or its cgroup was removed. Such a link cannot be attached again.
    #[error(
        "it was detached, or its cgroup was removed: an agent attaches a new link at its next audit or start"
    )]
    Detached,
    /// A failing system call.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Reads the link of each hook. Its cgroup is searched in `below`, or else in the whole hierarchy.
/// `passive_health` is whether the agent attaches `sock_ops`.
#[must_use]
pub fn read_all(
    pin_path: &Path,
    below: Option<&Path>,
    passive_health: bool,
) -> Vec<(&'static str, Result<Link, LinkProblem>)> {
    let needed: Vec<&str> = pins::hooks(Features::probe(), passive_health).map(|hook| hook.name).collect();
    let root = below.map(Path::to_owned).or_else(|| cgroup::find_widest().ok());
    let mut known: Option<(u64, Option<PathBuf>)> = None;
    let mut place = |id: u64| {
        // Usually all links are attached to one cgroup.
        if known.as_ref().is_none_or(|(known, _)| *known != id) {
            known = Some((
                id,
                root.as_deref().and_then(|root| cgroup::directories_of(&[id].into(), root).remove(&id)),
            ));
        }
        known.as_ref().and_then(|(_, path)| path.clone())
    };
    HOOKS
        .iter()
        .map(|hook| hook.name)
        .map(|hook| {
            let link = read_link(&pin_path.join(hook), &mut place);
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

fn read_link(pin: &Path, place: &mut impl FnMut(u64) -> Option<PathBuf>) -> Result<Link, LinkProblem> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_pinned_is_missing() {
        let nothing = tempfile::tempdir().unwrap();
        let found = read_all(nothing.path(), None, true);
        assert_eq!(found.len(), HOOKS.len());
        for (hook, link) in found {
            assert!(matches!(link, Err(LinkProblem::Missing | LinkProblem::NotNeeded)), "{hook}");
        }
    }
}
