//! What tests need of the machine, and what happens if it is missing.

use std::{env, io::Write as _, path::Path};

use lb_core::{model::Protocol, packets::nft::Family};

use crate::client::{Domain, Socket};

/// A requirement of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Loading and attaching the programs: root, a cgroup v2 hierarchy, and the BPF object in this
    /// executable.
    Programs,
    /// The cookie of a network namespace (kernel 5.14). Without it no program can know that a test's
    /// namespace is the node's.
    NetnsCookie,
    /// Destroying sockets of other programs: `CONFIG_INET_DIAG_DESTROY`.
    SocketDestroy,
    /// Multipath TCP sockets: `CONFIG_MPTCP`.
    Multipath,
    /// What BPF programs need to distinguish kernel sockets from user sockets.
    SockFields,
    /// nftables, with all that the rules for packets need.
    Nftables,
    /// Rules for packets that a bridge forwards: `CONFIG_BRIDGE_NETFILTER`.
    BridgeFilter,
    /// A program on `PATH`.
    Command(&'static str),
    /// An environment variable that `cargo xtask test` sets.
    Variable(&'static str),
}

impl Feature {
    fn missing(self) -> Option<String> {
        match self {
            Self::Programs => {
                if !nix::unistd::geteuid().is_root() {
                    return Some("root".to_owned());
                }
                let cgroup = lb_kernel::cgroup::find_any().err();
                let object = lb_kernel::object::bytes().err();
                cgroup.or(object).map(|error| error.to_string())
            }
            Self::NetnsCookie => lb_kernel::syscall::netns_cookie()
                .is_none()
                .then(|| "SO_NETNS_COOKIE, which came with kernel 5.14".to_owned()),
            Self::SocketDestroy => lb_kernel::sockets::check().err().map(|error| error.to_string()),
            Self::Multipath => {
                let socket =
                    Socket::with_protocol_number(Domain::V4, Protocol::Tcp, nix::libc::IPPROTO_MPTCP);
                socket.err().map(|error| format!("multipath TCP sockets: {error}"))
            }
            Self::SockFields => lb_kernel::Features::probe().sock_fields.is_none().then(|| {
                "programs that may read the kernel's sockets (BTF, bpf_probe_read_kernel)".to_owned()
            }),
            Self::Nftables => {
                let probes = [Family::V4, Family::V6].map(lb_kernel::nftables::probe);
                probes.into_iter().find_map(Result::err).map(|error| error.to_string())
            }
            Self::BridgeFilter => (!Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists())
                .then(|| "br_netfilter, a module whose default is for all namespaces of the host".to_owned()),
            Self::Command(name) => {
                let path = env::var_os("PATH").unwrap_or_default();
                let is_there = env::split_paths(&path).any(|directory| directory.join(name).is_file());
                (!is_there).then(|| format!("the program {name}"))
            }
            Self::Variable(name) => {
                env::var_os(name).is_none().then(|| format!("{name}, which `cargo xtask test` sets"))
            }
        }
    }

    /// Whether this machine could have it, so that its absence is a fault of the setup.
    fn is_possible(self) -> bool {
        match self {
            Self::Programs | Self::Command(_) | Self::Variable(_) => true,
            Self::NetnsCookie => kernel_version() >= (5, 14),
            Self::Nftables => kernel_version() >= (5, 13),
            // Depends on the kernel's configuration.
            Self::Multipath | Self::BridgeFilter => false,
            Self::SockFields => kernel_version() >= (5, 12),
            Self::SocketDestroy => lb_kernel::sockets::check().err().is_none_or(|error| !error.is_final()),
        }
    }
}

/// Whether a test can run. If not, prints so on standard error, past libtest's capture.
///
/// # Panics
///
/// If a feature is missing that could exist and `LB_TEST_STRICT=1` is set: otherwise all tests would pass on
/// a broken machine.
#[must_use]
pub fn require(feature: Feature) -> bool {
    let Some(missing) = feature.missing() else { return true };
    let is_strict = env::var("LB_TEST_STRICT").is_ok_and(|value| value == "1");
    assert!(!is_strict || !feature.is_possible(), "this test needs {missing}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _nobody_reads = writeln!(std::io::stderr(), "SKIPPED {test}: it needs {missing}");
    false
}

/// A number from the environment, for slower machines or longer runs; `otherwise` if it is not set.
#[must_use]
pub fn number(variable: &str, otherwise: usize) -> usize {
    env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Major and minor version of the running kernel.
///
/// # Panics
///
/// If the kernel's version cannot be read.
#[must_use]
pub fn kernel_version() -> (u32, u32) {
    let name = nix::sys::utsname::uname().expect("uname");
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or_default());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}
