//! The objects of `manifests/demo`, and their addresses.
//!
//! # Invariants
//!
//! - The manifests are part of the binary, so that it needs no source tree.
//! - The addresses here equal those of the manifests; a test compares them.

use std::{
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use lb_core::{desired::FrontendAddress, model::Protocol};

/// The manifest that is rewritten when a pod dies.
const SLICES: &str = "endpointslices.yaml";

/// The files of `manifests/demo`: name and text.
const FILES: [(&str, &str); 3] = [
    ("node.yaml", include_str!("../../../manifests/demo/node.yaml")),
    ("services.yaml", include_str!("../../../manifests/demo/services.yaml")),
    (SLICES, include_str!("../../../manifests/demo/endpointslices.yaml")),
];

/// Name of the Node.
pub(super) const NODE_NAME: &str = "demo-node";

/// The node's addresses.
pub(super) const NODE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 10, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x10, 0, 0, 0, 0, 1))];

/// Port of a pod's HTTP server.
pub(super) const HTTP_PORT: u16 = 8080;
/// Port of a pod's UDP echo server.
pub(super) const ECHO_PORT: u16 = 5353;
/// Node port of the service `web-node`.
const NODE_PORT: u16 = 30080;

/// A pod: a network namespace with servers in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pod {
    /// Its name, which its servers send.
    pub name: &'static str,
    /// Number of its subnets, `10.244.N.0/24` and `fd00:10:244:N::/64`.
    subnet: u8,
}

/// All pods.
pub(super) const PODS: [Pod; 3] =
    [Pod { name: "pod-1", subnet: 1 }, Pod { name: "pod-2", subnet: 2 }, Pod { name: "pod-3", subnet: 3 }];

impl Pod {
    /// Its addresses.
    pub(super) const fn addresses(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.ipv4(10)), IpAddr::V6(self.ipv6(0x10))]
    }

    /// The node's addresses in its subnets.
    pub(super) const fn gateways(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.ipv4(1)), IpAddr::V6(self.ipv6(1))]
    }

    const fn ipv4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.subnet, host)
    }

    const fn ipv6(self, host: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, self.subnet as u16, 0, 0, 0, host)
    }
}

/// An address for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Name of the Service.
    pub service: &'static str,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The called address.
    pub address: SocketAddr,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.service, self.protocol, self.address)
    }
}

const fn target(service: &'static str, protocol: Protocol, ip: IpAddr, port: u16) -> Target {
    Target { service, protocol, address: SocketAddr::new(ip, port) }
}

/// Cluster IPs with the last part `last`, decimal in IPv4 and hexadecimal in IPv6.
const fn cluster_ips((v4, v6): (u8, u16)) -> [IpAddr; 2] {
    [IpAddr::V4(Ipv4Addr::new(10, 96, 0, v4)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, v6))]
}

/// A port behind cluster IPs.
const fn at_cluster_ips(
    service: &'static str,
    protocol: Protocol,
    last: (u8, u16),
    port: u16,
) -> [Target; 2] {
    let [v4, v6] = cluster_ips(last);
    [target(service, protocol, v4, port), target(service, protocol, v6, port)]
}

/// HTTP behind cluster IPs.
pub(super) const WEB: [Target; 2] = at_cluster_ips("web", Protocol::Tcp, (80, 0x80), 80);

/// UDP behind cluster IPs.
pub(super) const ECHO: [Target; 2] = at_cluster_ips("echo", Protocol::Udp, (53, 0x53), 53);

/// The same pods behind a Service with `socklb.io/health: "off"`.
pub(super) const WEB_BLIND: Target = {
    let [target, _] = at_cluster_ips("web-blind", Protocol::Tcp, (82, 0x82), 80);
    target
};

/// A service without endpoints.
pub(super) const IDLE: [Target; 2] = at_cluster_ips("idle", Protocol::Tcp, (90, 0x90), 80);

/// HTTP behind a node port: on the node's addresses and on loopback.
pub(super) const WEB_NODE: [Target; 4] = [
    target("web-node", Protocol::Tcp, NODE[0], NODE_PORT),
    target("web-node", Protocol::Tcp, NODE[1], NODE_PORT),
    target("web-node", Protocol::Tcp, IpAddr::V4(Ipv4Addr::LOCALHOST), NODE_PORT),
    target("web-node", Protocol::Tcp, IpAddr::V6(Ipv6Addr::LOCALHOST), NODE_PORT),
];

/// Every frontend of the manifests, with its number of endpoints while all pods live.
pub(super) fn frontends() -> impl Iterator<Item = (FrontendAddress, usize)> {
    let frontend = |ip, port, protocol, n| (FrontendAddress { ip, port, protocol }, n);
    let of =
        move |target: &Target, n| frontend(target.address.ip(), target.address.port(), target.protocol, n);
    let n_pods = PODS.len();
    let with_endpoints = WEB.iter().chain(&ECHO).chain([&WEB_BLIND]).map(move |target| of(target, n_pods));
    let without = IDLE.iter().map(move |target| of(target, 0));
    let web_node = cluster_ips((81, 0x81)).map(|ip| frontend(ip, 80, Protocol::Tcp, n_pods));
    // A node port has one frontend per family, at the unspecified address.
    let node_port = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)]
        .map(|ip| frontend(ip, NODE_PORT, Protocol::Tcp, n_pods));
    with_endpoints.chain(without).chain(web_node).chain(node_port)
}

/// Writes the manifests to a folder.
pub(super) fn write(folder: &Path) -> io::Result<()> {
    FILES.iter().try_for_each(|(name, text)| fs::write(folder.join(name), text))
}

/// Removes a pod's endpoints from the manifest, as a `ConfigMap` or a careful editor does: writes a new file,
/// then renames it over the old one.
pub(super) fn take_out(folder: &Path, pod: Pod) -> io::Result<()> {
    let [.., (name, text)] = FILES;
    // Hidden, so that no reader of the folder takes it for a manifest.
    let new = folder.join(format!(".{name}.new"));
    fs::write(&new, without(text, pod))?;
    fs::rename(new, folder.join(name))
}

/// The slices with inverted conditions of one pod's endpoints.
fn without(slices: &str, pod: Pod) -> String {
    let [v4, v6] = pod.addresses();
    let (v4, v6) = (format!("[{v4}]"), format!("[\"{v6}\"]"));
    let mut is_this_pod = false;
    let mut text = String::with_capacity(slices.len());
    for line in slices.lines() {
        if line.trim_start().starts_with("- addresses:") {
            is_this_pod = line.ends_with(&v4) || line.ends_with(&v6);
        }
        if is_this_pod && line.trim_start().starts_with("conditions:") {
            text.push_str(&line.replace(": true", ": false"));
        } else {
            text.push_str(line);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use lb_agent::source::files::{Body, parse};
    use lb_core::{
        desired::{Settings, Topology, service},
        model::Store,
    };

    use super::*;

    /// The frontends of the manifests with these slices.
    fn served(slices: &str) -> BTreeMap<FrontendAddress, Vec<SocketAddr>> {
        let mut store = Store::new();
        for (name, text) in FILES {
            let text = if name == SLICES { slices } else { text };
            for object in parse(name, text, None).unwrap() {
                assert_eq!(object.issues, [], "{name}");
                let _changes = match object.body {
                    Body::Service(service) => {
                        store.set_service(&service.key.clone(), Some(Arc::unwrap_or_clone(service)))
                    }
                    Body::Slice(slice) => store.set_slice(&slice.key(), Some(Arc::unwrap_or_clone(slice))),
                    Body::Node(node) => store.set_node(&node.name.clone(), Some(Arc::unwrap_or_clone(node))),
                    Body::ServiceCidr(_) | Body::Nothing => panic!("{name}: {object:?}"),
                };
            }
        }
        let settings = Settings::of_node(NODE_NAME);
        let topology = Topology::new(store.nodes(), &settings, &[]);
        assert_eq!(topology.own_addresses().iter().copied().collect::<Vec<_>>(), NODE);
        store
            .services()
            .flat_map(|object| {
                let (frontends, issues) =
                    service::frontends(object, store.slices_of(&object.key), &topology, &settings);
                assert!(issues.is_empty(), "{issues:?}");
                frontends
            })
            .map(|frontend| (frontend.address, frontend.endpoints.to_vec()))
            .collect()
    }

    #[test]
    fn the_manifests_hold_what_the_demo_says() {
        let [.., (_, slices)] = FILES;
        let served = served(slices);
        let expected: BTreeMap<_, _> = frontends().collect();
        assert_eq!(
            served.iter().map(|(address, set)| (*address, set.len())).collect::<BTreeMap<_, _>>(),
            expected
        );
        for (address, endpoints) in served.iter().filter(|(_, endpoints)| !endpoints.is_empty()) {
            let port = if address.protocol == Protocol::Udp { ECHO_PORT } else { HTTP_PORT };
            let family = usize::from(address.ip.is_ipv6());
            let pods: Vec<_> =
                PODS.iter().map(|pod| SocketAddr::new(pod.addresses()[family], port)).collect();
            assert_eq!(*endpoints, pods, "{address:?}");
        }
    }

    #[test]
    fn a_pod_that_is_taken_out_is_in_no_set() {
        let [.., (_, slices)] = FILES;
        let [_, _, pod] = PODS;
        for (address, endpoints) in served(&without(slices, pod)) {
            let is_idle = IDLE.iter().any(|idle| idle.address.ip() == address.ip);
            assert_eq!(endpoints.len(), if is_idle { 0 } else { PODS.len() - 1 });
            assert!(endpoints.iter().all(|endpoint| !pod.addresses().contains(&endpoint.ip())));
        }
    }
}
