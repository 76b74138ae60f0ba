//! What tests need of the machine, and what happens where it is missing.

use std::{env, io::Write as _};

use lb_core::model::Protocol;

use crate::client::{Domain, Socket};

/// Something that a test cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// To load and attach the programs: root, a cgroup v2 hierarchy, and the BPF object in this executable.
    Programs,
    /// To learn the cookie of a network namespace (kernel 5.14), without which no program can be told that a test's
    /// namespace is the node's.
    NetnsCookie,
    /// To end sockets of other programs: `CONFIG_INET_DIAG_DESTROY`.
    SocketDestroy,
    /// Multipath TCP sockets: `CONFIG_MPTCP`.
    Multipath,
    /// What programs need to know a socket of the kernel from a program's.
    SockFields,
    /// A program on `PATH`.
    Command(&'static str),
    /// A variable of the environment that `cargo xtask test` sets.
    Variable(&'static str),
}

impl Feature {
    /// What is missing, if anything is.
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

    /// Whether this machine could have it, so that missing it is a fault of the machine's set-up.
    fn is_possible(self) -> bool {
        match self {
            Self::Programs | Self::Command(_) | Self::Variable(_) => true,
            Self::NetnsCookie => kernel_version() >= (5, 14),
            // A matter of the kernel's configuration.
            Self::Multipath => false,
            Self::SockFields => kernel_version() >= (5, 12),
            Self::SocketDestroy => lb_kernel::sockets::check().err().is_none_or(|error| !error.is_final()),
        }
    }
}

/// Whether a test can go on. If not, it says so on standard error, past the capture of libtest.
///
/// # Panics
///
/// If a feature is missing that could be there, and the environment has `LB_TEST_STRICT=1`: otherwise a broken
/// machine would turn all tests green.
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

/// A number that the environment gives, for machines that are slower or have more time; `otherwise` if it gives none.
#[must_use]
pub fn number(variable: &str, otherwise: usize) -> usize {
    env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Major and minor version of the running kernel.
///
/// # Panics
///
/// If the kernel does not tell.
#[must_use]
pub fn kernel_version() -> (u32, u32) {
    let name = nix::sys::utsname::uname().expect("uname");
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or_default());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}
