//! Programs of others that keep ours from being attached.
//!
//! The kernel's rule (`hierarchy_allows_attach` and `__cgroup_bpf_attach` in kernel/bpf/cgroup.c): a link goes beside the programs of its
//! cgroup only if they allow "multi"; of the ancestors, the nearest one with programs decides, which must allow "multi" or
//! "override".

use std::{
    fmt,
    fs::File,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::programs::loaded_programs;
use lb_common::hooks::HookSpec;

use super::{KernelError, cgroup, host, syscall};

/// `BPF_F_ALLOW_OVERRIDE`
const OVERRIDE: u32 = 1;
/// `BPF_F_ALLOW_MULTI`
const MULTI: u32 = 2;

/// Programs of a hook at one level of the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Level {
    cgroup: PathBuf,
    attached: syscall::Attached,
}

/// A program of another that has a hook for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusive {
    /// Its name and id.
    pub program: String,
    /// The cgroup that it is attached to: the one asked for, or one above.
    pub cgroup: PathBuf,
    /// The flags that it is attached with.
    pub flags: &'static str,
}

impl fmt::Display for Exclusive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (program, cgroup) = (&self.program, self.cgroup.display());
        write!(
            f,
            "program {program} is attached to {cgroup} with the flags \"{}\", so that none goes beside it: have it attached with \
             \"multi\" (BPF_F_ALLOW_MULTI), detach it (`bpftool cgroup detach`), or serve another cgroup (--cgroup)",
            self.flags
        )
    }
}

/// The level whose programs refuse a link, of a cgroup's own level and those above it, from below.
fn obstacle(levels: &[Level]) -> Option<&Level> {
    let (own, above) = levels.split_first()?;
    let has_programs = |level: &&Level| !level.attached.programs.is_empty();
    if has_programs(&own) && own.attached.flags & MULTI == 0 {
        return Some(own);
    }
    above.iter().find(has_programs).filter(|nearest| nearest.attached.flags & (MULTI | OVERRIDE) == 0)
}

/// Looks for a program that keeps a link from being made.
///
/// # Errors
///
/// A failing system call; `EINVAL` for a hook that the kernel does not have.
pub fn find(hook: &HookSpec, path: &Path) -> io::Result<Option<Exclusive>> {
    let path = path.canonicalize()?;
    let mut levels = Vec::new();
    for level in path.ancestors() {
        // Above the mount point is another file system.
        let Ok(directory) = cgroup::open(level) else { break };
        let attached = syscall::attached_to(File::as_fd(&directory), hook.attach_type)?;
        levels.push(Level { cgroup: level.to_owned(), attached });
    }
    Ok(obstacle(&levels).map(|level| {
        let id = level.attached.programs.first().copied().unwrap_or_default();
        let flags = if level.attached.flags & OVERRIDE == 0 { "none" } else { "override" };
        Exclusive { program: describe(id), cgroup: level.cgroup.clone(), flags }
    }))
}

/// A program's name, if this process may know it, and id.
fn describe(id: u32) -> String {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id);
    let name = program.and_then(|program| program.name_as_str().map(str::to_owned));
    match name.filter(|name| !name.is_empty()) {
        Some(name) => format!("{name} (id {id})"),
        None => format!("with id {id}"),
    }
}

/// What it means that the kernel does not permit a link.
pub(super) fn refusal(hook: &HookSpec, path: &Path) -> KernelError {
    const NET_ADMIN: u64 = 1 << 12;
    if host::capabilities() & NET_ADMIN == 0 {
        return KernelError::NotPermitted { what: format!("attaching {} to {}", hook.name, path.display()) };
    }
    // Where the levels above cannot be seen, the program is at one of them.
    KernelError::Exclusive { hook: hook.name, cgroup: path.to_owned(), by: find(hook, path).ok().flatten() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_rule() {
        // Flags and number of programs, from the cgroup upwards; which level refuses a link.
        for (levels, refuses) in [
            (&[(0, 0)][..], None),
            (&[(MULTI, 2)], None),
            (&[(0, 1)], Some(0)),
            (&[(OVERRIDE, 1)], Some(0)),
            (&[(0, 0), (0, 1)], Some(1)),
            (&[(0, 0), (OVERRIDE, 1)], None),
            (&[(0, 0), (MULTI, 1), (0, 1)], None),
            (&[(MULTI, 1), (0, 0), (0, 1)], Some(2)),
            (&[(0, 0), (OVERRIDE, 1), (0, 1)], None),
            (&[], None),
        ] {
            let levels: Vec<Level> = levels
                .iter()
                .enumerate()
                .map(|(n, (flags, n_programs))| Level {
                    cgroup: n.to_string().into(),
                    attached: syscall::Attached { flags: *flags, programs: vec![1; *n_programs] },
                })
                .collect();
            assert_eq!(obstacle(&levels), refuses.map(|n: usize| &levels[n]), "{levels:?}");
        }
    }
}
