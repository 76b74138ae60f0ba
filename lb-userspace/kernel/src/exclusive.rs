//! Foreign programs that prevent attaching ours.
//!
//! The kernel's rule (`hierarchy_allows_attach` and `__cgroup_bpf_attach` in kernel/bpf/cgroup.c): a link
//! needs "multi" on the programs of its cgroup, and "multi" or "override" on those of the nearest ancestor
//! with programs.

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

/// A foreign program that excludes others from a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusive {
    /// Its name and id.
    pub program: String,
    /// The cgroup it is attached to: the requested one or an ancestor.
    pub cgroup: PathBuf,
    /// The flags that it is attached with.
    pub flags: &'static str,
}

impl fmt::Display for Exclusive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (program, cgroup) = (&self.program, self.cgroup.display());
        write!(
            f,
            "program {program} is attached to {cgroup} with the flags \"{}\", which excludes other \
             programs: attach it with \"multi\" (BPF_F_ALLOW_MULTI), detach it (`bpftool cgroup detach`), or \
             serve another cgroup (--cgroup)",
            self.flags
        )
    }
}

/// The level whose programs prevent a link. `levels` begin with the cgroup's own and go up.
fn obstacle(levels: &[Level]) -> Option<&Level> {
    let (own, above) = levels.split_first()?;
    let has_programs = |level: &&Level| !level.attached.programs.is_empty();
    if has_programs(&own) && own.attached.flags & MULTI == 0 {
        return Some(own);
    }
    above.iter().find(has_programs).filter(|nearest| nearest.attached.flags & (MULTI | OVERRIDE) == 0)
}

/// Finds a program that prevents a link.
///
/// # Errors
///
/// A failing system call; `EINVAL` for a hook that the kernel lacks.
pub fn find(hook: &HookSpec, path: &Path) -> io::Result<Option<Exclusive>> {
    let path = path.canonicalize()?;
    let mut levels = Vec::new();
    for level in path.ancestors() {
        // Beyond the mount point is another file system.
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

/// A program's id, and its name if this process may read it.
fn describe(id: u32) -> String {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id);
    let name = program.and_then(|program| program.name_as_str().map(str::to_owned));
    match name.filter(|name| !name.is_empty()) {
        Some(name) => format!("{name} (id {id})"),
        None => format!("with id {id}"),
    }
}

/// The error for a link that the kernel does not permit.
pub(super) fn refusal(hook: &HookSpec, path: &Path) -> KernelError {
    const NET_ADMIN: u64 = 1 << 12;
    if host::capabilities() & NET_ADMIN == 0 {
        return KernelError::NotPermitted { what: format!("attaching {} to {}", hook.name, path.display()) };
    }
    // If no visible level has such a program, it is at an invisible one.
    KernelError::Exclusive { hook: hook.name, cgroup: path.to_owned(), by: find(hook, path).ok().flatten() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_rule() {
        // Flags and number of programs, from the cgroup upwards; the level that prevents a link.
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
