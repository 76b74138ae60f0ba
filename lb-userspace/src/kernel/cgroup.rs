//! Finding the cgroup v2 hierarchy.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{KernelError, mountinfo::mounts};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Inode number of the root of the hierarchy, wherever it is mounted: kernfs numbers from here (`kernfs_create_root`).
const ROOT_INODE: u64 = 1;

/// Finds the host's root of the cgroup v2 hierarchy from `/proc/self/mountinfo`, also on hosts that mount v1 beside it, and in
/// containers where it is mounted at a second place: in a private cgroup namespace `/sys/fs/cgroup` begins at the container's own
/// cgroup, and programs attached there would see that container's calls only.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if none is mounted, [`KernelError::OwnCgroup`] if what is mounted begins further down.
///
/// # Kernel
///
/// 5.5: before, inode numbers do not tell.
pub fn find_root() -> Result<PathBuf, KernelError> {
    let mountinfo = fs::read(MOUNTINFO).map_err(|_unreadable| KernelError::NoCgroup)?;
    root_among(hierarchies(&mountinfo), |path| fs::metadata(path).ok().map(|data| data.ino()))
}

/// Where a cgroup v2 hierarchy is mounted, or a part of it: enough to make a cgroup of one's own.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if there is none.
pub fn find_any() -> Result<PathBuf, KernelError> {
    let mountinfo = fs::read(MOUNTINFO).map_err(|_unreadable| KernelError::NoCgroup)?;
    hierarchies(&mountinfo).next().ok_or(KernelError::NoCgroup)
}

/// The first of these that is the host's root, by the inode number of each.
fn root_among(
    mut mounted: impl Iterator<Item = PathBuf>,
    inode: impl Fn(&Path) -> Option<u64>,
) -> Result<PathBuf, KernelError> {
    let Some(first) = mounted.next() else { return Err(KernelError::NoCgroup) };
    let is_root = |path: &PathBuf| inode(path) == Some(ROOT_INODE);
    let not_root = KernelError::OwnCgroup { path: first.clone() };
    std::iter::once(first).chain(mounted).find(is_root).ok_or(not_root)
}

/// Whether cgroup v1 hierarchies are mounted beside it. `false` if that cannot be read.
#[must_use]
pub fn is_beside_v1() -> bool {
    let mountinfo = fs::read(MOUNTINFO).unwrap_or_default();
    mounts(&mountinfo).any(|mount| mount.file_system == b"cgroup")
}

/// The mount points of cgroup v2 in the text of a mountinfo file.
fn hierarchies(mountinfo: &[u8]) -> impl Iterator<Item = PathBuf> {
    mounts(mountinfo).filter(|mount| mount.file_system == b"cgroup2").map(|mount| mount.point)
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

    const HYBRID: &str = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                          31 29 0:28 / /sys/fs/cgroup/unified rw master:1 shared:2 - cgroup2 cgroup2 rw\n";

    #[test]
    fn hierarchies_are_found_on_unified_and_hybrid_hosts() {
        let unified = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let odd = "31 29 0:28 / /mnt/a\\040b rw - cgroup2 cgroup2 rw\n";
        for (mountinfo, expected) in
            [(unified, "/sys/fs/cgroup"), (HYBRID, "/sys/fs/cgroup/unified"), (odd, "/mnt/a b")]
        {
            let found: Vec<PathBuf> = hierarchies(mountinfo.as_bytes()).collect();
            assert_eq!(found, [PathBuf::from(expected)]);
        }
    }

    /// In a container the host's root may be mounted beside the container's own.
    #[test]
    fn a_containers_own_hierarchy_is_not_the_hosts() {
        let inode = |path: &Path| Some(if path.starts_with("/host") { ROOT_INODE } else { 4711 });
        let find = |paths: &[&str]| root_among(paths.iter().map(PathBuf::from), inode);
        assert!(matches!(find(&["/sys/fs/cgroup", "/host/cgroup"]), Ok(path) if path.starts_with("/host")));
        let own = find(&["/sys/fs/cgroup"]).unwrap_err().to_string();
        assert!(own.contains("/sys/fs/cgroup") && own.contains("--cgroup"), "{own}");
        assert!(matches!(find(&[]), Err(KernelError::NoCgroup)));
        let v1 = b"30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\nnonsense\n";
        assert_eq!(hierarchies(v1).count(), 0);
    }
}
