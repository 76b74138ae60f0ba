//! Finding the cgroup v2 hierarchy.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{KernelError, mountinfo::mounts};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Finds the root of the cgroup v2 hierarchy from `/proc/self/mountinfo`, also on hosts that mount v1 beside it.
///
/// Does not promise that it is the host's root: in a container with a private cgroup namespace it is not.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if none is mounted.
pub fn find_root() -> Result<PathBuf, KernelError> {
    let mountinfo = fs::read(MOUNTINFO).map_err(|_unreadable| KernelError::NoCgroup)?;
    root_in(&mountinfo).ok_or(KernelError::NoCgroup)
}

/// Whether cgroup v1 hierarchies are mounted beside it. `false` if that cannot be read.
#[must_use]
pub fn is_beside_v1() -> bool {
    let mountinfo = fs::read(MOUNTINFO).unwrap_or_default();
    mounts(&mountinfo).any(|mount| mount.file_system == b"cgroup")
}

/// The mount point of the first cgroup2 mount in the text of a mountinfo file.
fn root_in(mountinfo: &[u8]) -> Option<PathBuf> {
    mounts(mountinfo).find(|mount| mount.file_system == b"cgroup2").map(|mount| mount.point)
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
        assert_eq!(root_in(unified.as_bytes()), Some("/sys/fs/cgroup".into()));
        let hybrid = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 29 0:28 / /sys/fs/cgroup/unified rw master:1 shared:2 - cgroup2 cgroup2 rw\n";
        assert_eq!(root_in(hybrid.as_bytes()), Some("/sys/fs/cgroup/unified".into()));
        let odd = "31 29 0:28 / /mnt/a\\040b rw - cgroup2 cgroup2 rw\n";
        assert_eq!(root_in(odd.as_bytes()), Some("/mnt/a b".into()));
    }

    #[test]
    fn without_cgroup_v2_there_is_none() {
        assert_eq!(root_in(b"30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\nnonsense\n"), None);
    }
}
