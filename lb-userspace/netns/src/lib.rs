//! Network namespaces, their devices and addresses, and servers inside them.
//!
//! # Invariants
//!
//! - A namespace made here has no default route: what is sent inside stays inside.
//! - Addresses are usable when a function that adds them returns.
#![deny(unsafe_code)]

mod server;

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    panic,
    path::Path,
    thread,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::{InfoData, InfoKind, InfoVeth, LinkMessage},
        route::{RouteMessage, RouteType},
    },
};
use tokio::runtime;

pub use self::server::{Answers, Servers, Socket};

/// The name of the loopback device.
const LOOPBACK: &str = "lo";

/// A network namespace. It is destroyed with the last thread, socket and [`NetNs`] in it.
#[derive(Debug)]
pub struct NetNs {
    file: File,
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl NetNs {
    /// Moves the calling thread to a new namespace with only the loopback device, which is up, and no routes.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_SYS_ADMIN`.
    ///
    /// # Panics
    ///
    /// Inside a tokio runtime.
    pub fn enter_new() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        set_up(LOOPBACK)?;
        Self::current()
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If proc(5) is not mounted.
    pub fn current() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/thread-self/ns/net")? })
    }

    /// Creates a namespace without moving the calling thread.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        on_a_thread(Self::enter_new)
    }

    /// Runs a closure inside the namespace, on a new thread in the caller's cgroup.
    ///
    /// # Panics
    ///
    /// If the closure panics, or the caller may no longer enter the namespace.
    pub fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        on_a_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .unwrap_or_else(|error| panic!("cannot enter a network namespace: {error}"));
            body()
        })
    }

    /// Bind-mounts the namespace at a file, as `ip netns add` does, so that other processes find it. Only the
    /// calling thread's mount namespace shows it.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn mount_at(&self, file: &Path) -> io::Result<()> {
        drop(File::create(file)?);
        let source = format!("/proc/thread-self/fd/{}", self.file.as_raw_fd());
        Ok(mount(Some(source.as_str()), file, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    }

    /// The cookie of the namespace, as programs see it; `None` before kernel 5.14.
    #[must_use]
    pub fn cookie(&self) -> Option<u64> {
        self.run(lb_kernel::syscall::netns_cookie)
    }

    /// Adds an address to the loopback device of the namespace. An address that already exists is fine.
    ///
    /// # Errors
    ///
    /// The kernel's error, with its remedy.
    pub fn add_address(&self, ip: IpAddr) -> io::Result<()> {
        self.run(|| {
            add_address(LOOPBACK, ip, host_prefix(ip))?;
            wait_for_local_route(ip)
        })
    }

    /// Joins this namespace to another with a veth pair. Each end gets addresses in networks of 256.
    ///
    /// # Errors
    ///
    /// The kernel's error, with its remedy: `EOPNOTSUPP` without the module `veth`.
    pub fn join(
        &self,
        name: &str,
        here: &[IpAddr],
        other: &Self,
        other_name: &str,
        there: &[IpAddr],
    ) -> io::Result<()> {
        self.run(|| {
            add_veth(name, other, other_name)?;
            give_addresses(name, here)
        })?;
        other.run(|| give_addresses(other_name, there))
    }

    /// Adds a route to a network by a neighbour.
    ///
    /// # Errors
    ///
    /// The kernel's error: `EEXIST` if there is one, `ENETUNREACH` if the neighbour is on no link.
    pub fn add_route(&self, (network, prefix): (IpAddr, u8), gateway: IpAddr) -> io::Result<()> {
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(network, prefix)
            .and_then(|route| route.gateway(gateway))
            .map_err(io::Error::other)?
            .build();
        self.run(|| {
            netlink(
                async |handle| handle.route().add(route).execute().await,
                || format!("cannot add a route to {network}/{prefix} by {gateway}"),
            )
        })
    }

    /// Makes the namespace a router of both families.
    ///
    /// # Errors
    ///
    /// If `/proc/sys` cannot be written.
    pub fn forward(&self) -> io::Result<()> {
        self.run(|| {
            let switches = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"];
            switches.iter().try_for_each(|switch| fs::write(format!("/proc/sys/net/{switch}"), "1"))
        })
    }

    /// Sets the largest packet that a device sends, in octets.
    ///
    /// # Errors
    ///
    /// The kernel's error: `EINVAL` beyond the device's bounds.
    pub fn set_mtu(&self, device: &str, mtu: u32) -> io::Result<()> {
        self.run(|| {
            let link = link(device)?.mtu(mtu).build();
            netlink(
                async |handle| handle.link().set(link).execute().await,
                || format!("cannot set the MTU of {device}"),
            )
        })
    }

    /// Drops packets to and from these addresses without an answer, as if this host had lost power: no reset,
    /// no ICMP error. Neighbours still resolve.
    ///
    /// # Errors
    ///
    /// The kernel's error: `EEXIST` if they are dropped already.
    pub fn cut_off(&self, peers: &[IpAddr]) -> io::Result<()> {
        self.run(|| {
            peers.iter().try_for_each(|&ip| {
                let route = black_hole(ip)?;
                netlink(
                    async |handle| handle.route().add(route).execute().await,
                    || format!("cannot drop packets to {ip}"),
                )
            })
        })
    }

    /// The reverse of [`Self::cut_off`].
    ///
    /// # Errors
    ///
    /// The kernel's error: `ESRCH` if they are not dropped.
    pub fn reconnect(&self, peers: &[IpAddr]) -> io::Result<()> {
        self.run(|| {
            peers.iter().try_for_each(|&ip| {
                let route = black_hole(ip)?;
                netlink(
                    async |handle| handle.route().del(route).execute().await,
                    || format!("cannot stop dropping packets to {ip}"),
                )
            })
        })
    }
}

/// A route on which packets vanish. A server behind it receives a SYN, and finds no way for its answer.
fn black_hole(ip: IpAddr) -> io::Result<RouteMessage> {
    let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(ip, host_prefix(ip));
    Ok(route.map_err(io::Error::other)?.kind(RouteType::BlackHole).build())
}

/// Runs a closure on a new thread and waits for it: namespaces and cgroups are per thread.
///
/// # Panics
///
/// If the closure panics, or the process has too many threads.
pub fn on_a_thread<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    let name = thread::current().name().unwrap_or("netns").to_owned();
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(name).spawn_scoped(scope, body);
        thread.unwrap_or_else(|error| panic!("cannot start a thread: {error}")).join()
    })
    .unwrap_or_else(|cause| panic::resume_unwind(cause))
}

/// Sets the loopback device of the calling thread's namespace up.
///
/// # Errors
///
/// The kernel's error.
///
/// # Panics
///
/// Inside a tokio runtime.
pub fn set_up_loopback() -> io::Result<()> {
    set_up(LOOPBACK)
}

/// Adds addresses to a device, each in a network of 256, and sets it up.
fn give_addresses(device: &str, addresses: &[IpAddr]) -> io::Result<()> {
    for &ip in addresses {
        add_address(device, ip, host_prefix(ip) - 8)?;
    }
    set_up(device)
}

/// Makes requests of rtnetlink in the calling thread's namespace.
fn netlink(
    request: impl AsyncFnOnce(Handle) -> Result<(), rtnetlink::Error>,
    what: impl Fn() -> String,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let done = runtime.block_on(async {
        let (connection, handle, _messages) = rtnetlink::new_connection()?;
        // Ends with the runtime.
        let _connection = tokio::spawn(connection);
        request(handle).await.map_err(|error| match error {
            rtnetlink::Error::NetlinkError(error) => error.to_io(),
            other => io::Error::other(other),
        })
    });
    done.map_err(|error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", what())))
}

fn set_up(device: &str) -> io::Result<()> {
    let up = link(device)?.up().build();
    netlink(async |handle| handle.link().set(up).execute().await, || format!("cannot set {device} up"))
}

fn link(device: &str) -> io::Result<LinkMessageBuilder<LinkUnspec>> {
    Ok(LinkUnspec::new_with_index(if_nametoindex(device)?))
}

fn add_address(device: &str, ip: IpAddr, prefix: u8) -> io::Result<()> {
    let index = if_nametoindex(device)?;
    let remedy = if ip.is_ipv6() { " (is IPv6 switched off with ipv6.disable=1?)" } else { "" };
    let added = netlink(
        async |handle| {
            let mut request = handle.address().add(index, ip, prefix);
            let message = request.message_mut();
            // Usable at once: without duplicate address detection, since no other host is on the link.
            message.header.flags |= AddressHeaderFlags::Nodad;
            // A network of one address would have that address for its broadcasts too.
            message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
            request.execute().await
        },
        || format!("cannot add the address {ip} to {device}{remedy}"),
    );
    match added {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Creates a veth pair: one device in this namespace, the other in the namespace of `peer`.
fn add_veth(name: &str, peer: &NetNs, peer_name: &str) -> io::Result<()> {
    let far_end: LinkMessage =
        LinkMessageBuilder::<LinkUnspec>::new().name(peer_name).setns_by_fd(peer.as_fd().as_raw_fd()).build();
    let pair = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Veth)
        .name(name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
        .build();
    netlink(
        async |handle| handle.link().add(pair).execute().await,
        || {
            format!(
                "cannot make the veth pair {name} (is the kernel built with CONFIG_VETH, and is the module there?)"
            )
        },
    )
}

/// Waits until an IPv6 address is local.
///
/// The kernel acknowledges the address first and inserts the route from a work queue later. A datagram in
/// between leaves through the loopback device and returns as one for another host, without any error.
fn wait_for_local_route(ip: IpAddr) -> io::Result<()> {
    /// `RTF_LOCAL` in the flags of `/proc/net/ipv6_route`.
    const LOCAL: u32 = 0x8000_0000;
    let IpAddr::V6(ip) = ip else { return Ok(()) };
    let destination = format!("{:032x}", u128::from(ip));
    for _ in 0..1000 {
        let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route")?;
        let is_local = routes.lines().filter(|route| route.starts_with(&destination)).any(|route| {
            let flags = route.split_whitespace().nth(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
            flags.is_some_and(|flags| flags & LOCAL != 0)
        });
        if is_local {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("{ip} does not become a local address")))
}

const fn host_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}
