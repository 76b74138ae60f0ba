//! What most tests start with: addresses, services, servers and an agent.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use lb_core::model::Protocol::{self, Tcp};
use lb_kernel::{Options, pins};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket, call},
    cluster::Cluster,
    server::Servers,
};

use crate::any_kernel::load::{Load, Window};

/// The families of services. A socket of [`Domain::Mapped`] calls those of IPv4.
pub(crate) const FAMILIES: [Domain; 2] = [Domain::V4, Domain::V6];

/// The service address that tests of a domain call.
pub(crate) fn service_address(domain: Domain) -> SocketAddr {
    let text = if domain == Domain::V6 { "[fd00:96::1]:80" } else { "10.96.0.1:80" };
    text.parse().unwrap()
}

/// Another port of [`service_address`].
pub(crate) fn service_port(domain: Domain, port: u16) -> SocketAddr {
    SocketAddr::new(service_address(domain).ip(), port)
}

/// Loopback addresses for servers, on consecutive ports.
pub(crate) fn addresses<const N: usize>(domain: Domain, first_port: u16) -> [SocketAddr; N] {
    std::array::from_fn(|n| SocketAddr::new(domain.loopback(), first_port + u16::try_from(n).unwrap()))
}

/// In each family and for each protocol, services with the addresses and endpoints that `of` lists.
pub(crate) fn services(
    protocols: &[Protocol],
    of: impl Fn(Domain) -> Vec<(SocketAddr, Vec<SocketAddr>)>,
) -> Cluster {
    let mut cluster = Cluster::new();
    for domain in FAMILIES {
        for protocol in protocols {
            for (n, (address, endpoints)) in of(domain).into_iter().enumerate() {
                cluster.serve(&format!("{domain:?}-{protocol}-{n}"), address, *protocol, &endpoints);
            }
        }
    }
    cluster
}

/// Servers at all endpoints on loopback, also those of no Service. In a sandbox, others are unreachable.
pub(crate) fn servers_of(cluster: &Cluster) -> Servers {
    let endpoints = cluster.endpoint_addresses();
    Servers::start(endpoints.into_iter().filter(|(endpoint, _)| endpoint.ip().is_loopback()))
}

/// An agent with the default settings.
pub(crate) fn start(options: &Options) -> Agent {
    Agent::start_with(options, agent::settings(), Vec::new()).unwrap_or_else(|error| panic!("{error}"))
}

/// A socket that is connected.
pub(crate) fn connected(domain: Domain, protocol: Protocol, to: SocketAddr) -> Socket {
    let socket = Socket::new(domain, protocol);
    socket.connect(to).unwrap();
    socket
}

/// Once for each home of records ([`agent::modes`]); removes the pins after each.
pub(crate) fn in_each_mode(sandbox: &Sandbox, test: impl Fn(&Options)) {
    for options in agent::modes(sandbox) {
        test(&options);
        pins::remove(&sandbox.pin_path()).unwrap();
    }
}

/// An IPv4 service whose TCP endpoints answer.
pub(crate) struct Web {
    pub(crate) service: SocketAddr,
    pub(crate) endpoints: Vec<SocketAddr>,
    pub(crate) cluster: Cluster,
    _servers: Servers,
}

impl Web {
    pub(crate) fn new(n_endpoints: usize) -> Self {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<8>(Domain::V4, 8001)[..n_endpoints].to_vec();
        let cluster = Cluster::new().serving("web", service, Tcp, &endpoints);
        Self { service, _servers: servers_of(&cluster), endpoints, cluster }
    }

    /// Starts an agent that serves it.
    pub(crate) fn serve(&self, sandbox: &Sandbox) -> Agent {
        let mut agent = Agent::start(sandbox);
        agent.follow(&self.cluster);
        agent
    }

    /// Whether a call reaches one of the endpoints.
    pub(crate) fn answers(&self) -> bool {
        call(self.service, Tcp).is_ok_and(|server| self.endpoints.contains(&server))
    }

    /// Calls while this thread makes changes; each call must reach an endpoint. See [`Load::run`].
    pub(crate) fn under_load(&self, n_calls: usize, n_changes: usize, change: impl FnMut(usize)) {
        Load { n_calls, n_changes }.run(
            change,
            |_thread| call(self.service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| self.endpoints.contains(&server)),
        );
    }
}

/// Runs a test in a sandbox with [`Web`].
pub(crate) fn with_web(n_endpoints: usize, test: impl FnOnce(&Sandbox, &Web) + Send) {
    Sandbox::test(|sandbox| test(sandbox, &Web::new(n_endpoints)));
}

/// A cgroup below the sandbox's, with its attached programs.
pub(crate) struct Below(pub(crate) PathBuf);

impl Below {
    pub(crate) fn make(parent: &Path, name: &str) -> Self {
        let path = parent.join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _the_sandbox_tries_again = fs::remove_dir(&self.0);
    }
}
