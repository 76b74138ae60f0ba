//! Errors between user space and the kernel.

use std::{error::Error, io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use super::exclusive;

/// An operation on the kernel failed.
///
/// The message names cause and remedy in one line.
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
    /// The kernel rejected the programs, and is older than the oldest supported one.
    #[error("{release} is too old: socklb needs Linux 5.10 or later ({cause})")]
    TooOld {
        /// Name and release of the kernel.
        release: String,
        /// What it rejected, in one line.
        cause: String,
    },
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or name one with --cgroup"
    )]
    NoCgroup,
    /// Only a container's own cgroup is mounted: nothing above it is visible.
    #[error(
        "the cgroup v2 hierarchy at {} is this container's own, not its node's: programs attached there \
         would see only this container's calls. Mount the node's /sys/fs/cgroup into the container, at any \
         place, or name a cgroup of it with --cgroup",
        path.display()
    )]
    OwnCgroup {
        /// Where it is mounted.
        path: PathBuf,
    },
    /// The cgroup cannot be opened.
    #[error("--cgroup {}: {source}: name an existing cgroup v2 directory", path.display())]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The pin directory is not on a BPF file system, or cannot be created.
    #[error(
        "--pin-path {}: {source}: it must be a directory on a BPF file system (`mount -t bpf bpf \
         /sys/fs/bpf`)",
        path.display()
    )]
    PinPath {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing is pinned there.
    #[error(
        "nothing is pinned under {}: is the agent running, or was another --pin-path used?",
        path.display()
    )]
    NothingPinned {
        /// The directory.
        path: PathBuf,
    },
    /// A map is not pinned, though others are.
    #[error(
        "map {name} is not pinned under {}: an agent pins it again within its --audit-interval, or when it \
         starts",
        path.display()
    )]
    NotPinned {
        /// Its name.
        name: &'static str,
        /// The directory.
        path: PathBuf,
    },
    /// A pinned map has another layout.
    #[error(
        "map {name} under {} has {}, this socklb has layout {ours}: use the socklb version that created it, \
         or start an agent of this version",
        path.display(),
        found.map_or_else(|| "an unknown layout".to_owned(), |found| format!("layout {found}"))
    )]
    Layout {
        /// The map.
        name: &'static str,
        /// The directory.
        path: PathBuf,
        /// The layout of the pinned map, if it is recorded.
        found: Option<u32>,
        /// The layout of this binary.
        ours: u32,
    },
    /// The sizes of the pinned maps do not belong to one image.
    #[error(
        "the maps under {} have different sizes: if an agent is replacing them, try again in a moment, \
         otherwise start one",
        path.display()
    )]
    Mixed {
        /// The directory.
        path: PathBuf,
    },
    /// Another program excludes further ones from a hook.
    #[error(
        "hook {hook} of {}: {}",
        cgroup.display(),
        by.as_ref().map_or_else(
            || "a program is attached without `multi` to a parent cgroup that is not visible from here: \
                find it on the host with `bpftool cgroup tree`, then detach it or attach it with \
                BPF_F_ALLOW_MULTI".to_owned(),
            exclusive::Exclusive::to_string
        )
    )]
    Exclusive {
        /// The hook.
        hook: &'static str,
        /// The cgroup that was to be served.
        cgroup: PathBuf,
        /// The program, if its cgroup is visible.
        by: Option<exclusive::Exclusive>,
    },
    /// Loading the object failed.
    #[error("cannot load the BPF object: {}", chain(.0))]
    Load(EbpfError),
    /// The object lacks something that this binary expects.
    #[error("the BPF object has no {kind} `{name}`: it does not belong to this binary")]
    Missing {
        /// `map` or `program`.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A program was not loaded or not attached.
    #[error("program {name}: {}", chain(source))]
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
    /// A map could not be opened, or pinned elsewhere.
    #[error("map {name}: cannot open or pin it: {source}")]
    Pin {
        /// Its name.
        name: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Socket storage cannot be listed.
    #[error(
        "map socket_storage: cannot list it: {source}: this needs CAP_BPF and CAP_PERFMON, and a kernel with \
         CONFIG_DEBUG_INFO_BTF"
    )]
    List {
        /// The cause.
        source: io::Error,
    },
    /// A map operation failed.
    #[error("map {name}: {}", map_reason(cause))]
    Map {
        /// Its name.
        name: &'static str,
        /// The cause, which the message explains.
        cause: Box<MapError>,
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
    #[error("map {name} is full: entries without room are left out")]
    MapFull {
        /// Its name.
        name: &'static str,
    },
    /// A plan names an entry outside a map: its sizes are not those of the maps.
    #[error("map {name} has no entry {index}")]
    OutOfRange {
        /// The map.
        name: &'static str,
        /// The entry.
        index: u32,
    },
    /// The kernel does not report the possible CPUs.
    #[error(
        "/sys/devices/system/cpu/possible: {0}: it sizes the counter maps: mount /sys (read-only is enough)"
    )]
    Cpus(io::Error),
    /// The thread that waits for grace periods cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// A pin could not be removed or moved.
    #[error("{}: cannot be removed or moved: {source}", path.display())]
    Remove {
        /// The pin.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl KernelError {
    /// Converts an error of loading the object into a meaningful one. `release` is the kernel's name and
    /// release.
    pub(super) fn load(source: EbpfError, release: &str) -> Self {
        if is_refused(&source) {
            return Self::NotPermitted { what: "loading the BPF object".to_owned() };
        }
        Self::Load(source).or_too_old(release)
    }

    /// The same for an error of one program.
    pub(super) fn program(name: &'static str, source: ProgramError, release: &str) -> Self {
        if is_refused(&source) {
            return Self::NotPermitted { what: format!("loading program {name}") };
        }
        Self::Program { name, source: Box::new(source) }.or_too_old(release)
    }

    /// Whether a release, such as `Linux 5.10.0-32-amd64`, is older than Linux 5.10. `false` for one that
    /// cannot be parsed.
    #[must_use]
    pub fn is_too_old(release: &str) -> bool {
        Self::is_older(release, OLDEST)
    }

    /// Whether a release is older than a version, major and minor. `false` for one that cannot be parsed.
    #[must_use]
    pub fn is_older(release: &str, than: (u32, u32)) -> bool {
        let numbers = release.split(' ').next_back().unwrap_or_default();
        let mut numbers = numbers.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
        matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) < than)
    }

    /// Reports an old kernel as too old, but only once it has rejected something: distributions backport.
    fn or_too_old(self, release: &str) -> Self {
        if !Self::is_too_old(release) {
            return self;
        }
        // The verifier's log may follow on further lines.
        let cause = self.to_string().lines().next().unwrap_or_default().to_owned();
        Self::TooOld { release: release.to_owned(), cause }
    }

    /// Converts a map's error into a meaningful one.
    pub(super) fn map(name: &'static str, source: MapError) -> Self {
        match errno(&source) {
            // A full hash map returns E2BIG; preallocated maps of some kernels return ENOSPC.
            Some(nix::libc::E2BIG | nix::libc::ENOSPC) => Self::MapFull { name },
            Some(nix::libc::EPERM) => Self::NotPermitted { what: format!("map {name}") },
            _ => Self::Map { name, cause: Box::new(source) },
        }
    }
}

/// An error and its causes in one line, each once: some messages include their cause.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut link = error.source();
    while let Some(cause) = link {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        link = cause.source();
    }
    text
}

/// The meaning of a map's error.
fn map_reason(error: &MapError) -> String {
    match error {
        MapError::SyscallError(error)
            if error.call == "BPF_OBJ_GET" && error.io_error.kind() == io::ErrorKind::NotFound =>
        {
            "its pin is missing: restart the agent, which pins it again".to_owned()
        }
        error => chain(error),
    }
}

/// The error number of a map error, if it came from a system call.
fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

/// Whether an error is or was caused by `EPERM`, at any depth.
fn is_refused(error: &(dyn Error + 'static)) -> bool {
    let mut link = Some(error);
    while let Some(error) = link {
        let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if code == Some(nix::libc::EPERM) {
            return true;
        }
        link = error.source();
    }
    false
}

/// The oldest supported kernel.
const OLDEST: (u32, u32) = (5, 10);

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    fn answered(code: i32) -> ProgramError {
        let io_error = io::Error::from_raw_os_error(code);
        ProgramError::SyscallError(SyscallError { call: "bpf_prog_load", io_error })
    }

    #[test]
    fn old_kernels_are_told_by_their_release() {
        for (release, expected) in [
            ("Linux 4.19.0-27-amd64", true),
            ("Linux 5.9.16", true),
            ("Linux 5.10.0-32-amd64", false),
            ("Linux 6.1", false),
            ("Linux 10.0.1", false),
            ("unknown (ENOSYS)", false),
            ("", false),
        ] {
            assert_eq!(KernelError::is_too_old(release), expected, "{release}");
        }
    }

    #[test]
    fn causes_are_named_once_and_a_missing_pin_has_a_remedy() {
        let map = |call, code| {
            let io_error = io::Error::from_raw_os_error(code);
            KernelError::map("services4", MapError::SyscallError(SyscallError { call, io_error }))
        };
        for (error, expected) in [
            (
                map("BPF_OBJ_GET", nix::libc::ENOENT),
                "map services4: its pin is missing: restart the agent, which pins it again",
            ),
            (
                map("BPF_OBJ_GET", nix::libc::EACCES),
                "map services4: `BPF_OBJ_GET` failed: Permission denied (os error 13)",
            ),
            (
                map("bpf_map_lookup_elem", nix::libc::EBADF),
                "map services4: `bpf_map_lookup_elem` failed: Bad file descriptor (os error 9)",
            ),
            (
                KernelError::Link {
                    name: "connect4",
                    source: io::Error::from_raw_os_error(nix::libc::EBUSY),
                },
                "link connect4: Device or resource busy (os error 16)",
            ),
        ] {
            assert_eq!(error.to_string(), expected);
            // As commands print it.
            assert_eq!(chain(&error), expected);
        }
    }

    /// The messages for a user who is not root, and for one whose kernel is too old.
    #[test]
    fn what_the_kernel_refuses_comes_with_a_remedy() {
        let says = |error: KernelError| error.to_string();
        let (old, new) = ("Linux 4.19.0", "Linux 6.1.0");
        let not_root = "loading program connect4: not permitted: run as root, or with CAP_BPF, CAP_NET_ADMIN \
                        and CAP_PERFMON";
        for release in [old, new] {
            assert_eq!(says(KernelError::program("connect4", answered(nix::libc::EPERM), release)), not_root);
        }
        let load = || EbpfError::ProgramError(answered(nix::libc::EPERM));
        assert!(says(KernelError::load(load(), new)).starts_with("loading the BPF object: not permitted"));
        let too_old = says(KernelError::program("getpeername4", answered(nix::libc::EINVAL), old));
        assert!(
            too_old.starts_with("Linux 4.19.0 is too old: socklb needs Linux 5.10 or later"),
            "{too_old}"
        );
        assert!(too_old.contains("getpeername4") && too_old.lines().count() == 1, "{too_old}");
        let other = KernelError::program("getpeername4", answered(nix::libc::EINVAL), new);
        assert!(matches!(other, KernelError::Program { .. }), "{other}");
    }
}
