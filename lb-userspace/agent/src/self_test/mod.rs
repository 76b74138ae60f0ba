//! Self-tests: the agent's own service, and a process that calls it.
//!
//! # Purpose
//!
//! Attached programs do not prove that calls meet them: another cgroup hierarchy, another program or a full
//! table can interfere. So the agent keeps a service with its own endpoint ([`objects`], [`Echo`]). A process
//! in a fresh cgroup calls it in each way that programs do ([`calls`]), through the same tables and hooks as
//! all calls. [`run`] starts that process and reads its report.
//!
//! # Invariants
//!
//! - The calls are bound to the loopback interface. No packet leaves the host, whatever the hooks do.
//! - The service's name cannot clash with a cluster's: a namespace has no dot.
//!
//! # Depends on
//!
//! `model`.

pub mod calls;
mod echo;
mod process;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use lb_core::model::{
    Family, Protocol, Service, ServiceKey, ServicePort, Slice, SliceEndpoint, SlicePort, address,
    annotation::DEFAULT_WEIGHT,
};

pub use self::{
    echo::Echo,
    process::{Caller, Exempt, Outcome, remove_leftover, run, run_below_excluded, run_excluded},
};

/// Port of the service: echo's (RFC 862).
const PORT: u16 = 7;
/// Its addresses. The first is a loopback address that no other program listens on. IPv6 has only one
/// loopback address, so the second is in the discard prefix (RFC 6666). Its last bytes spell the name.
const IPV4: Ipv4Addr = Ipv4Addr::new(127, 83, 76, 66);
const IPV6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0x736f, 0x636b, 0x6c62);

/// The address of the service in a family.
#[must_use]
pub const fn service_address(family: Family) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::new(IpAddr::V4(IPV4), PORT),
        Family::V6 => SocketAddr::new(IpAddr::V6(IPV6), PORT),
    }
}

/// The service, and a slice per family of its endpoints, which answer TCP and UDP at the same port.
#[must_use]
pub fn objects(endpoints: &[SocketAddr]) -> (Service, Vec<Slice>) {
    let key = ServiceKey { namespace: "socklb.io".into(), name: "self-test".into() };
    let protocols = [(Protocol::Tcp, Arc::from("tcp")), (Protocol::Udp, Arc::from("udp"))];
    let ports = protocols.iter().map(|(protocol, name)| ServicePort {
        name: Arc::clone(name),
        protocol: *protocol,
        port: PORT,
        node_port: None,
    });
    let service = Service {
        cluster_ipv4: Some(IPV4),
        cluster_ipv6: Some(IPV6),
        ..Service::with_ports(key.clone(), ports.collect())
    };
    let slices = endpoints.iter().map(|endpoint| {
        let ipv6 = address::family(endpoint.ip()) == Family::V6;
        Slice {
            name: if ipv6 { "self-test-ipv6" } else { "self-test-ipv4" }.into(),
            service: key.clone(),
            ipv6,
            ports: protocols
                .iter()
                .map(|(protocol, name)| SlicePort {
                    name: Arc::clone(name),
                    protocol: *protocol,
                    port: endpoint.port(),
                })
                .collect(),
            endpoints: vec![SliceEndpoint {
                address: endpoint.ip(),
                ready: true,
                serving: true,
                terminating: false,
                placement: Arc::default(),
                hints: None,
                hostname: None,
                weight: DEFAULT_WEIGHT,
            }],
            trigger_time: None,
        }
    });
    (service, slices.collect())
}

#[cfg(test)]
mod tests {
    use lb_core::desired::{Frontend, Settings, Topology, service::frontends};

    use super::*;

    #[test]
    fn the_service_has_a_frontend_for_each_protocol_and_family() {
        let endpoints: Vec<SocketAddr> =
            ["127.0.0.1:4001", "[::1]:4002"].map(|text| text.parse().unwrap()).into();
        let (service, slices) = objects(&endpoints);
        let settings = Settings::of_node("node-a");
        let topology = Topology::new(&[], &settings, &[]);
        let (frontends, issues) = frontends(&service, slices.iter(), &topology, &settings);
        assert!(issues.is_empty(), "{issues:?}");
        let lines = frontends.iter().map(|Frontend { address, kind, endpoints, .. }| {
            let endpoints: Vec<_> = endpoints.iter().map(ToString::to_string).collect();
            format!("{address} {kind:?} {}", endpoints.join(" "))
        });
        assert_eq!(
            lines.collect::<Vec<_>>(),
            [
                "127.83.76.66:7/tcp ClusterIP 127.0.0.1:4001",
                "127.83.76.66:7/udp ClusterIP 127.0.0.1:4001",
                "[100::736f:636b:6c62]:7/tcp ClusterIP [::1]:4002",
                "[100::736f:636b:6c62]:7/udp ClusterIP [::1]:4002",
            ]
        );
    }
}
