//! The stage: namespaces, a cgroup, file systems and wires that belong to the demo alone.
//!
//! # Purpose
//!
//! [`Scenery::enter`] takes the calling thread into a mount and a network namespace of its own: the node.
//! [`Scenery::wire`] gives the node its addresses and makes one network namespace for each pod, joined to the node
//! by a veth pair.
//!
//! # Invariants
//!
//! - No namespace has a default route: a call that nothing redirects fails on the spot and cannot leave.
//! - Nothing is attached to a cgroup that was there before.
//! - Namespaces are held by threads, processes and file descriptors only, mounts by the namespace: whatever ends
//!   the demo, they go. All that a `kill -9` leaves behind is an empty cgroup.

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

/// Where BPF file systems are mounted by custom, so that commands need no `--pin-path`.
const BPF_FS: &str = "/sys/fs/bpf";
/// Places that the demo may cover with a file system of its own, in order of preference. A new directory would be
/// left behind by a `kill -9`, and cannot be made on a read-only root.
const COVERED: [&str; 3] = ["/mnt", "/run", "/tmp"];
/// How many names are tried for the cgroup.
const MAX_NAMES: u32 = 100;
/// How long to wait for the last process to leave the cgroup.
const LEAVING: Duration = Duration::from_secs(2);

/// The calling thread's own namespaces, and what is in them.
#[derive(Debug)]
pub(super) struct Scenery {
    /// The cgroup of the clients. Removed with this value.
    pub cgroup: Cgroup,
    /// Manifests that the agent serves.
    pub manifests: PathBuf,
    /// The agent's `--pin-path`.
    pub pins: PathBuf,
    /// The agent's `--state-dir`.
    pub state: PathBuf,
}

impl Scenery {
    /// Takes the calling thread, and the threads and processes that it starts from now on, into namespaces of their
    /// own. The thread cannot come back.
    pub(super) fn enter(cgroup_root: &Path) -> Result<Self> {
        let cgroup = Cgroup::create(cgroup_root)?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
            .map_err(|errno| privileged(errno, "making a network namespace and a mount namespace"))?;
        // What is mounted from here on must not spread to the host, and the host's later mounts are no business of
        // the demo.
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

    /// Gives the node its addresses, and makes a namespace for each pod with a wire to it.
    ///
    /// Must run on the thread that [`Self::enter`] took along.
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

/// Names the remedy for what root may not do everywhere.
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
    /// Makes a namespace with nothing in it.
    fn create() -> Result<Self> {
        // A thread enters it and ends; the descriptor stays.
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = made.join().map_err(|_panic| anyhow!("the thread that makes a namespace panicked"))?;
        Ok(Self(file.context("cannot make a network namespace")?))
    }

    /// Runs something on a thread inside the namespace.
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

/// Takes the calling thread into a network namespace.
pub(super) fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setns(netns, CloneFlags::CLONE_NEWNET)?)
}

/// Opens rtnetlink in the calling thread's network namespace, served by the current runtime.
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
    // The address can be used at once: there is nobody who could have the same.
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

/// The prefix of a pod's subnet: its route is the only one to the pod, on either side.
const fn subnet_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

/// A cgroup that the demo made.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    parent: PathBuf,
}

impl Cgroup {
    fn create(parent: &Path) -> Result<Self> {
        let mut path = parent.join(format!("socklb-demo-{}", process::id()));
        // The name may be taken: by a demo that was killed, or by one in a container, where ids are small.
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

    /// Sends whoever is still inside, such as a shell that looks around, where the cgroup was.
    fn empty(&self) {
        let inside = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for process in inside.lines() {
            // It may have ended meanwhile.
            let _gone = fs::write(self.parent.join("cgroup.procs"), process);
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A client that was killed a moment ago counts until it has ended.
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
