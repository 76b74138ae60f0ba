//! The environment of a kernel test: an isolated network, a BPF file system and a cgroup.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use lb_netns::{NetNs, on_a_thread};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use tempfile::TempDir;

use crate::{
    cgroup::ThreadCgroup,
    feature::{Feature, require},
};

/// File descriptors of a test process. All its tests share them: clients, and servers that close connections
/// late.
const N_DESCRIPTORS: u64 = 1 << 16;

/// The environment of one test. It is removed when the test returns or panics. A killed process leaves empty
/// cgroups, which the next one removes.
#[derive(Debug)]
pub struct Sandbox {
    netns: NetNs,
    bpffs: BpfFs,
    cgroup: ThreadCgroup,
}

impl Sandbox {
    /// Runs a test inside a new sandbox, on a new thread.
    ///
    /// The test's thread, and all threads and processes that it starts, are in the sandbox's network
    /// namespace, mount namespace and cgroup.
    ///
    /// # Panics
    ///
    /// If the test panics, or there is no sandbox: see [`crate::require`].
    pub fn run<R: Send>(test: impl FnOnce(&Self) -> R + Send) -> R {
        on_a_thread(|| {
            let sandbox = Self::enter().expect("a sandbox needs root and a cgroup v2 hierarchy");
            test(&sandbox)
        })
    }

    /// Runs a test as [`Self::run`], if this machine can load the programs; see [`require`].
    ///
    /// # Panics
    ///
    /// If the test panics.
    pub fn test(test: impl FnOnce(&Self) + Send) {
        Self::test_with(&[], test);
    }

    /// The same for a test that needs more than the programs.
    ///
    /// # Panics
    ///
    /// If the test panics.
    pub fn test_with(needs: &[Feature], test: impl FnOnce(&Self) + Send) {
        if [&[Feature::Programs], needs].concat().into_iter().all(require) {
            Self::run(test);
        }
    }

    fn enter() -> io::Result<Self> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let wanted = most.max(N_DESCRIPTORS);
        // Without CAP_SYS_RESOURCE the hard limit stays.
        setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted)
            .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, most, most))?;
        let netns = NetNs::enter_new()?;
        let bpffs = BpfFs::mount()?;
        Ok(Self { netns, bpffs, cgroup: ThreadCgroup::enter()? })
    }

    /// The network namespace of the sandbox.
    #[must_use]
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// The cgroup of the sandbox, where programs attach.
    #[must_use]
    pub fn cgroup(&self) -> &ThreadCgroup {
        &self.cgroup
    }

    /// A directory on the sandbox's BPF file system that does not exist yet.
    #[must_use]
    pub fn pin_path(&self) -> PathBuf {
        self.bpffs().join("socklb")
    }

    /// The mount point of the sandbox's BPF file system.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        self.bpffs.directory.path()
    }

    /// Adds addresses to the sandbox's host: servers can listen there, and calls reach them.
    ///
    /// # Panics
    ///
    /// If the kernel refuses.
    pub fn own(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        for ip in addresses {
            self.netns.add_address(ip).unwrap_or_else(|error| panic!("{ip}: {error}"));
        }
    }
}

/// A BPF file system that only the thread that mounted it, and its children, see.
#[derive(Debug)]
struct BpfFs {
    directory: TempDir,
}

impl BpfFs {
    fn mount() -> io::Result<Self> {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        let directory = tempfile::Builder::new().prefix("socklb-test-").tempdir()?;
        mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), NONE)?;
        Ok(Self { directory })
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        // This removes its pins, and with them the attachments.
        let _namespace_ends_anyway = umount2(self.directory.path(), MntFlags::MNT_DETACH);
    }
}
