//! The network namespaces of this host.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

use super::mountinfo::mounts;

/// A network namespace. It lives as long as this value.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

/// The namespaces that were found.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// Each once; first that of the calling thread.
    pub found: Vec<Namespace>,
    /// Processes and mounts whose namespace cannot be opened.
    pub n_refused: usize,
}

impl Namespace {
    /// Moves the calling thread there. Meant for threads that end soon: never for one of a pool.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }
}

/// The namespaces of all processes that `/proc` shows, and those that are mounted anywhere (`ip netns add`, container
/// run-times).
///
/// Not found are namespaces that only a file descriptor, a socket or a thread other than a process's first keeps, and, in
/// a PID namespace other than the host's, those of the processes outside.
///
/// # Errors
///
/// If proc(5) is not mounted.
pub fn of_this_host() -> io::Result<Namespaces> {
    let mut namespaces = Namespaces::default();
    let mut known = BTreeSet::new();
    add(&mut namespaces, &mut known, Path::new("/proc/thread-self/ns/net"));
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        if entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            add(&mut namespaces, &mut known, &entry.path().join("ns/net"));
        }
    }
    for path in mounted(&fs::read("/proc/thread-self/mountinfo")?) {
        add(&mut namespaces, &mut known, &path);
    }
    Ok(namespaces)
}

/// Adds the namespace behind a path, if it is a new one.
fn add(namespaces: &mut Namespaces, known: &mut BTreeSet<(u64, u64)>, path: &Path) {
    let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino());
    let opened = fs::metadata(path).and_then(|metadata| {
        if known.contains(&identity(&metadata)) {
            return Ok(None);
        }
        let file = File::open(path)?;
        // The process may have moved since.
        Ok(known.insert(identity(&file.metadata()?)).then_some(Namespace { file }))
    });
    match opened {
        Ok(namespace) => namespaces.found.extend(namespace),
        // The process has ended, or is one without a namespace: a zombie.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(_refused) => namespaces.n_refused += 1,
    }
}

/// Where network namespaces are mounted.
fn mounted(mountinfo: &[u8]) -> impl Iterator<Item = PathBuf> {
    mounts(mountinfo).filter(|mount| mount.root.starts_with(b"net:[")).map(|mount| mount.point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_namespaces_are_found() {
        let text = b"22 1 0:21 / /proc rw,nosuid - proc proc rw\n\
            41 22 0:4 net:[4026532177] /run/netns/a\\040b rw shared:5 - nsfs nsfs rw\n\
            42 22 0:4 mnt:[4026532178] /run/mntns/c rw - nsfs nsfs rw\n\
            43 22 0:4 net:[4026532179] /run/docker/netns/d\\1 rw - nsfs nsfs rw\n\
            44\n\n";
        let paths: Vec<PathBuf> = ["/run/netns/a b", "/run/docker/netns/d\\1"].map(PathBuf::from).into();
        assert_eq!(mounted(text).collect::<Vec<_>>(), paths);
    }

    #[test]
    fn the_own_namespace_comes_first_and_each_comes_once() {
        let namespaces = of_this_host().unwrap();
        let identity =
            |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino())).unwrap();
        let found: Vec<_> = namespaces.found.iter().map(|namespace| identity(&namespace.file)).collect();
        assert_eq!(found[0], identity(&File::open("/proc/thread-self/ns/net").unwrap()));
        assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), found.len());
    }
}
