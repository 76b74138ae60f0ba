//! Finding the cgroup v2 hierarchy.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::KernelError;

/// Finds the root of the cgroup v2 hierarchy from `/proc/self/mountinfo`, also on hosts that mount v1 beside it.
///
/// Does not promise that it is the host's root: in a container with a private cgroup namespace it is not.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if none is mounted.
pub fn find_root() -> Result<PathBuf, KernelError> {
    let mountinfo =
        fs::read_to_string("/proc/self/mountinfo").map_err(|_unreadable| KernelError::NoCgroup)?;
    root_in(&mountinfo).ok_or(KernelError::NoCgroup)
}

/// Whether cgroup v1 hierarchies are mounted beside it. `false` if that cannot be read.
#[must_use]
pub fn is_beside_v1() -> bool {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mountinfo.lines().any(|line| line.contains(" - cgroup "))
}

/// The mount point of the first cgroup2 mount in the text of a mountinfo file (proc(5)).
fn root_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let file_system = after.split(' ').next()?;
        let mount_point = before.split(' ').nth(4)?;
        (file_system == "cgroup2").then(|| PathBuf::from(unescape(mount_point)))
    })
}

/// Undoes the octal escapes of mountinfo (space, tab, newline, backslash).
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

/// Opens a cgroup directory for attaching.
///
/// # Errors
///
/// [`KernelError::Cgroup`] if it is no directory of a cgroup v2 hierarchy.
pub fn open(path: &Path) -> Result<fs::File, KernelError> {
    let error = |source| KernelError::Cgroup { path: path.to_owned(), source };
    let directory = fs::File::open(path).map_err(error)?;
    let kind = nix::sys::statfs::fstatfs(&directory).map_err(|errno| error(errno.into()))?.filesystem_type();
    if kind == nix::sys::statfs::CGROUP2_SUPER_MAGIC {
        Ok(directory)
    } else {
        Err(error(io::Error::new(io::ErrorKind::InvalidInput, "not on a cgroup v2 file system")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_found_on_unified_and_hybrid_hosts() {
        let unified = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(root_in(unified), Some("/sys/fs/cgroup".into()));
        let hybrid = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 29 0:28 / /sys/fs/cgroup/unified rw master:1 shared:2 - cgroup2 cgroup2 rw\n";
        assert_eq!(root_in(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let odd = "31 29 0:28 / /mnt/a\\040b rw - cgroup2 cgroup2 rw\n";
        assert_eq!(root_in(odd), Some("/mnt/a b".into()));
    }

    #[test]
    fn without_cgroup_v2_there_is_none() {
        assert_eq!(root_in("30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\nnonsense\n"), None);
    }
}
