//! Isolated network namespaces: nothing that a test sends leaves the namespaces that it created.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    panic,
    path::Path,
    process::{Child, Command},
    thread,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::netlink;

/// A network namespace. It is destroyed with the last thread, socket and [`NetNs`] in it.
#[derive(Debug)]
pub struct NetNs {
    file: File,
}

impl NetNs {
    /// Moves the calling thread to a new namespace with only the loopback device, which is up, and no routes.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn enter_new() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        netlink::set_up(netlink::LOOPBACK)?;
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
    /// If the closure panics, or the namespace cannot be entered.
    pub fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        on_a_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).expect("a namespace of ours can be entered");
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

    /// Adds an address to the loopback device of the namespace.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn add_address(&self, ip: IpAddr) -> io::Result<()> {
        self.run(|| {
            netlink::add_address(netlink::LOOPBACK, ip, host_prefix(ip))?;
            wait_for_local_route(ip)
        })
    }

    /// Joins this namespace to another with a veth pair, with one address of one network at each end.
    ///
    /// # Errors
    ///
    /// The kernel's error: `EOPNOTSUPP` without the module `veth`.
    pub fn join(
        &self,
        name: &str,
        here: &[IpAddr],
        other: &Self,
        other_name: &str,
        there: &[IpAddr],
    ) -> io::Result<()> {
        self.run(|| {
            netlink::add_veth(name, other.file.as_fd(), other_name)?;
            give_addresses(name, here)
        })?;
        other.run(|| give_addresses(other_name, there))
    }
}

/// A process in a network namespace, through which the agent finds it. Killed on drop.
#[derive(Debug)]
pub struct Resident(Child);

impl Resident {
    /// Starts the process.
    ///
    /// # Errors
    ///
    /// If `sleep` cannot be started.
    pub fn of(netns: &NetNs) -> io::Result<Self> {
        netns.run(|| Command::new("sleep").arg("1000").spawn()).map(Self)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}

/// Adds addresses to a device, each in a network of 256, and sets it up.
fn give_addresses(name: &str, addresses: &[IpAddr]) -> io::Result<()> {
    let device = netlink::device(name)?;
    for &ip in addresses {
        netlink::add_address(device, ip, host_prefix(ip) - 8)?;
    }
    netlink::set_up(device)
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

/// Lets processes of any group create ICMP sockets in the calling thread's namespace.
///
/// # Errors
///
/// If `/proc/sys` cannot be written.
pub fn allow_ping() -> io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
}

/// Runs a closure on a new thread and waits for it: namespaces and cgroups are per thread.
pub(crate) fn on_a_thread<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    let name = thread::current().name().unwrap_or("test").to_owned();
    thread::scope(|scope| {
        thread::Builder::new().name(name).spawn_scoped(scope, body).expect("a thread").join()
    })
    .unwrap_or_else(|cause| panic::resume_unwind(cause))
}
