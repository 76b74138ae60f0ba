//! The objects of a cluster, as its controllers write them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use k8s_openapi::{
    api::{
        core::v1::{
            LoadBalancerIngress, LoadBalancerStatus, ObjectReference, Service, ServiceSpec, ServiceStatus,
        },
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use lb_core::model::{Protocol, ingest};
use lb_tests::cluster::{self, Cluster, NAMESPACE};
use serde::{Deserialize, Serialize};

/// The port of every service, TCP and UDP.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET_PORT: u16 = 8080;
/// The networks of service addresses and of endpoints.
pub(crate) const SERVICE_NETWORK: &str = "10.96.0.0/12";
pub(crate) const POD_NETWORK: &str = "10.128.0.0/9";
/// The most services of [`SERVICE_NETWORK`], and endpoints of [`POD_NETWORK`].
pub(crate) const MAX_SERVICES: u32 = 1 << 19;
pub(crate) const MAX_ENDPOINTS: u32 = 1 << 22;
/// The network of load-balancer addresses, which is meant for benches (RFC 2544).
pub(crate) const LOAD_BALANCER_NETWORK: &str = "198.18.0.0/15";
/// The first services have a node port.
pub(crate) const N_NODE_PORTS: u32 = 2_700;
/// The node of endpoints that a policy Local wants.
pub(crate) const NODE: &str = "node-0000";
/// The most services of [`LOAD_BALANCER_NETWORK`].
pub(crate) const MAX_LOAD_BALANCERS: u32 = 1 << 16;
/// With UDP, one service in this number has a UDP port beside its TCP port, as name servers have.
pub(crate) const UDP_STRIDE: u32 = 16;

/// The number of objects. Each service has one port and one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_field_names, reason = "counts are called `n_foos` in this tree")]
pub(crate) struct Size {
    pub(crate) n_services: u32,
    pub(crate) n_endpoints: u32,
    pub(crate) n_nodes: u32,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} services x {} endpoints, {} nodes", self.n_services, self.n_endpoints, self.n_nodes)
    }
}

/// An endpoint of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) ip: Ipv4Addr,
    pub(crate) port: u16,
    pub(crate) ready: bool,
}

impl Pod {
    pub(crate) const fn ready(ip: Ipv4Addr) -> Self {
        Self { ip, port: TARGET_PORT, ready: true }
    }
}

/// The n-th address of a network.
fn address(network: [u8; 4], number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes(network) + number)
}

/// The cluster IP of a service.
pub(crate) fn cluster_ip(service: u32) -> Ipv4Addr {
    address([10, 96, 0, 1], service)
}

/// The load-balancer address of a service.
pub(crate) fn load_balancer_ip(service: u32) -> Ipv4Addr {
    address([198, 18, 0, 1], service)
}

/// The node port of a service, if it has one.
pub(crate) fn node_port(service: u32) -> Option<u16> {
    u16::try_from(service).ok().filter(|_| service < N_NODE_PORTS).map(|n| 30_000 + n)
}

/// An external traffic policy. Services have them in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Policy {
    Cluster,
    Local,
}

impl Policy {
    pub(crate) const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }

    const fn of(service: u32) -> Self {
        if service.is_multiple_of(2) { Self::Cluster } else { Self::Local }
    }

    /// The n-th service with this policy.
    pub(crate) const fn nth(self, n: u32) -> u32 {
        match self {
            Self::Cluster => 2 * n,
            Self::Local => 2 * n + 1,
        }
    }

    /// How many of the first services have it.
    pub(crate) const fn n_of(self, n_services: u32) -> u32 {
        match self {
            Self::Cluster => n_services.div_ceil(2),
            Self::Local => n_services / 2,
        }
    }
}

/// The address of a pod that replaces another.
pub(crate) fn new_pod(number: u32) -> Ipv4Addr {
    address([172, 16, 0, 1], number)
}

/// The name of a service. Its slice has the same one.
pub(crate) fn name(service: u32) -> String {
    format!("service-{service:05}")
}

/// The number in a name of [`name`].
pub(crate) fn number(name: &str) -> Option<u32> {
    name.strip_prefix("service-")?.parse().ok()
}

fn labels(service: &str) -> std::collections::BTreeMap<String, String> {
    [("app.kubernetes.io/name", service), ("app.kubernetes.io/part-of", "shop"), ("tier", "backend")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// A Service of type ClusterIP.
pub(crate) fn service(name: &str, ip: Ipv4Addr) -> Service {
    let mut service =
        cluster::service(name, &[IpAddr::V4(ip)], &[cluster::port("http", Protocol::Tcp, PORT)]);
    service.metadata.labels = Some(labels(name));
    cluster::with_spec(service, |spec| spec.selector = Some(labels(name)))
}

/// The slice of a service, with the fields that the slice controller writes.
pub(crate) fn slice(name: &str, pods: &[Pod]) -> EndpointSlice {
    let mut labels = labels(name);
    labels.insert(ingest::SERVICE_NAME.to_owned(), name.to_owned());
    labels.insert(
        "endpointslice.kubernetes.io/managed-by".to_owned(),
        "endpointslice-controller.k8s.io".to_owned(),
    );
    let endpoints = pods.iter().map(|pod| {
        let node = u32::from(pod.ip) % 1000;
        Endpoint {
            addresses: vec![pod.ip.to_string()],
            conditions: Some(EndpointConditions {
                ready: Some(pod.ready),
                serving: Some(pod.ready),
                terminating: Some(false),
            }),
            node_name: Some(format!("node-{node:04}")),
            zone: Some(format!("zone-{}", node % 3)),
            target_ref: Some(ObjectReference {
                kind: Some("Pod".to_owned()),
                namespace: Some(NAMESPACE.to_owned()),
                name: Some(format!("{name}-7d9c8b6f5d-{:08x}", u32::from(pod.ip))),
                uid: Some(format!("{:08x}-0000-4000-8000-000000000000", u32::from(pod.ip))),
                ..ObjectReference::default()
            }),
            ..Endpoint::default()
        }
    });
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            labels: Some(labels),
            annotations: Some([(ingest::TRIGGER_TIME.to_owned(), "2026-01-01T00:00:00Z".to_owned())].into()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Service".to_owned(),
                name: name.to_owned(),
                uid: "00000000-0000-4000-8000-000000000000".to_owned(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        address_type: "IPv4".to_owned(),
        ports: Some(vec![EndpointPort {
            name: Some("http".to_owned()),
            protocol: Some("TCP".to_owned()),
            port: Some(pods.first().map_or(TARGET_PORT, |pod| pod.port).into()),
            ..EndpointPort::default()
        }]),
        endpoints: endpoints.collect(),
    }
}

impl Size {
    /// A pod of a service.
    pub(crate) fn pod(self, service: u32, number: u32) -> Ipv4Addr {
        address([10, 128, 0, 1], service * self.n_endpoints + number)
    }

    /// The first pods of a service.
    pub(crate) fn pods(self, service: u32) -> Vec<Pod> {
        (0..self.n_endpoints).map(|number| Pod::ready(self.pod(service, number))).collect()
    }

    /// [`Self::cluster`] with the UDP ports.
    pub(crate) fn cluster_with_udp(self) -> Cluster {
        let mut cluster = self.cluster();
        for name in (0..self.n_services).step_by(UDP_STRIDE as usize).map(name) {
            let key = (NAMESPACE.to_owned(), name);
            let service = cluster.services.get_mut(&key).and_then(|service| service.spec.as_mut());
            let slice = cluster.slices.get_mut(&key).and_then(|slice| slice.ports.as_mut());
            if let (Some(ServiceSpec { ports: Some(service), .. }), Some(slice)) = (service, slice) {
                service.push(cluster::port("udp", Protocol::Udp, PORT));
                let protocol = Some(Protocol::Udp.to_string());
                slice.push(EndpointPort { name: Some("udp".to_owned()), protocol, ..slice[0].clone() });
            }
        }
        cluster
    }

    /// [`Self::cluster`] with services of type `LoadBalancer` and endpoints on [`NODE`], which has this
    /// address.
    pub(crate) fn cluster_with_load_balancers(self, node: IpAddr) -> Cluster {
        let mut cluster = Cluster::new();
        for number in 0..self.n_services {
            let name = name(number);
            let mut service = cluster::with_spec(service(&name, cluster_ip(number)), |spec| {
                spec.type_ = Some("LoadBalancer".to_owned());
                spec.external_traffic_policy = Some(Policy::of(number).name().to_owned());
                spec.allocate_load_balancer_node_ports = Some(false);
            });
            let ingress = LoadBalancerIngress {
                ip: Some(load_balancer_ip(number).to_string()),
                ..LoadBalancerIngress::default()
            };
            let load_balancer = Some(LoadBalancerStatus { ingress: Some(vec![ingress]) });
            service.status = Some(ServiceStatus { load_balancer, ..ServiceStatus::default() });
            let ports = service.spec.iter_mut().flat_map(|spec| spec.ports.iter_mut().flatten());
            ports.for_each(|port| port.node_port = node_port(number).map(i32::from));
            cluster.set(service);
            let mut slice = slice(&name, &self.pods(number));
            slice.endpoints.iter_mut().for_each(|endpoint| endpoint.node_name = Some(NODE.to_owned()));
            cluster.set(slice);
        }
        cluster.with([cluster::node(NODE, &[node])])
    }

    pub(crate) fn cluster(self) -> Cluster {
        let mut cluster = Cluster::new();
        for number in 0..self.n_services {
            let name = name(number);
            cluster.set(service(&name, cluster_ip(number)));
            cluster.set(slice(&name, &self.pods(number)));
        }
        let nodes = (0..self.n_nodes).map(|number| {
            cluster::node(&format!("node-{number:04}"), &[address([10, 0, 0, 1], number).into()])
        });
        cluster.with(nodes)
    }
}
