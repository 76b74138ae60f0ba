//! Namespaces, a cgroup, file systems and veth pairs of the demo.
//!
//! # Purpose
//!
//! [`Scenery::enter`] moves the calling thread into its own mount and network namespace: the node. It gives
//! the node its addresses and makes one network namespace per pod, connected to the node by a veth pair.
//!
//! # Invariants
//!
//! - No namespace has a default route: a call that is not redirected fails at once and cannot leave.
//! - Nothing is attached to a cgroup that existed before.
//! - Threads, processes and file descriptors hold the namespaces, and the namespace holds the mounts: they
//!   vanish however the demo exits. A `kill -9` leaves an empty cgroup behind, and nothing else.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use lb_netns::NetNs;
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::manifests::{NODE, PODS, Pod};

/// The usual mount point of BPF file systems, so that commands need no `--pin-path`.
const BPF_FS: &str = "/sys/fs/bpf";
/// Directories over which the demo may mount a file system, in order of preference. A new directory would
/// survive a `kill -9`, and cannot be made on a read-only root.
const COVERED: [&str; 3] = ["/mnt", "/run", "/tmp"];
/// Maximum number of names tried for the cgroup.
const MAX_NAMES: u32 = 100;
/// How long to wait until the last process leaves the cgroup.
const LEAVING: Duration = Duration::from_secs(2);

/// The namespaces of the calling thread, and their contents.
#[derive(Debug)]
pub(super) struct Scenery {
    /// The clients' cgroup. Dropping this value removes it.
    pub cgroup: Cgroup,
    /// The network namespace of each pod.
    pub pods: Vec<(Pod, NetNs)>,
    /// The agent's manifests.
    pub manifests: PathBuf,
    /// The agent's `--pin-path`.
    pub pins: PathBuf,
    /// The agent's `--state-dir`.
    pub state: PathBuf,
    /// What the agent prints.
    pub log: PathBuf,
}

impl Scenery {
    /// Moves the calling thread, and threads and processes that it starts later, into new namespaces. The
    /// thread cannot return.
    pub(super) fn enter(cgroup_root: &Path) -> Result<Self> {
        let cgroup = Cgroup::create(cgroup_root)?;
        unshare(CloneFlags::CLONE_NEWNS)
            .map_err(|errno| privileged(errno.into(), "making a mount namespace"))?;
        let node = NetNs::enter_new().map_err(|error| privileged(error, "making a network namespace"))?;
        // Mount events must not propagate in either direction between the host and the demo.
        mount_at(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)
            .context("in a chroot, its root must be a mount point")?;
        let temporary = env::temp_dir();
        let own = COVERED
            .iter()
            .map(Path::new)
            .chain([temporary.as_path()])
            .find(|path| path.is_dir())
            .with_context(|| format!("no directory to mount a file system on: make one of {COVERED:?}"))?;
        mount_at(Some("tmpfs"), own, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755,size=64m"))?;
        let (manifests, state) = (own.join("manifests"), own.join("state"));
        let mut bpf_fs = PathBuf::from(BPF_FS);
        if !bpf_fs.is_dir() {
            bpf_fs = own.join("bpf");
            make_dir(&bpf_fs)?;
        }
        mount_at(Some("bpf"), &bpf_fs, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0700"))?;
        make_dir(&manifests)?;
        make_dir(&state)?;
        let pods = wire(&node).context("cannot connect the namespaces: CAP_NET_ADMIN is needed")?;
        Ok(Self { cgroup, pods, manifests, pins: bpf_fs.join("socklb"), state, log: own.join("agent.log") })
    }
}

/// Gives the node its addresses, and makes a connected namespace for each pod.
fn wire(node: &NetNs) -> io::Result<Vec<(Pod, NetNs)>> {
    for address in NODE {
        node.add_address(address)?;
    }
    let wired = PODS.into_iter().map(|pod| {
        let netns = NetNs::new()?;
        node.join(pod.name, &pod.gateways(), &netns, "eth0", &pod.addresses())?;
        Ok((pod, netns))
    });
    wired.collect()
}

/// Mounts in the demo's own mount namespace.
fn mount_at(kind: Option<&str>, path: &Path, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(kind, path, kind, flags, data).map_err(|errno| match (kind, errno) {
        (Some("bpf"), Errno::ENODEV) => {
            anyhow!("this kernel has no BPF file system: it must be built with CONFIG_BPF_SYSCALL=y")
        }
        _ => privileged(errno.into(), &format!("mounting on {}", path.display())),
    })
}

/// Adds the remedy for an operation that root may not do in a container.
fn privileged(error: io::Error, what: &str) -> anyhow::Error {
    let context = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("{what} needs CAP_SYS_ADMIN: in a container, start it with --privileged")
        }
        _ => what.to_owned(),
    };
    anyhow!(error).context(context)
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))
}

/// A cgroup made by the demo.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    parent: PathBuf,
}

impl Cgroup {
    fn create(parent: &Path) -> Result<Self> {
        let mut path = parent.join(format!("socklb-demo-{}", process::id()));
        // A killed demo, or one in a container with the same process id, may have left this name.
        for n in 2.. {
            match fs::create_dir(&path) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && n < MAX_NAMES => {
                    path.set_file_name(format!("socklb-demo-{}-{n}", process::id()));
                }
                Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                    bail!("{} is read-only: in a container, start it with --privileged", parent.display())
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot make the cgroup {}", path.display()));
                }
            }
        }
        Ok(Self { path, parent: parent.to_owned() })
    }

    /// Its directory.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves remaining processes, such as a user's shell, to the parent cgroup.
    fn empty(&self) {
        let inside = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for process in inside.lines() {
            // It may have exited meanwhile.
            let _gone = fs::write(self.parent.join("cgroup.procs"), process);
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A killed client counts until it has exited.
        let pause = Duration::from_millis(10);
        let mut waited = Duration::ZERO;
        while fs::remove_dir(&self.path).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
            && waited < LEAVING
        {
            self.empty();
            thread::sleep(pause);
            waited += pause;
        }
    }
}
