//! Finds the cgroup v2 hierarchy.
//!
//! # Purpose
//!
//! [`find_root`] returns the cgroup to attach to: that of all processes of the machine or, if the node is
//! itself a container (kind, k3d, minikube's Docker driver, LXC), of the node. [`extent`] returns what a
//! cgroup covers.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fmt, fs, io,
    os::{
        fd::AsRawFd as _,
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use super::{
    KernelError,
    mountinfo::{Mount, mounts, unescape},
};

const MOUNTINFO: &str = "/proc/thread-self/mountinfo";
const OWN_CGROUPS: &str = "/proc/thread-self/cgroup";

/// Inode number of the hierarchy's root, wherever it is mounted: kernfs starts numbering here
/// (`kernfs_create_root`).
const ROOT_INODE: u64 = 1;

/// Largest number of directories read in search of a cgroup: an order of magnitude above a full node.
const MAX_DIRECTORIES: usize = 100_000;

/// Whose processes are in a cgroup or below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Extent {
    /// All processes of the machine.
    Host,
    /// All processes of a node that is a container, including the calling one.
    Node,
    /// The processes of one cgroup among others.
    Cgroup,
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "all processes of this host",
            Self::Node => "all processes of this node, which is itself a container",
            Self::Cgroup => "the processes of this cgroup only",
        })
    }
}

/// Finds the topmost mounted cgroup v2 hierarchy above the calling thread's own cgroup: the machine's on a
/// host, the node's on a node that is a container.
///
/// All mounts count, not only `/sys/fs/cgroup`. In a container with a private cgroup namespace, that one
/// begins at the container's own cgroup: programs attached there would see only that container's calls.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if none is mounted, [`KernelError::OwnCgroup`] if nothing above the own cgroup
/// is visible.
///
/// # Kernel
///
/// 5.5: on earlier kernels, inode numbers do not identify cgroups.
pub fn find_root() -> Result<PathBuf, KernelError> {
    let mountinfo = fs::read(MOUNTINFO).map_err(|_unreadable| KernelError::NoCgroup)?;
    root_among(&mountinfo, &fs::read(OWN_CGROUPS).unwrap_or_default(), inspect)
}

/// A mount point of the cgroup v2 hierarchy or a part of it: enough to create a cgroup in.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if there is none.
pub fn find_any() -> Result<PathBuf, KernelError> {
    let mountinfo = fs::read(MOUNTINFO).map_err(|_unreadable| KernelError::NoCgroup)?;
    visible_mounts(&mountinfo, inspect).next().map(|(mount, _)| mount.point).ok_or(KernelError::NoCgroup)
}

/// As [`find_root`], or else a part of the hierarchy: enough to search for cgroups.
///
/// # Errors
///
/// [`KernelError::NoCgroup`] if none is mounted.
pub fn find_widest() -> Result<PathBuf, KernelError> {
    find_root().or_else(|_part_of_it| find_any())
}

/// The directory of the calling thread's own cgroup, if a visible mount contains it.
#[must_use]
pub fn find_own() -> Option<PathBuf> {
    own_among(&fs::read(MOUNTINFO).ok()?, &fs::read(OWN_CGROUPS).ok()?, inspect)
}

/// What a cgroup's directory covers.
#[must_use]
pub fn extent(directory: &Path) -> Extent {
    let inode = |path: &Path| fs::metadata(path).map(|data| data.ino()).ok();
    match inode(directory) {
        Some(ROOT_INODE) => Extent::Host,
        Some(other) if find_root().is_ok_and(|root| inode(&root) == Some(other)) => Extent::Node,
        _ => Extent::Cgroup,
    }
}

/// What a path leads to.
#[derive(Clone, Copy, Debug)]
struct Inspected {
    /// The mount at the path: not the expected one if something was mounted over it.
    mount: u32,
    inode: u64,
}

fn inspect(path: &Path) -> Option<Inspected> {
    let directory = fs::File::open(path).ok()?;
    let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", directory.as_raw_fd())).ok()?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())?;
    Some(Inspected { mount, inode: directory.metadata().ok()?.ino() })
}

/// The cgroup v2 mounts that no other mount hides, each with its root's inode number.
fn visible_mounts(
    mountinfo: &[u8],
    inspect: impl Fn(&Path) -> Option<Inspected>,
) -> impl Iterator<Item = (Mount<'_>, u64)> {
    mounts(mountinfo).filter(|mount| mount.file_system == b"cgroup2").filter_map(move |mount| {
        let seen = inspect(&mount.point)?;
        (seen.mount == mount.id).then_some((mount, seen.inode))
    })
}

fn root_among(
    mountinfo: &[u8],
    own_cgroups: &[u8],
    inspect: impl Fn(&Path) -> Option<Inspected>,
) -> Result<PathBuf, KernelError> {
    let own = Position::own(own_cgroups);
    let (mut first, mut topmost) = (None, None);
    for (mount, inode) in visible_mounts(mountinfo, inspect) {
        if inode == ROOT_INODE {
            return Ok(mount.point);
        }
        let position = Position::new(&unescape(mount.root));
        let is_higher = topmost.as_ref().is_none_or(|(level, _)| position.level() < *level);
        if is_higher && own.as_ref().is_some_and(|own| own.is_properly_below(&position)) {
            topmost = Some((position.level(), mount.point));
        } else {
            let _the_first_stays = first.get_or_insert(mount.point);
        }
    }
    match (topmost, first) {
        (Some((_, point)), _) => Ok(point),
        (None, Some(path)) => Err(KernelError::OwnCgroup { path }),
        (None, None) => Err(KernelError::NoCgroup),
    }
}

fn own_among(
    mountinfo: &[u8],
    own_cgroups: &[u8],
    inspect: impl Fn(&Path) -> Option<Inspected>,
) -> Option<PathBuf> {
    let own = Position::own(own_cgroups)?;
    visible_mounts(mountinfo, inspect).find_map(|(mount, _)| {
        let way = own.names_below(&Position::new(&unescape(mount.root)))?;
        Some(way.iter().fold(mount.point, |path, name| path.join(OsStr::from_bytes(name))))
    })
}

/// A cgroup as the kernel names it: a path relative to the root of the reader's cgroup namespace, some levels
/// up and then down by names. It goes up no further than necessary.
#[derive(Debug)]
struct Position {
    up: usize,
    down: Vec<Vec<u8>>,
}

impl Position {
    /// Parses a path such as `/a/b` or `/../..`.
    fn new(path: &[u8]) -> Self {
        let mut names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).peekable();
        let up = std::iter::from_fn(|| names.next_if_eq(&b"..".as_slice())).count();
        Self { up, down: names.map(<[u8]>::to_vec).collect() }
    }

    /// Parses the text of `/proc/PID/cgroup`. `None` without cgroup v2.
    fn own(text: &[u8]) -> Option<Self> {
        text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::")).map(Self::new)
    }

    /// Levels below the namespace's root; negative above it. The ancestors of a cgroup all differ in level.
    fn level(&self) -> isize {
        self.down.len().cast_signed() - self.up.cast_signed()
    }

    fn is_properly_below(&self, other: &Self) -> bool {
        // A path that goes further up and then down leads to another subtree.
        let is_above_both = other.up > self.up && other.down.is_empty();
        is_above_both || self.names_below(other).is_some_and(|way| !way.is_empty())
    }

    /// The names from the other cgroup down to this one, if it is the other or below it and the names are
    /// known.
    fn names_below(&self, other: &Self) -> Option<&[Vec<u8>]> {
        if self.up == other.up { self.down.strip_prefix(other.down.as_slice()) } else { None }
    }
}

/// Whether cgroup v1 hierarchies are mounted as well. `false` if that cannot be read.
#[must_use]
pub fn is_beside_v1() -> bool {
    let mountinfo = fs::read(MOUNTINFO).unwrap_or_default();
    mounts(&mountinfo).any(|mount| mount.file_system == b"cgroup")
}

/// Opens a cgroup directory for attaching.
///
/// # Errors
///
/// [`KernelError::Cgroup`] if it is not a directory of a cgroup v2 hierarchy.
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

/// The directories of cgroups by id (inode number), without those not found. Searched level by level, since
/// the root is the usual place.
#[must_use]
pub fn directories_of(ids: &BTreeSet<u64>, root: &Path) -> BTreeMap<u64, PathBuf> {
    let mut found = BTreeMap::new();
    let (mut level, mut n_seen) = (vec![root.to_owned()], 0);
    while !level.is_empty() && found.len() < ids.len() && n_seen < MAX_DIRECTORIES {
        n_seen += level.len();
        for path in &level {
            let id = fs::metadata(path).map(|data| data.ino()).ok().filter(|id| ids.contains(id));
            found.extend(id.map(|id| (id, path.clone())));
        }
        level = level.iter().flat_map(|path| children(path)).collect();
    }
    found
}

/// The child cgroups of a cgroup. Empty if it cannot be read, as after its removal.
#[must_use]
pub fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_directory).map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mount: its id, the mounted part of the hierarchy, and the mount point.
    fn cgroup2(id: u32, root: &str, point: &str) -> String {
        format!("{id} 29 0:28 {root} {point} rw master:1 shared:2 - cgroup2 cgroup2 rw\n")
    }

    /// What a path shows: the last mount there. Its inode number is the machine root's if it is in `hosts`.
    fn seen<'a>(mountinfo: &'a [u8], hosts: &'a [&str]) -> impl Fn(&Path) -> Option<Inspected> + 'a {
        move |path| {
            let last = mounts(mountinfo).filter(|mount| mount.point == path).last()?;
            let inode = if hosts.iter().any(|host| Path::new(host) == path) { ROOT_INODE } else { 4711 };
            Some(Inspected { mount: last.id, inode })
        }
    }

    const V1: &str = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\nnonsense\n";
    const AT: &str = "/sys/fs/cgroup";
    const UNIFIED: &str = "/sys/fs/cgroup/unified";

    #[test]
    fn the_topmost_hierarchy_above_the_own_cgroup_is_found() {
        let own = |path: &str| format!("4:memory:/elsewhere\n0::{path}\n");
        let two = |second: &str, point: &str| cgroup2(31, "/", AT) + &cgroup2(32, second, point);
        for (what, mountinfo, own_cgroups, hosts, expected) in [
            ("a unit of a host", cgroup2(31, "/", AT), own("/system.slice/x"), &[AT][..], Ok(AT)),
            ("a process in the host's root", cgroup2(31, "/", AT), own("/"), &[AT], Ok(AT)),
            ("v1 beside it", V1.to_owned() + &cgroup2(31, "/", UNIFIED), own("/"), &[UNIFIED], Ok(UNIFIED)),
            (
                "a blank in the name",
                cgroup2(31, "/", "/mnt/a\\040b"),
                own("/"),
                &["/mnt/a b"],
                Ok("/mnt/a b"),
            ),
            ("a container", cgroup2(31, "/", AT), own("/"), &[], Err("container's own")),
            ("a container with the host's", two("/../..", "/host"), own("/"), &["/host"], Ok("/host")),
            ("a pod with its node's", two("/../../..", "/host"), own("/"), &[], Ok("/host")),
            ("a pod on a hybrid node", two("/../..", "/host/unified"), own("/"), &[], Ok("/host/unified")),
            ("a unit of a node", cgroup2(31, "/", AT), own("/system.slice/x"), &[], Ok(AT)),
            (
                "a pod with all of three nodes, one in another",
                two("/../..", "/pods")
                    + &cgroup2(33, "/../../../..", "/outer")
                    + &cgroup2(34, "/../../..", "/inner"),
                own("/"),
                &[],
                Ok("/outer"),
            ),
            ("the same twice", two("/../..", "/a") + &cgroup2(33, "/../..", "/b"), own("/"), &[], Ok("/a")),
            (
                "a pod that sees its neighbour",
                two("/../pod2", "/host"),
                own("/"),
                &[],
                Err("container's own"),
            ),
            ("a neighbour far off", two("/../../n2/pod", "/host"), own("/"), &[], Err("container's own")),
            ("moved out of its namespace", two("/../..", "/host"), own("/../x"), &[], Ok("/host")),
            ("moved out, nothing above", two("/../y", "/host"), own("/../x"), &[], Err("container's own")),
            ("moved out, to its parent", two("/..", "/host"), own("/.."), &[], Err("container's own")),
            ("a subtree by name", cgroup2(31, "/n1", AT), own("/n1/pod"), &[], Ok(AT)),
            ("names alike", cgroup2(31, "/n1", AT), own("/n10/pod"), &[], Err("container's own")),
            ("an escaped name", cgroup2(31, "/a\\134x", AT), own("/a\\x/pod"), &[], Ok(AT)),
            (
                "the host's, hidden",
                cgroup2(31, "/../..", "/host") + &cgroup2(32, "/", "/host"),
                own("/"),
                &[],
                Err("container's own"),
            ),
            ("its own cgroup is unknown", two("/../..", "/host"), String::new(), &[], Err("container's own")),
            ("only v1", V1.to_owned(), own("/"), &[], Err("no cgroup v2")),
        ] {
            let mountinfo = mountinfo.as_bytes();
            let found = root_among(mountinfo, own_cgroups.as_bytes(), seen(mountinfo, hosts));
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, Path::new(expected), "{what}"),
                (Err(error), Err(expected)) => {
                    assert!(error.to_string().contains(expected), "{what}: {error}");
                }
                (found, _) => panic!("{what}: {found:?}"),
            }
        }
    }

    #[test]
    fn the_own_cgroup_is_found_by_a_mount_that_holds_it() {
        let pod = cgroup2(31, "/../..", "/host") + &cgroup2(32, "/", AT);
        for (mountinfo, own_cgroups, expected) in [
            (pod.clone(), "0::/", Some(AT.to_owned())),
            (pod.clone(), "0::/a/b", Some(format!("{AT}/a/b"))),
            (pod, "0::/../x", None),
            (cgroup2(31, "/n1", AT), "0::/n1/pod", Some(format!("{AT}/pod"))),
            (cgroup2(31, "/n1", AT), "0::/n2/pod", None),
        ] {
            let mountinfo = mountinfo.as_bytes();
            let found = own_among(mountinfo, own_cgroups.as_bytes(), seen(mountinfo, &[]));
            assert_eq!(found, expected.map(PathBuf::from), "{own_cgroups}");
        }
    }

    #[test]
    fn directories_are_found_by_their_inodes() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        let id = |path: &Path| fs::metadata(path).unwrap().ino();
        let expected = BTreeMap::from([(id(root.path()), root.path().to_owned()), (id(&deep), deep.clone())]);
        assert_eq!(directories_of(&[0, id(root.path()), id(&deep)].into(), root.path()), expected);
        assert!(directories_of(&[0].into(), Path::new("/nonexistent")).is_empty());
    }
}
