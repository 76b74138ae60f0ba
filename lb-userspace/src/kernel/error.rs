//! What can go wrong between user space and the kernel.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

/// An operation on the kernel failed.
///
/// The display names cause and remedy in one line. [`KernelError::MapFull`] leaves the rest of a plan worth
/// carrying out; after any other error read the image again and plan anew.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The binary was built without the BPF object.
    #[error("this socklb was built without its BPF programs: build it with `cargo xtask build`")]
    NoObject,
    /// Not enough privilege.
    #[error("{what}: not permitted: run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// What was tried.
        what: String,
    },
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or name one with --cgroup"
    )]
    NoCgroup,
    /// The cgroup cannot be opened.
    #[error("--cgroup {}: {source}: name an existing cgroup v2 directory", path.display())]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The directory for pins is not on a BPF file system, or cannot be made.
    #[error("--pin-path {}: {source}: it must be a directory on a BPF file system (`mount -t bpf bpf /sys/fs/bpf`)", path.display())]
    PinPath {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing is pinned there.
    #[error("nothing is pinned under {}: is the agent running, or was another --pin-path used?", path.display())]
    NothingPinned {
        /// The directory.
        path: PathBuf,
    },
    /// The pinned maps have another layout.
    #[error(
        "the maps under {} have layout {found}, this socklb has {ours}: use the socklb that made them, or start an agent of this one",
        path.display()
    )]
    Layout {
        /// The directory.
        path: PathBuf,
        /// What is pinned.
        found: u32,
        /// What this binary writes.
        ours: u32,
    },
    /// Loading the object failed.
    #[error("cannot load the BPF object: {0}")]
    Load(#[from] EbpfError),
    /// The object lacks something that this binary expects.
    #[error("the BPF object has no {kind} `{name}`: it does not belong to this binary")]
    Missing {
        /// `map` or `program`.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A program was not accepted or not attached.
    #[error("program {name}: {source}")]
    Program {
        /// Its name.
        name: &'static str,
        /// The cause.
        source: Box<ProgramError>,
    },
    /// A link could not be pinned, opened or updated.
    #[error("link {name}: {source}")]
    Link {
        /// Its name.
        name: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A map could not be opened or pinned at another place.
    #[error("map {name}: cannot pin it: {source}")]
    Pin {
        /// Its name.
        name: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A map operation failed.
    #[error("map {name}: {source}")]
    Map {
        /// Its name.
        name: &'static str,
        /// The cause.
        source: Box<MapError>,
    },
    /// A map could not be mapped into memory.
    #[error("map {name}: cannot map it into memory: {source}")]
    Mmap {
        /// Its name.
        name: &'static str,
        /// The cause.
        source: nix::errno::Errno,
    },
    /// A hash map has no room.
    #[error("map {name} is full")]
    MapFull {
        /// Its name.
        name: &'static str,
    },
    /// A plan names an entry outside of a map: the plan is of another size than the maps.
    #[error("map {name} has no entry {index}")]
    OutOfRange {
        /// The map.
        name: &'static str,
        /// The entry.
        index: u32,
    },
    /// The thread that waits for grace periods cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// A pin could not be removed or moved.
    #[error("{}: {source}", path.display())]
    Remove {
        /// The pin.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl KernelError {
    /// Wraps a map's error by what it means for the caller.
    pub(super) fn map(name: &'static str, source: MapError) -> Self {
        match errno(&source) {
            // A full hash map answers E2BIG; ENOSPC is what some kernels' preallocated maps answer.
            Some(nix::libc::E2BIG | nix::libc::ENOSPC) => Self::MapFull { name },
            Some(nix::libc::EPERM) => Self::NotPermitted { what: format!("map {name}") },
            _ => Self::Map { name, source: Box::new(source) },
        }
    }
}

/// The error number behind a map error, if it came from a system call.
fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}
