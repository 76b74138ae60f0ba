//! The network namespaces of this host.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io, iter,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

use super::mountinfo::mounts;

/// A network namespace. This value keeps it alive.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

/// The namespaces that were found.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// Each once; that of the calling thread first.
    pub found: Vec<Namespace>,
    /// Processes and mounts whose namespace cannot be opened, except processes of a namespace that was found.
    pub n_refused: usize,
}

impl Namespace {
    /// Moves the calling thread into the namespace. Use a short-lived thread, never one of a pool.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }
}

/// The namespaces of all processes in `/proc`, and all mounted ones (`ip netns add`, container runtimes).
///
/// Not found: namespaces kept only by a file descriptor, a socket or a thread other than a process's first;
/// in a PID namespace other than the host's, those of processes outside.
///
/// # Errors
///
/// If proc(5) is not mounted.
pub fn of_this_host() -> io::Result<Namespaces> {
    let (mut found, mut known, mut tables, mut refused) =
        (Vec::new(), BTreeSet::new(), BTreeSet::new(), Vec::new());
    let is_process = |entry: &fs::DirEntry| {
        entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let processes = fs::read_dir("/proc")?.flatten().filter(is_process).map(|entry| entry.path());
    for process in iter::once(PathBuf::from("/proc/thread-self")).chain(processes) {
        match open(&mut known, &process.join("ns/net")) {
            Ok(Some(namespace)) => {
                found.push(namespace);
                tables.extend(device_table(&process));
            }
            Ok(None) => {}
            Err(_refused) => refused.push(process),
        }
    }
    // A process that cannot be inspected may be in a known namespace. One that has exited gives the same
    // error (`proc_ns_get_link`).
    let is_elsewhere =
        |process: &PathBuf| device_table(process).map_or(process.exists(), |table| !tables.contains(&table));
    let mut n_refused = refused.into_iter().filter(is_elsewhere).count();
    for path in mounted(&fs::read("/proc/thread-self/mountinfo")?) {
        match open(&mut known, &path) {
            Ok(namespace) => found.extend(namespace),
            Err(_refused) => n_refused += 1,
        }
    }
    Ok(Namespaces { found, n_refused })
}

/// The inode of a process's table of network devices. Each network namespace has its own, readable without
/// privileges.
fn device_table(process: &Path) -> Option<u64> {
    fs::metadata(process.join("net/dev")).ok().map(|data| data.ino())
}

/// Opens the namespace at a path; `None` if it is known or does not exist.
fn open(known: &mut BTreeSet<(u64, u64)>, path: &Path) -> io::Result<Option<Namespace>> {
    let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino());
    let opened = fs::metadata(path).and_then(|metadata| {
        if known.contains(&identity(&metadata)) {
            return Ok(None);
        }
        let file = File::open(path)?;
        // The process may have changed its namespace since.
        Ok(known.insert(identity(&file.metadata()?)).then_some(Namespace { file }))
    });
    match opened {
        // The process has exited, or is a zombie, which has no namespace.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened,
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

    #[test]
    fn a_device_table_tells_a_namespace() {
        let own = device_table(Path::new("/proc/self"));
        assert!(own.is_some());
        assert_eq!(own, device_table(Path::new("/proc/thread-self")));
        assert_eq!(device_table(Path::new("/proc/nobody")), None);
    }
}
