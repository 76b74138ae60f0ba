//! A node and pods: network namespaces joined by veth pairs, with routes among them and no others.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use lb_core::model::Protocol;
use lb_tests::{Feature, Sandbox, agent::Agent, cluster::Cluster, netns::NetNs};

use crate::backend::Backend;

pub(crate) const HTTP: u16 = 8080;
const DNS: u16 = 1053;

/// A pod that serves pages and answers name queries.
pub(crate) struct Pod {
    pub(crate) netns: NetNs,
    pub(crate) ips: [IpAddr; 2],
    /// The node's addresses on the link to it.
    pub(crate) gateways: [IpAddr; 2],
    _servers: Backend,
}

/// A sandbox's node with pods.
pub(crate) struct Town {
    pub(crate) pods: Vec<Pod>,
}

fn addresses(pod: u8, host: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x244, pod.into(), 0, 0, 0, 0, host.into());
    [IpAddr::from([10, 244, pod, host]), v6.into()]
}

/// Runs a test with a program and a town, and an agent that serves it with all pods as endpoints.
pub(crate) fn with_served_town(
    program: &'static str,
    n_pods: u8,
    test: impl FnOnce(&Town, &mut Agent) + Send,
) {
    Sandbox::test_with(&[Feature::Command(program)], |sandbox| {
        let town = Town::new(sandbox, n_pods);
        let mut agent = Agent::start(sandbox);
        agent.follow(&town.cluster(0..town.pods.len()));
        test(&town, &mut agent);
    });
}

impl Town {
    /// Creates pods of the sandbox's node.
    pub(crate) fn new(sandbox: &Sandbox, n_pods: u8) -> Self {
        let pods = (1..=n_pods).map(|n| {
            let (gateways, ips) = (addresses(n, 1), addresses(n, 2));
            let netns = NetNs::new().unwrap();
            sandbox.netns().join(&format!("pod{n}"), &gateways, &netns, "eth0", &ips).unwrap();
            let servers = netns.run(|| Backend::start(ips, HTTP, DNS));
            Pod { netns, ips, gateways, _servers: servers }
        });
        Self { pods: pods.collect() }
    }

    /// The services of this town, with some of the pods as endpoints.
    pub(crate) fn cluster(&self, pods: std::ops::Range<usize>) -> Cluster {
        let mut cluster = Cluster::new();
        for (n, family) in ["v4", "v6"].iter().enumerate() {
            let endpoints = |port| -> Vec<SocketAddr> {
                self.pods[pods.clone()].iter().map(|pod| SocketAddr::new(pod.ips[n], port)).collect()
            };
            cluster.serve(&format!("web-{family}"), web()[n], Protocol::Tcp, &endpoints(HTTP));
            cluster.serve(&format!("dns-udp-{family}"), dns()[n], Protocol::Udp, &endpoints(DNS));
            cluster.serve(&format!("dns-tcp-{family}"), dns()[n], Protocol::Tcp, &endpoints(DNS));
        }
        cluster.serve("empty", empty(), Protocol::Tcp, &[]);
        cluster
    }
}

pub(crate) fn web() -> [SocketAddr; 2] {
    ["10.96.0.80:80", "[fd00:96::80]:80"].map(|address| address.parse().unwrap())
}

pub(crate) fn dns() -> [SocketAddr; 2] {
    ["10.96.0.53:53", "[fd00:96::53]:53"].map(|address| address.parse().unwrap())
}

pub(crate) fn empty() -> SocketAddr {
    "10.96.0.81:80".parse().unwrap()
}
