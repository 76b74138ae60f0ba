//! Namespaces, a cgroup, file systems and veth pairs of the demo.
//!
//! # Purpose
//!
//! [`Scenery::enter`] moves the calling thread into its own mount and network namespace: the node.
//! [`Scenery::wire`] gives the node its addresses and makes one network namespace per pod, connected to the
//! node by a veth pair.
//!
//! # Invariants
//!
//! - No namespace has a default route: a call that is not redirected fails at once and cannot leave.
//! - Nothing is attached to a cgroup that existed before.
//! - Threads, processes and file descriptors hold the namespaces, and the namespace holds the mounts: they
//!   vanish however the demo exits. A `kill -9` leaves an empty cgroup behind, and nothing else.

use std::{
    env,
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec,
    packet_route::{
        address::AddressHeaderFlags,
        link::{InfoData, InfoKind, InfoVeth},
    },
};
use tokio::runtime;

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
    /// The agent's manifests.
    pub manifests: PathBuf,
    /// The agent's `--pin-path`.
    pub pins: PathBuf,
    /// The agent's `--state-dir`.
    pub state: PathBuf,
}

impl Scenery {
    /// Moves the calling thread, and threads and processes that it starts later, into new namespaces. The
    /// thread cannot return.
    pub(super) fn enter(cgroup_root: &Path) -> Result<Self> {
        let cgroup = Cgroup::create(cgroup_root)?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
            .map_err(|errno| privileged(errno, "making a network namespace and a mount namespace"))?;
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
        Ok(Self { cgroup, manifests, pins: bpf_fs.join("socklb"), state })
    }

    /// Gives the node its addresses, and makes a connected namespace for each pod.
    ///
    /// Must run on the thread of [`Self::enter`].
    pub(super) async fn wire(&self) -> Result<Vec<(Pod, Netns)>> {
        let node = netlink()?;
        let loopback = index_of("lo")?;
        set_up(&node, loopback).await?;
        for address in NODE {
            add_address(&node, loopback, address, host_prefix(address)).await?;
        }
        let mut pods = Vec::new();
        for pod in PODS {
            let netns = Netns::create()?;
            add_wire(&node, pod.name, &netns).await?;
            let wire = index_of(pod.name)?;
            for address in pod.gateways() {
                add_address(&node, wire, address, subnet_prefix(address)).await?;
            }
            set_up(&node, wire).await?;
            netns.run(async || {
                let pod_side = netlink()?;
                set_up(&pod_side, index_of("lo")?).await?;
                let wire = index_of("eth0")?;
                for address in pod.addresses() {
                    add_address(&pod_side, wire, address, subnet_prefix(address)).await?;
                }
                set_up(&pod_side, wire).await
            })?;
            pods.push((pod, netns));
        }
        Ok(pods)
    }
}

/// Mounts in the demo's own mount namespace.
fn mount_at(kind: Option<&str>, path: &Path, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(kind, path, kind, flags, data).map_err(|errno| match (kind, errno) {
        (Some("bpf"), Errno::ENODEV) => {
            anyhow!("this kernel has no BPF file system: it must be built with CONFIG_BPF_SYSCALL=y")
        }
        _ => privileged(errno, &format!("mounting on {}", path.display())),
    })
}

/// Adds the remedy for an operation that root may not do in a container.
fn privileged(errno: Errno, what: &str) -> anyhow::Error {
    let error = anyhow!(io::Error::from(errno));
    match errno {
        Errno::EPERM | Errno::EACCES => {
            error.context(format!("{what} needs CAP_SYS_ADMIN: in a container, start it with --privileged"))
        }
        _ => error.context(what.to_owned()),
    }
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))
}

/// A network namespace, held by a file descriptor.
#[derive(Debug)]
pub(super) struct Netns(File);

impl Netns {
    /// Makes an empty namespace.
    fn create() -> Result<Self> {
        // A thread enters it and exits; the descriptor keeps it.
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = made.join().map_err(|_panic| anyhow!("the thread that makes a namespace panicked"))?;
        Ok(Self(file.context("cannot make a network namespace")?))
    }

    /// Runs a closure on a thread inside the namespace.
    fn run(&self, inside: impl AsyncFnOnce() -> Result<()> + Send) -> Result<()> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(self.as_fd())?;
                let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(inside())
            });
            thread.join().map_err(|_panic| anyhow!("a thread inside a network namespace panicked"))?
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Moves the calling thread into a network namespace.
pub(super) fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setns(netns, CloneFlags::CLONE_NEWNET)?)
}

/// Opens rtnetlink in the calling thread's network namespace, on the current runtime.
fn netlink() -> Result<Handle> {
    let (connection, handle, _messages) = rtnetlink::new_connection().context("cannot open netlink")?;
    drop(tokio::spawn(connection));
    Ok(handle)
}

fn index_of(interface: &str) -> Result<u32> {
    if_nametoindex(interface).with_context(|| format!("no interface {interface}"))
}

/// Makes a veth pair: `name` here, `eth0` in the other namespace.
async fn add_wire(node: &Handle, name: &str, other: &Netns) -> Result<()> {
    let far_end =
        LinkMessageBuilder::<LinkUnspec>::new().name("eth0").setns_by_fd(other.as_fd().as_raw_fd()).build();
    let wire = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Veth)
        .name(name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
        .build();
    node.link().add(wire).execute().await.with_context(|| {
        format!(
            "cannot make the veth pair {name}: is the kernel built with CONFIG_VETH, and is the module there?"
        )
    })
}

async fn set_up(netlink: &Handle, index: u32) -> Result<()> {
    let up = LinkUnspec::new_with_index(index).up().build();
    netlink.link().set(up).execute().await.with_context(|| format!("cannot set interface {index} up"))
}

async fn add_address(netlink: &Handle, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
    let mut request = netlink.address().add(index, address, prefix);
    // Usable at once: without duplicate address detection, since no other host is on the link.
    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    request.execute().await.with_context(|| {
        let remedy = if address.is_ipv6() { ": is IPv6 switched off (ipv6.disable=1)?" } else { "" };
        format!("cannot add the address {address}{remedy}")
    })
}

/// The prefix of one address alone.
const fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The prefix of a pod's subnet, the only route to the pod, on either side.
const fn subnet_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
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
